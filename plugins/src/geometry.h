// How the work of a launch is divided, and where everything lies. Worked out on the host, passed to the kernels by
// value.
#pragma once

#include "arithmetic.h"
#include "decode_nms.h"

namespace retinaface {

constexpr int32_t kMaxSlices = 1024;      // scan blocks per image
constexpr int32_t kMinSlicePriors = 128;  // priors of a slice: at 640x640 there are as many slices as an H200 has SMs
constexpr int32_t kScanThreads = 512;     // with fp32 at 640x640, 16 bytes of a slice for each
constexpr int32_t kFinishThreads = 1024;
constexpr int32_t kTile = 32;          // boxes that are resolved together: the bits of a word
constexpr int32_t kMinCapacity = 64;   // two keys for each lane of a warp
constexpr int32_t kSharedKeys = 4096;  // candidates whose keys are sorted in shared memory; more are in the workspace

struct alignas(16) Box {
  float x1, y1, x2, y2;
};

struct Geometry {
  int32_t first_prior[kMaxLevels + 1];
  int64_t first_vector[kMaxLevels + 1];  // 16-byte pieces of one image's head maps
  int32_t priors;                        // of one image
  int32_t slices;                        // of one image
  int32_t slice_priors;
  int32_t slice_threads_log2;  // of finish, for the keys of each slice: as many as there are, a warp at most
  int64_t slice_vectors;
  int32_t spill_capacity;  // candidates that fit in the workspace: a power of two
};

inline int32_t power_of_two(int64_t at_least) {
  int32_t value = kMinCapacity;
  while (value < at_least) value *= 2;
  return value;
}

inline Geometry make_geometry(const DecodeParams& p, HeadType type) {
  Geometry g{};
  const int32_t value_bytes = type == HeadType::kHalf ? 2 : 4;
  for (int32_t level = 0; level < p.levels; ++level) {
    const int32_t cells = p.grid_h[level] * p.grid_w[level];
    g.first_prior[level + 1] = g.first_prior[level] + cells * p.per_cell;
    g.first_vector[level + 1] =
        g.first_vector[level] + int64_t(cells) * p.per_cell * value_bytes;  // 16 values / 16 bytes
  }
  g.priors = g.first_prior[p.levels];
  g.slice_priors = kMinSlicePriors;
  while (int64_t(g.slice_priors) * kMaxSlices < g.priors) g.slice_priors *= 2;
  g.slices = (g.priors + g.slice_priors - 1) / g.slice_priors;
  while (g.slice_threads_log2 < 5 && g.slices << (g.slice_threads_log2 + 1) <= kFinishThreads) ++g.slice_threads_log2;
  g.slice_vectors = (g.first_vector[p.levels] + g.slices - 1) / g.slices;
  g.spill_capacity = power_of_two(p.top_k < g.priors ? p.top_k : g.priors);
  return g;
}

// The part of the workspace that belongs to one image. Nothing in it is initialised before the scan.
struct Workspace {
  uint64_t* keys;   // [slices * slice_priors]: slice s fills the front of its own part
  int32_t* counts;  // [slices]: candidates of each slice; -1 if a value in it is not finite
  Box* boxes;       // [spill_capacity], of the sorted candidates
  int32_t* kept;    // [spill_capacity]: which of them NMS keeps
  // used where there are more candidates than fit in shared memory
  uint64_t* sorted;  // [spill_capacity]
  uint32_t* alive;   // [spill_capacity / 32]
};

RF_FN size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

RF_FN size_t image_workspace_bytes(const Geometry& g) {
  return aligned(sizeof(uint64_t) * g.slices * g.slice_priors) + aligned(sizeof(int32_t) * g.slices) +
         (sizeof(Box) + sizeof(int32_t) + sizeof(uint64_t)) * g.spill_capacity + aligned(g.spill_capacity / 8);
}

RF_FN Workspace image_workspace(const Geometry& g, void* workspace, int32_t image) {
  char* at = static_cast<char*>(workspace) + image_workspace_bytes(g) * image;
  const auto take = [&at](size_t bytes) {
    char* const start = at;
    at += aligned(bytes);
    return static_cast<void*>(start);
  };
  Workspace w;
  w.keys = static_cast<uint64_t*>(take(sizeof(uint64_t) * g.slices * g.slice_priors));
  w.counts = static_cast<int32_t*>(take(sizeof(int32_t) * g.slices));
  w.boxes = static_cast<Box*>(take(sizeof(Box) * g.spill_capacity));
  w.kept = static_cast<int32_t*>(take(sizeof(int32_t) * g.spill_capacity));
  w.sorted = static_cast<uint64_t*>(take(sizeof(uint64_t) * g.spill_capacity));
  w.alive = static_cast<uint32_t*>(take(g.spill_capacity / 8));
  return w;
}

}  // namespace retinaface
