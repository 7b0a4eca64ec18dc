// Decode + NMS of one image, written once for the device and the host.
//
// scan    many blocks an image: reads every head value once, to see that it is finite, lists the candidates over the
//         threshold as sortable keys, and clears the output rows.
// finish  one block an image: the best top_k, sorted; boxes; greedy NMS; the rows of what is kept.
//
// Every slice of a scan writes to its own part of the workspace, so nothing has to be cleared beforehand and nothing is
// counted across blocks. Keys are unique and sorted, so it does not matter in which order they are appended.
// No value lives in a register across a sync, except what all threads agree on, and what a Block keeps in its Own.
#pragma once

#include "arithmetic.h"
#include "geometry.h"

namespace retinaface {

// What a kernel is given. Level l of image b begins at heads[l] + b * 16 * per_cell * cells.
template <typename T>
struct Problem {
  DecodeParams params;
  Geometry geometry;
  const T* heads[kMaxLevels];
  Outputs out;
  void* workspace;
};

struct ScanShared {
  int32_t count;
  int32_t broken;
};

// Up to kFinishThreads candidates, whose keys need a quarter of the room: first the boxes and areas of all of them;
// then, from the front, the keys, boxes and areas of the kept ones.
struct FewShared {
  uint64_t keys[kFinishThreads];  // the front of FinishShared::keys
  Box boxes[kFinishThreads];
  float areas[kFinishThreads];
  int32_t kept[kFinishThreads / kTile];  // how many are kept of each tile and those before it
};

struct FinishShared {
  union {
    uint64_t keys[kSharedKeys];
    FewShared few;
  };
  uint32_t alive[kSharedKeys / kTile];  // a bit for each sorted candidate that is not suppressed
  int32_t slice_count[kMaxSlices];
  int32_t slice_base[kMaxSlices];
  int32_t histogram[256];
  Box tile_boxes[kTile];  // over kFinishThreads candidates
  float tile_areas[kTile];
  uint32_t overlaps[kTile];  // of each box of the tile: the later boxes of the tile it overlaps too much
  uint64_t prefix;           // of the key that is the last to enter NMS
  int32_t needed;            // keys wanted among those that share the prefix
  int32_t exact;             // the prefix alone tells which keys are wanted
  int32_t candidates;
  int32_t broken;
  int32_t appended;
  int32_t kept;
  uint32_t tile_kept;  // the boxes of the tile that are kept, a bit each
};
static_assert(sizeof(FinishShared) <= 48 * 1024, "more shared memory than every GPU gives without being asked");

// Where a prior lies.
struct Place {
  int32_t level, cell, member;
};

// Of a prior by its number in a level.
RF_FN Place place_in(const DecodeParams& p, int32_t level, int32_t local) {
  const int32_t cell = p.per_cell == 2 ? local >> 1 : local / p.per_cell;  // spares a division in the usual case
  return {level, cell, local - cell * p.per_cell};
}

// Of a prior by its number in the image.
RF_FN Place place_of(const DecodeParams& p, const Geometry& g, int32_t prior) {
  int32_t level = 0;
  while (level + 1 < p.levels && prior >= g.first_prior[level + 1]) ++level;
  return place_in(p, level, prior - g.first_prior[level]);
}

// The value of a channel at a place.
template <typename T>
RF_BODY float head_value(const Problem<T>& p, int32_t image, const Place& at, int32_t channel) {
  const int64_t cells = int64_t(p.params.grid_h[at.level]) * p.params.grid_w[at.level];
  const int32_t channels = 16 * p.params.per_cell;
  const int64_t within = p.params.channels_last ? int64_t(at.cell) * channels + channel : channel * cells + at.cell;
  return to_float(p.heads[at.level][image * channels * cells + within]);
}

// Centre and size of a prior in pixels; exact, as in facespec.make_priors.
struct Prior {
  float cx, cy, size;
};

RF_FN Prior prior_at(const DecodeParams& p, const Place& at) {
  const float stride = float(p.strides[at.level]);
  const int32_t row = at.cell / p.grid_w[at.level];
  const int32_t column = at.cell - row * p.grid_w[at.level];
  return {mul(add(float(column), 0.5f), stride), mul(add(float(row), 0.5f), stride), p.min_sizes[at.level][at.member]};
}

// The box coding of SSD (Liu et al., ECCV 2016, equation 2) with variances: facespec.decode_boxes.
template <typename T>
RF_BODY Box box_at(const Problem<T>& p, int32_t image, const Place& at) {
  const Prior prior = prior_at(p.params, at);
  const int32_t channel = 2 * p.params.per_cell + 4 * at.member;
  const float cx = add(prior.cx, mul(mul(head_value(p, image, at, channel), p.params.variances[0]), prior.size));
  const float cy = add(prior.cy, mul(mul(head_value(p, image, at, channel + 1), p.params.variances[0]), prior.size));
  const float w = mul(prior.size, exponential(mul(head_value(p, image, at, channel + 2), p.params.variances[1])));
  const float h = mul(prior.size, exponential(mul(head_value(p, image, at, channel + 3), p.params.variances[1])));
  const float x1 = sub(cx, mul(w, 0.5f));
  const float y1 = sub(cy, mul(h, 0.5f));
  // where a size overflows, infinity less infinity is NaN; it overlaps nothing, and the runtime reports it
  return {one_nan(x1), one_nan(y1), one_nan(add(x1, w)), one_nan(add(y1, h))};
}

// NaN where the box has a NaN, or infinity less infinity for a side.
RF_FN float area_of(const Box& box) { return mul(relu(sub(box.x2, box.x1)), relu(sub(box.y2, box.y1))); }

// Whether the IoU of two boxes is greater than the threshold, without a division: facespec.nms. A box whose area is NaN
// overlaps none, whatever lower() and upper() make of its coordinates.
RF_FN bool overlap(const Box& a, float area_a, const Box& b, float area_b, float threshold) {
  const float w = upper(0.f, sub(lower(a.x2, b.x2), upper(a.x1, b.x1)));
  const float h = sub(lower(a.y2, b.y2), upper(a.y1, b.y1));  // below 0 it makes `both` 0 or less, as w does
  const float both = mul(w, h);
  return both > mul(threshold, sub(add(area_a, area_b), both));
}

// A key sorts by score, then by the lower prior index. No key is 0.
RF_FN uint64_t make_key(float difference, int32_t prior) {
  return uint64_t(orderable(difference)) << 32 | uint32_t(~prior);
}
RF_FN int32_t prior_of(uint64_t key) { return int32_t(~uint32_t(key)); }
RF_FN float difference_of(uint64_t key) { return from_orderable(uint32_t(key >> 32)); }

struct alignas(16) Vector {
  uint32_t words[4];
};

// The i-th 16 bytes; on the device they are aligned.
RF_FN Vector load_vector(const char* data, int32_t i) {
#ifdef __CUDA_ARCH__
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(data) + i);
  return {{v.x, v.y, v.z, v.w}};
#else
  typedef uint32_t __attribute__((may_alias, aligned(1))) Word;  // word by word: compilers then take four at once
  const Word* const words = reinterpret_cast<const Word*>(data + 16 * int64_t(i));
  return {{words[0], words[1], words[2], words[3]}};
#endif
}

