// The kernels on the device, and their launch.
#include "block_device.cuh"
#include "decode_nms.cuh"

namespace retinaface {
namespace {

// The problem is passed in constant memory: every thread reads the same of it.
template <typename T>
__global__ void __launch_bounds__(kScanThreads) scan_kernel(const __grid_constant__ Problem<T> problem) {
  __shared__ ScanShared shared;
  DeviceBlock block;
  scan(block, problem, int32_t(blockIdx.y), int32_t(blockIdx.x), shared);
}

template <typename T>
__global__ void __launch_bounds__(kFinishThreads, 1) finish_kernel(const __grid_constant__ Problem<T> problem) {
  __shared__ FinishShared shared;
  DeviceBlock block;
  finish(block, problem, int32_t(blockIdx.x), shared, kSharedKeys);
}

template <typename T>
cudaError_t load_typed() {
  cudaFuncAttributes attributes;
  if (const cudaError_t error = cudaFuncGetAttributes(&attributes, scan_kernel<T>)) return error;
  return cudaFuncGetAttributes(&attributes, finish_kernel<T>);
}

template <typename T>
cudaError_t launch_typed(const DecodeParams& params, const Geometry& geometry, const void* const* heads,
                         const Outputs& outputs, void* workspace, cudaStream_t stream) {
  Problem<T> problem{params, geometry, {}, outputs, workspace};
  for (int32_t level = 0; level < params.levels; ++level) problem.heads[level] = static_cast<const T*>(heads[level]);
  scan_kernel<T><<<dim3(geometry.slices, params.batch), kScanThreads, 0, stream>>>(problem);
  if (const cudaError_t error = cudaGetLastError()) return error;
  finish_kernel<T><<<params.batch, kFinishThreads, 0, stream>>>(problem);
  return cudaGetLastError();
}

}  // namespace

int32_t load(HeadType type) {
  const cudaError_t error = type == HeadType::kHalf ? load_typed<Half>() : load_typed<float>();
  if (error) cudaGetLastError();  // told here, and not again by the next launch
  return error;
}

int32_t launch(const DecodeParams& params, HeadType type, const void* const* heads, const Outputs& outputs,
               void* workspace, CUstream_st* stream) {
  if (check(params) || (type != HeadType::kFloat && type != HeadType::kHalf)) return cudaErrorInvalidValue;
  const void* const small[] = {outputs.num_detections, outputs.scores, outputs.landmarks, outputs.num_candidates};
  const void* const large[] = {workspace, outputs.boxes};
  const auto misplaced = [](const void* address, uintptr_t alignment) {
    return !address                                           ? cudaErrorInvalidValue
           : reinterpret_cast<uintptr_t>(address) % alignment ? cudaErrorMisalignedAddress
                                                              : cudaSuccess;
  };
  for (const void* address : small) {
    if (const cudaError_t error = misplaced(address, 4)) return error;
  }
  for (const void* address : large) {
    if (const cudaError_t error = misplaced(address, 16)) return error;
  }
  for (int32_t level = 0; level < params.levels; ++level) {
    if (const cudaError_t error = misplaced(heads[level], 16)) return error;
  }
  const Geometry geometry = make_geometry(params, type);
  return type == HeadType::kHalf ? launch_typed<Half>(params, geometry, heads, outputs, workspace, stream)
                                 : launch_typed<float>(params, geometry, heads, outputs, workspace, stream);
}

}  // namespace retinaface
