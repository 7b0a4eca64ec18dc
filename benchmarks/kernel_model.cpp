// What benchmarks/kernel_model.py needs of the host's kernels, compiled with the sources that it looks at.
#include <cstring>

#include "host_api.cpp"

namespace {

template <typename T>
size_t prepare_typed(const retinaface::DecodeParams& params, retinaface::HeadType type, const void* const* heads,
                     const retinaface::Outputs& outputs, void* workspace, void* problem) {
  using namespace retinaface;
  Problem<T> p{params, make_geometry(params, type), {}, outputs, workspace};
  for (int32_t level = 0; level < params.levels; ++level) p.heads[level] = static_cast<const T*>(heads[level]);
  LoopBlock<Forward> block{};
  ScanShared shared;
  for (int32_t slice = 0; slice < p.geometry.slices; ++slice) scan(block, p, 0, slice, shared);
  std::memcpy(problem, &p, sizeof p);
  return sizeof p;
}

}  // namespace

// Runs the scan of the one image; `problem` gets the parameters of the finish kernel. Returns their size in bytes.
RF_EXPORT size_t prepare(const retinaface::DecodeParams* params, int32_t head_type, const void* const* heads,
                         const retinaface::Outputs* outputs, void* workspace, void* problem) {
  const auto type = static_cast<retinaface::HeadType>(head_type);
  const auto call = type == retinaface::HeadType::kHalf ? prepare_typed<retinaface::Half> : prepare_typed<float>;
  return call(*params, type, heads, *outputs, workspace, problem);
}

RF_EXPORT size_t bytes_of_workspace(const retinaface::DecodeParams* params) {
  return retinaface::workspace_bytes(*params);
}