// Sets a sign bit of `seen`, of the word or of its half, where an exponent in v is all ones, infinity or NaN: adding
// one to that carries.
RF_FN void note_non_finite(Vector& seen, const Vector& v, float) {
  for (int32_t i = 0; i < 4; ++i) seen.words[i] |= (v.words[i] & 0x7f800000u) + 0x00800000u;
}
RF_FN void note_non_finite(Vector& seen, const Vector& v, Half) {
  for (int32_t i = 0; i < 4; ++i) seen.words[i] |= (v.words[i] & 0x7c007c00u) + 0x04000400u;
}
RF_FN bool has_non_finite(const Vector& seen, float) {
  return (seen.words[0] | seen.words[1] | seen.words[2] | seen.words[3]) & 0x80000000u;
}
RF_FN bool has_non_finite(const Vector& seen, Half) {
  return (seen.words[0] | seen.words[1] | seen.words[2] | seen.words[3]) & 0x80008000u;
}

RF_FN int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T, typename Block>
RF_BODY void scan(Block& block, const Problem<T>& p, int32_t image, int32_t slice, ScanShared& s) {
  const DecodeParams& params = p.params;
  const Geometry& g = p.geometry;
  const Workspace w = image_workspace(g, p.workspace, image);

  block.one([&] {
    s.count = 0;
    s.broken = 0;
  });
  block.sync();

  Vector seen{};
  for (int32_t level = 0; level < params.levels; ++level) {
    // the vectors of this slice that lie in this level
    const int64_t size = g.first_vector[level + 1] - g.first_vector[level];
    const int64_t from = slice * g.slice_vectors - g.first_vector[level];
    const int64_t first = from > 0 ? from : 0;
    const int64_t last = least(from + g.slice_vectors, size);
    if (first >= last) continue;
    const char* data = reinterpret_cast<const char*>(p.heads[level]) + 16 * (int64_t(image) * size + first);
    block.each(int32_t(last - first), [&](int32_t i) { note_non_finite(seen, load_vector(data, i), T{}); });
  }
  if (has_non_finite(seen, T{})) block.raise(&s.broken);

  uint64_t* const keys = w.keys + int64_t(slice) * g.slice_priors;
  for (int32_t level = 0; level < params.levels; ++level) {
    // the priors of this slice that lie in this level
    const int64_t from = int64_t(slice) * g.slice_priors - g.first_prior[level];
    const int32_t first = int32_t(from > 0 ? from : 0);
    const int32_t size = g.first_prior[level + 1] - g.first_prior[level];
    const int32_t last = int32_t(least(from + g.slice_priors, size));
    if (first >= last) continue;
    block.each(last - first, [&](int32_t i) {
      const Place at = place_in(params, level, first + i);
      const float background = head_value(p, image, at, 2 * at.member);
      const float face = head_value(p, image, at, 2 * at.member + 1);
      const float difference = add(sub(face, background), 0.f);  // + 0 turns -0 into +0
      if (difference >= params.logit_threshold) {
        keys[block.fetch_add(&s.count, 1)] = make_key(difference, g.first_prior[level] + first + i);
      }
    });
  }

  // the rows of all images are shared out among the slices; finish overwrites those it needs
  const int32_t rows = (params.max_detections + g.slices - 1) / g.slices;
  const int32_t first_row = int32_t(least(int64_t(slice) * rows, params.max_detections));
  const int32_t row_count = int32_t(least(rows, params.max_detections - first_row));
  const int64_t row = int64_t(image) * params.max_detections + first_row;
  block.each(row_count, [&](int32_t i) { p.out.scores[row + i] = 0.f; });
  block.each(4 * row_count, [&](int32_t i) { p.out.boxes[4 * row + i] = 0.f; });
  block.each(10 * row_count, [&](int32_t i) { p.out.landmarks[10 * row + i] = 0.f; });
  block.sync();
  block.one([&] { w.counts[slice] = s.broken ? -1 : s.count; });
}

