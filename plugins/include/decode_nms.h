// Decode + NMS of RetinaFace head maps: parameters, workspace and launcher. Needs neither TensorRT nor a framework.
//
// Input, for each pyramid level: [batch, 16 * per_cell, grid_h, grid_w], fp32 or fp16, in this or in channels-last
// order in memory, with the channels
//   class  (background, face) per prior of the cell, box (dx, dy, dw, dh) per prior, landmarks (5 x (dx, dy)) per
//   prior.
// Output: see Outputs. Rows past num_detections are zero. Order is by the logit difference face - background, ties by
// the lower prior index; the same input gives the same bits on every run and on every device, and on the host.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace retinaface {

constexpr int32_t kMaxLevels = 4;
constexpr int32_t kMaxPerCell = 4;

enum class HeadType : int32_t { kFloat = 0, kHalf = 1 };

// What a call computes. Plain data, passed by value; ctypes mirrors it in trt_runtime/kernels.py.
struct DecodeParams {
  int32_t batch;
  int32_t levels;                            // 1 .. kMaxLevels
  int32_t per_cell;                          // priors in a cell, 1 .. kMaxPerCell
  int32_t channels_last;                     // 1 if the maps are [batch, grid_h, grid_w, 16 * per_cell] in memory
  int32_t strides[kMaxLevels];               // pixels
  int32_t grid_h[kMaxLevels];                // rows of the head map
  int32_t grid_w[kMaxLevels];                // columns of the head map
  float min_sizes[kMaxLevels][kMaxPerCell];  // side of each prior, pixels
  float variances[2];                        // of centres and landmarks, of sizes
  float logit_threshold;                     // log(p / (1 - p)) of the lowest score that is kept
  float iou_threshold;                       // a box that overlaps a better one more than this is dropped
  int32_t top_k;                             // candidates that enter NMS
  int32_t max_detections;                    // K
};

// Boxes are x1, y1, x2, y2, landmarks x, y, all in pixels of the network input.
struct Outputs {
  int32_t* num_detections;  // [batch]
  float* boxes;             // [batch, K, 4]
  float* scores;            // [batch, K]
  float* landmarks;         // [batch, K, 5, 2]
  int32_t* num_candidates;  // [batch]: priors over the threshold before top_k; -1 if a head value is not finite
};

// nullptr, or what is wrong with the parameters.
const char* check(const DecodeParams& params);

// Bytes of device memory a launch needs; need not be initialised, and nothing in it outlives the launch.
size_t workspace_bytes(const DecodeParams& params);

// Loads the kernels on the current device, as the first launch would. Returns a cudaError_t.
int32_t load(HeadType type);

// Two kernels on the stream; allocates nothing, never synchronises, may be captured in a graph once the kernels are
// loaded. Heads, boxes and workspace must be 16-byte aligned. Returns a cudaError_t.
int32_t launch(const DecodeParams& params, HeadType type, const void* const* heads, const Outputs& outputs,
               void* workspace, CUstream_st* stream);

}  // namespace retinaface
