// The kernels played by real threads under ThreadSanitizer, on cases that reach every barrier of decode_nms.cuh.
//
//   tsan_main [LINE]   leaves out the barrier in that line of decode_nms.cuh
//
// The last line of what it prints names the lines whose barriers threads have waited at.
// Exit code 0: every case equals the forward order. 1: one does not. 66: ThreadSanitizer found a race.
#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace {

std::atomic<bool> waited[4096];

int wait_noting(pthread_barrier_t* barrier, int line) {
  waited[line].store(true, std::memory_order_relaxed);  // it orders nothing
  return pthread_barrier_wait(barrier);
}

}  // namespace

#define pthread_barrier_wait(barrier) wait_noting(barrier, line)  // `line` is the argument of Barrier::wait
#include "host_api.cpp"

namespace {

using retinaface::DecodeParams;

constexpr int32_t kBatch = 3;
constexpr int32_t kGrid = 14;  // 196 cells, 392 priors: two slices
constexpr int32_t kPriors = 2 * kGrid * kGrid;
constexpr int32_t kThreads = 8, kWarpSize = 4;

enum class Scores { kFew, kSpread, kTied };

struct Case {
  const char* name;
  Scores scores;
  bool covered;  // the best box of a quarter suppresses the rest of it
  int32_t top_k, max_detections, capacity;
};

// 392 candidates; 56 where kFew, which are two tiles, one for each warp, as on the device. Selection takes one digit of
// the key where scores are spread, and all eight where they are tied.
constexpr Case kCases[] = {
    {"few", Scores::kFew, false, 500, 100, 64},
    {"all, in shared memory, many tiles", Scores::kSpread, true, 500, 300, 512},
    {"all, spilled", Scores::kSpread, false, 500, 300, 64},
    {"cut", Scores::kSpread, true, 300, 300, 512},
    {"cut among ties, spilled, few wanted", Scores::kTied, false, 150, 40, 128},
};

// Head maps of one level, planar: background, face of both priors, boxes, landmarks. The last image but one is broken.
std::vector<float> make_heads(const Case& c) {
  constexpr int32_t cells = kGrid * kGrid;
  std::mt19937 random(7);
  const auto uniform = [&] { return float(random() % 4096) / 4096.f; };
  std::vector<float> heads(size_t(kBatch) * 32 * cells);
  for (int32_t image = 0; image < kBatch; ++image) {
    float* const map = heads.data() + size_t(image) * 32 * cells;
    for (int32_t i = 4 * cells; i < 32 * cells; ++i) map[i] = uniform() - 0.5f;
    for (int32_t prior = 0; prior < kPriors; ++prior) {
      const int32_t cell = prior / 2, member = prior % 2;
      float* const face = map + (2 * member + 1) * cells + cell;
      if (c.scores == Scores::kFew) *face = prior % 7 ? -1.f : 1.f + uniform();
      if (c.scores == Scores::kSpread) *face = 0.1f + 8 * uniform();
      if (c.scores == Scores::kTied) *face = 1.f;
      if (c.covered && prior % 3 == 0) {  // boxes as wide as half of the image
        map[(4 + 4 * member + 2) * cells + cell] = map[(4 + 4 * member + 3) * cells + cell] = 7.f;
      }
    }
  }
  heads[size_t(kBatch - 2) * 32 * cells + 20 * cells + 100] = std::numeric_limits<float>::infinity();
  return heads;
}

DecodeParams make_params(const Case& c) {
  DecodeParams p{};
  p.batch = kBatch;
  p.levels = 1;
  p.per_cell = 2;
  p.strides[0] = 8;
  p.grid_h[0] = p.grid_w[0] = kGrid;
  p.min_sizes[0][0] = 12;
  p.min_sizes[0][1] = 20;
  p.variances[0] = 0.1f;
  p.variances[1] = 0.2f;
  p.logit_threshold = 0.f;
  p.iou_threshold = 0.3f;
  p.top_k = c.top_k;
  p.max_detections = c.max_detections;
  return p;
}

// The outputs of a case, one after another. The workspace and the outputs hold rubbish before.
template <typename Run>
std::vector<float> outputs_of(const Case& c, const std::vector<float>& heads, Run&& run) {
  const DecodeParams params = make_params(c);
  const retinaface::Geometry geometry = make_geometry(params, retinaface::HeadType::kFloat);
  const size_t k = size_t(kBatch) * c.max_detections;
  std::vector<retinaface::Box> storage((2 * kBatch + 15 * k) / 4 +
                                       4);  // for the alignment of its boxes, which come first
  std::memset(storage.data(), 0xa5, storage.size() * sizeof storage[0]);
  float* const all = &storage[0].x1;
  const retinaface::Outputs outputs{reinterpret_cast<int32_t*>(all + 15 * k), all, all + 4 * k, all + 5 * k,
                                    reinterpret_cast<int32_t*>(all + 15 * k + kBatch)};
  std::vector<retinaface::Box> workspace(workspace_bytes(params) / sizeof(retinaface::Box) + 1);
  std::memset(workspace.data(), 0xa5, workspace.size() * sizeof workspace[0]);
  const retinaface::Problem<float> problem{params, geometry, {heads.data()}, outputs, workspace.data()};
  run(problem);
  return std::vector<float>(all, all + 15 * k + 2 * kBatch);
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return !std::memcmp(a.data(), b.data(), a.size() * sizeof(float));
}

}  // namespace

int main(int argc, char** argv) {
  const int32_t skipped_line = argc > 1 ? std::atoi(argv[1]) : 0;
  for (const Case& c : kCases) {
    const std::vector<float> heads = make_heads(c);
    const std::vector<float> expected = outputs_of(c, heads, [&](const auto& problem) {
      retinaface::LoopBlock<retinaface::Forward> block{};
      retinaface::run_blocks(block, problem, c.capacity);
    });
    const std::vector<float> actual = outputs_of(c, heads, [&](const auto& problem) {
      retinaface::run_threads(problem, c.capacity, {retinaface::kThreads, kThreads, kWarpSize, skipped_line, 0});
    });
    int32_t found[2 * kBatch];
    std::memcpy(found, expected.data() + expected.size() - 2 * kBatch, sizeof found);
    std::printf("%s: kept %d %d %d of %d %d %d\n", c.name, found[0], found[1], found[2], found[3], found[4], found[5]);
    if (!same(actual, expected)) {
      std::printf("%s: threads and the forward order differ\n", c.name);
      return 1;
    }
  }
  std::printf("barriers");
  for (int32_t line = 0; line < 4096; ++line) {
    if (waited[line]) std::printf(" %d", line);
  }
  std::printf("\n");
  return 0;
}