// Find, by radix, the prefix of the top_k-th greatest key: s.prefix is then a lower bound of exactly top_k keys.
template <typename Block>
RF_BODY void select(Block& block, const Geometry& g, const Workspace& w, int32_t top_k, FinishShared& s) {
  block.one([&] {
    s.prefix = 0;
    s.needed = top_k;
  });
  for (int32_t shift = 56; shift >= 0; shift -= 8) {
    block.each(256, [&](int32_t i) { s.histogram[i] = 0; });
    block.sync();
    block.each_warp(g.slices, [&](auto& warp, int32_t slice) {
      const uint64_t* const keys = w.keys + int64_t(slice) * g.slice_priors;
      warp.each(s.slice_count[slice], [&](int32_t i) {
        // the digits before this one; a shift by 64 is not defined
        const bool same = shift == 56 || keys[i] >> (shift + 8) == s.prefix >> (shift + 8);
        if (same) block.fetch_add(&s.histogram[keys[i] >> shift & 255], 1);
      });
    });
    block.sync();
    block.one([&] {
      int32_t digit = 255;
      for (; s.histogram[digit] < s.needed; --digit) s.needed -= s.histogram[digit];
      s.prefix |= uint64_t(digit) << shift;
      s.exact = s.histogram[digit] == s.needed;
    });
    block.sync();
    if (s.exact) break;
  }
}

// Put pair i of a bitonic stage into descending order (or ascending, where bit `run` of the index says so).
RF_FN void compare_exchange(uint64_t* keys, int32_t i, int32_t stride, int32_t run) {
  const int32_t low = 2 * i - (i & (stride - 1));
  const int32_t high = low + stride;
  const uint64_t a = keys[low], b = keys[high];
  if ((a < b) == ((low & run) == 0)) {
    keys[low] = b;
    keys[high] = a;
  }
}

