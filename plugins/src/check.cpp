#include "decode_nms.h"
#include "geometry.h"

namespace retinaface {

const char* check(const DecodeParams& p) {
  const auto positive = [](float x) { return x > 0.f && x < 1e30f; };
  if (p.batch < 1 || p.batch > 65535) return "batch must be in 1..65535";
  if (p.levels < 1 || p.levels > kMaxLevels) return "there must be 1 to 4 levels";
  if (p.per_cell < 1 || p.per_cell > kMaxPerCell) return "a cell must have 1 to 4 priors";
  int64_t priors = 0;
  for (int32_t level = 0; level < p.levels; ++level) {
    if (p.strides[level] < 1 || p.strides[level] > 1024) return "strides must be in 1..1024";
    if (p.grid_h[level] < 1 || p.grid_h[level] > 65536 || p.grid_w[level] < 1 || p.grid_w[level] > 65536) {
      return "a head map must have 1 to 65536 rows and columns";
    }
    priors += int64_t(p.grid_h[level]) * p.grid_w[level] * p.per_cell;
    for (int32_t i = 0; i < p.per_cell; ++i) {
      if (!positive(p.min_sizes[level][i])) return "min_sizes must be positive";
    }
  }
  if (priors > 1 << 26) return "more than 67,108,864 priors in an image";
  if (!positive(p.variances[0]) || !positive(p.variances[1])) return "variances must be positive";
  if (!(p.logit_threshold > -1e30f && p.logit_threshold < 1e30f)) return "logit_threshold must be finite";
  if (!(p.iou_threshold > 0.f && p.iou_threshold < 1.f)) return "iou_threshold must lie between 0 and 1";
  if (p.top_k < 1 || p.top_k > 1000000) return "top_k must be in 1..1000000";
  if (p.max_detections < 1 || p.max_detections > 1000000) return "max_detections must be in 1..1000000";
  return nullptr;
}

size_t workspace_bytes(const DecodeParams& params) {
  return image_workspace_bytes(make_geometry(params, HeadType::kFloat)) * params.batch;
}

}  // namespace retinaface