// Sort `count` keys, a power of two of at least 64, the greatest first. Pairs up to 32 apart stay within 64 keys, which
// one warp takes through all its stages without a barrier of the block. Source: Batcher, Sorting networks and their
// applications, AFIPS 1968.
template <typename Block>
RF_BODY void sort(Block& block, uint64_t* keys, int32_t count) {
  block.each_warp(count / 64, [&](auto& warp, int32_t chunk) {
    for (int32_t run = 2; run <= 64; run *= 2) {
      for (int32_t stride = run / 2; stride > 0; stride /= 2) {
        warp.each(32, [&](int32_t i) { compare_exchange(keys, 32 * chunk + i, stride, run); });
        warp.sync();
      }
    }
  });
  block.sync();
  for (int32_t run = 128; run <= count; run *= 2) {
    for (int32_t stride = run / 2; stride >= 64; stride /= 2) {
      block.each(count / 2, [&](int32_t i) { compare_exchange(keys, i, stride, run); });
      block.sync();
    }
    block.each_warp(count / 64, [&](auto& warp, int32_t chunk) {
      for (int32_t stride = 32; stride > 0; stride /= 2) {
        warp.each(32, [&](int32_t i) { compare_exchange(keys, 32 * chunk + i, stride, run); });
        warp.sync();
      }
    });
    block.sync();
  }
}

// What a thread keeps of its candidate.
struct Candidate {
  Box box;
  float area;
  uint32_t earlier;  // the boxes of its tile that come before it and that it overlaps too much, a bit each
  uint64_t key;
  int32_t alive;
};

// Greedy NMS of `count` sorted candidates, one for each thread at most, with one barrier for each tile of 32: the warp
// of a tile finds who of it is kept, and the candidates behind it are measured against these in the next turn. The
// keys, boxes and areas of the kept ones end at the front of `s.few`, best first; their number is returned.
template <typename T, typename Block>
RF_BODY int32_t suppress_few(Block& block, const Problem<T>& p, int32_t image, int32_t count, FinishShared& s) {
  const float threshold = p.params.iou_threshold;
  const int32_t most = p.params.max_detections;
  const int32_t tiles = (count + kTile - 1) / kTile;
  typename Block::template Own<Candidate> own(kFinishThreads);
  block.each_own_warp(tiles, [&](auto& warp, int32_t tile) {
    const int32_t first = tile * kTile;
    warp.each(kTile, [&](int32_t lane) {
      const int32_t i = first + lane;
      Candidate& mine = own[i];
      mine.alive = i < count;
      mine.key = s.keys[i];
      mine.box = mine.alive ? box_at(p, image, place_of(p.params, p.geometry, prior_of(mine.key))) : Box{};
      s.few.areas[i] = mine.area = area_of(mine.box);
      s.few.boxes[i] = mine.box;
    });
    warp.sync();
    const int32_t others = int32_t(least(kTile, count - first)) - 1;
    warp.each(kTile, [&](int32_t lane) {
      Candidate& mine = own[first + lane];
      uint32_t found = 0;
      RF_UNROLL_4 for (int32_t i = first + others; i-- > first;) {
        found = 2 * found + overlap(s.few.boxes[i], s.few.areas[i], mine.box, mine.area, threshold);
      }
      mine.earlier = found & ((1u << lane) - 1u);
    });
    warp.sync();
  });

  int32_t before = 0, kept = 0;  // those of the tile before this one are [before, kept)
  for (int32_t tile = 0; tile < tiles && kept < most; ++tile) {
    block.each_own_warp(tiles, [&](auto& warp, int32_t its) {
      if (its < tile) return;
      warp.each(kTile, [&](int32_t lane) {
        Candidate& mine = own[its * kTile + lane];
        if (!mine.alive) return;
        bool too_much = false;
        RF_UNROLL_4 for (int32_t i = before; i < kept; ++i) {
          too_much |= overlap(s.few.boxes[i], s.few.areas[i], mine.box, mine.area, threshold);
        }
        mine.alive = !too_much;
      });
      if (its > tile) return;
      // in each round those are kept that overlap none before them that is still open, and what they overlap goes
      uint32_t open = warp.word([&](int32_t lane) { return own[tile * kTile + lane].alive; });
      uint32_t chosen = 0;
      while (open) {
        const uint32_t sure =
            open & warp.word([&](int32_t lane) { return !(own[tile * kTile + lane].earlier & open); });
        chosen |= sure;
        open &= ~(sure | warp.word([&](int32_t lane) { return bool(own[tile * kTile + lane].earlier & sure); }));
      }
      warp.each(kTile, [&](int32_t lane) {
        const Candidate& mine = own[tile * kTile + lane];
        const int32_t at = kept + bit_count(chosen & ((1u << lane) - 1u));
        if (lane == 0) s.few.kept[tile] = int32_t(least(kept + bit_count(chosen), most));
        if ((chosen >> lane & 1u) == 0) return;
        s.keys[at] = mine.key;
        s.few.boxes[at] = mine.box;
        s.few.areas[at] = mine.area;
      });
    });
    block.sync();
    before = kept;
    kept = s.few.kept[tile];
  }
  return kept;
}

// The same for any number of sorted boxes, four barriers for each tile that has any left: its boxes, the overlaps
// within it, who of it is kept, and what these suppress behind it. w.kept lists the positions of the kept boxes; their
// number is returned.
template <typename Block>
RF_BODY int32_t suppress_many(Block& block, const DecodeParams& p, int32_t count, const Workspace& w, uint32_t* alive,
                              FinishShared& s) {
  const int32_t words = (count + kTile - 1) / kTile;
  for (int32_t tile = 0; tile < words; ++tile) {
    const uint32_t members = alive[tile];
    const int32_t before = s.kept;
    if (!members) continue;
    block.each(kTile, [&](int32_t i) {
      if (!(members >> i & 1u)) return;
      const Box box = w.boxes[tile * kTile + i];
      s.tile_boxes[i] = box;
      s.tile_areas[i] = area_of(box);
    });
    block.sync();
    const auto too_much = [&](int32_t better, const Box& box, float area) {
      return overlap(s.tile_boxes[better], s.tile_areas[better], box, area, p.iou_threshold);
    };
    block.each_word(0, kTile, s.overlaps, [&](int32_t row, int32_t column) {
      return column > row && (members >> row & members >> column & 1u) &&
             too_much(row, s.tile_boxes[column], s.tile_areas[column]);
    });
    block.sync();
    block.one([&] {
      uint32_t kept = 0;
      int32_t room = p.max_detections - before;
      for (uint32_t rest = members; rest && room > 0; --room) {
        const int32_t best = lowest_bit(rest);
        kept |= 1u << best;
        rest &= ~(s.overlaps[best] | 1u << best);
      }
      s.tile_kept = kept;
      s.kept = p.max_detections - room;
    });
    block.sync();
    const uint32_t kept = s.tile_kept;
    block.each(kTile, [&](int32_t i) {
      if (kept >> i & 1u) w.kept[before + bit_count(kept & ((1u << i) - 1u))] = tile * kTile + i;
    });
    if (s.kept < p.max_detections) {
      block.each_word(tile + 1, words, alive, [&](int32_t word, int32_t bit) {
        if (!(alive[word] >> bit & 1u)) return false;
        const Box box = w.boxes[word * kTile + bit];
        const float area = area_of(box);
        for (uint32_t rest = kept; rest; rest &= rest - 1u) {
          if (too_much(lowest_bit(rest), box, area)) return false;
        }
        return true;
      });
    }
    block.sync();
    if (s.kept == p.max_detections) break;
  }
  return s.kept;
}

// The rows of the `kept` faces, from the keys and the boxes of each.
template <typename T, typename Block, typename KeyOf, typename BoxOf>
RF_BODY void write_rows(Block& block, const Problem<T>& p, int32_t image, int32_t kept, KeyOf&& key_of,
                        BoxOf&& box_of) {
  const DecodeParams& params = p.params;
  const int64_t row = int64_t(image) * params.max_detections;
  block.one([&] { p.out.num_detections[image] = kept; });
  block.each(kept, [&](int32_t i) {
    p.out.scores[row + i] = sigmoid(difference_of(key_of(i)));
    reinterpret_cast<Box*>(p.out.boxes)[row + i] = box_of(i);
  });
  block.each(5 * kept, [&](int32_t i) {
    const int32_t face = i / 5, point = i % 5;
    const Place at = place_of(params, p.geometry, prior_of(key_of(face)));
    const Prior prior = prior_at(params, at);
    const int32_t channel = 6 * params.per_cell + 10 * at.member + 2 * point;
    float* const xy = p.out.landmarks + 10 * (row + face) + 2 * point;
    xy[0] = add(prior.cx, mul(mul(head_value(p, image, at, channel), params.variances[0]), prior.size));
    xy[1] = add(prior.cy, mul(mul(head_value(p, image, at, channel + 1), params.variances[0]), prior.size));
  });
}

// The `count` best of `candidates`, sorted, through NMS. kShared: `padded` keys fit in shared memory; a parameter of
// the template, so that the compiler knows in which memory they lie.
template <bool kShared, typename T, typename Block>
RF_BODY void finish_sorted(Block& block, const Problem<T>& p, int32_t image, int32_t candidates, int32_t count,
                           int32_t padded, FinishShared& s) {
  const Geometry& g = p.geometry;
  const Workspace w = image_workspace(g, p.workspace, image);
  uint64_t* const keys = kShared ? s.keys : w.sorted;
  uint32_t* const alive = kShared ? s.alive : w.alive;

  if (candidates == count) {  // all enter
    const int32_t step = 1 << g.slice_threads_log2;
    block.each(g.slices * step,
               [&](int32_t thread) {  // first, where each key lies: so all of them are on their way at once
                 const int32_t slice = thread >> g.slice_threads_log2;
                 const int32_t size = s.slice_count[slice], base = s.slice_base[slice];
                 for (int32_t i = thread & (step - 1); i < size; i += step) keys[base + i] = slice * g.slice_priors + i;
               });
    block.sync();
    block.each(count, [&](int32_t i) { keys[i] = w.keys[keys[i]]; });
  } else {
    select(block, g, w, count, s);
    block.each_warp(g.slices, [&](auto& warp, int32_t slice) {
      const uint64_t* const from = w.keys + int64_t(slice) * g.slice_priors;
      warp.each(s.slice_count[slice], [&](int32_t i) {
        if (from[i] >= s.prefix) keys[block.fetch_add(&s.appended, 1)] = from[i];
      });
    });
  }
  block.each(padded - count, [&](int32_t i) { keys[count + i] = 0; });
  block.sync();
  sort(block, keys, padded);

  if (kShared && padded <= kFinishThreads) {
    const int32_t kept = suppress_few(block, p, image, count, s);
    write_rows(block, p, image, kept, [&](int32_t i) { return s.keys[i]; }, [&](int32_t i) { return s.few.boxes[i]; });
    return;
  }
  block.each(count, [&](int32_t i) { w.boxes[i] = box_at(p, image, place_of(p.params, g, prior_of(keys[i]))); });
  block.each((count + kTile - 1) / kTile, [&](int32_t i) {
    const int32_t members = count - i * kTile;
    alive[i] = members >= kTile ? 0xffffffffu : (1u << members) - 1u;
  });
  block.sync();
  const int32_t kept = suppress_many(block, p.params, count, w, alive, s);
  write_rows(
      block, p, image, kept, [&](int32_t i) { return keys[w.kept[i]]; }, [&](int32_t i) { return w.boxes[w.kept[i]]; });
}

// `capacity`: candidates kept in shared memory, a power of two from 64 to kSharedKeys.
template <typename T, typename Block>
RF_BODY void finish(Block& block, const Problem<T>& p, int32_t image, FinishShared& s, int32_t capacity) {
  const Geometry& g = p.geometry;
  const Workspace w = image_workspace(g, p.workspace, image);

  block.one([&] { s.candidates = s.broken = s.appended = s.kept = 0; });
  block.sync();
  block.each(g.slices, [&](int32_t slice) {
    const int32_t count = w.counts[slice];
    s.slice_count[slice] = count;
    if (count < 0) {
      block.raise(&s.broken);
    } else {
      s.slice_base[slice] = block.fetch_add(&s.candidates, count);
    }
  });
  block.sync();

  const bool broken = s.broken;
  const int32_t candidates = broken ? 0 : s.candidates;
  const int32_t count = int32_t(least(candidates, p.params.top_k));
  block.one([&] { p.out.num_candidates[image] = broken ? -1 : candidates; });
  if (count == 0) {
    block.one([&] { p.out.num_detections[image] = 0; });
    return;
  }
  int32_t padded = kMinCapacity;
  while (padded < count) padded *= 2;
  if (padded <= capacity) {
    finish_sorted<true>(block, p, image, candidates, count, padded, s);
  } else {
    finish_sorted<false>(block, p, image, candidates, count, padded, s);
  }
}

}  // namespace retinaface
