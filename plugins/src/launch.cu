// The kernels on the device, and their launch.
#include <atomic>

#include "block_device.cuh"
#include "decode_nms.cuh"

namespace retinaface {
namespace {

constexpr int32_t kMaxDevices = 64;

// The problem is passed in constant memory: every thread reads the same of it.
template <typename T>
__global__ void __launch_bounds__(kScanThreads) scan_kernel(const __grid_constant__ Problem<T> problem) {
  __shared__ ScanShared shared;
  DeviceBlock block;
  scan(block, problem, int32_t(blockIdx.y), int32_t(blockIdx.x), shared);
}

template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const __grid_constant__ Problem<T> problem, const int32_t capacity) {
  extern __shared__ __align__(16) char shared[];
  DeviceBlock block;
  finish(block, problem, int32_t(blockIdx.x), *reinterpret_cast<FinishShared*>(shared),
         shared + aligned(sizeof(FinishShared)), capacity);
}

// Candidates that fit in the shared memory of the current device; found out, and allowed, once per device.
cudaError_t shared_capacity(int32_t* capacity) {
  static std::atomic<int32_t> known[kMaxDevices];
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  if ((*capacity = known[device].load())) return cudaSuccess;
  int limit = 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
    return error;
  }
  int32_t found = kMinCapacity;
  while (shared_bytes(found * 2) <= size_t(limit)) found *= 2;
  const auto bytes = int(shared_bytes(found));
  for (const void* kernel : {reinterpret_cast<const void*>(finish_kernel<float>),
                             reinterpret_cast<const void*>(finish_kernel<Half>)}) {
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) {
      return error;
    }
  }
  known[device].store(found);
  *capacity = found;
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_typed(const DecodeParams& params, const Geometry& geometry, const void* const* heads,
                         const Outputs& outputs, void* workspace, cudaStream_t stream) {
  int32_t capacity = 0;
  if (const cudaError_t error = shared_capacity(&capacity)) return error;
  if (capacity > geometry.spill_capacity) capacity = geometry.spill_capacity;
  Problem<T> problem{params, geometry, {}, outputs, workspace};
  for (int32_t level = 0; level < params.levels; ++level) problem.heads[level] = static_cast<const T*>(heads[level]);
  scan_kernel<T><<<dim3(geometry.slices, params.batch), kScanThreads, 0, stream>>>(problem);
  if (const cudaError_t error = cudaGetLastError()) return error;
  finish_kernel<T><<<params.batch, kFinishThreads, shared_bytes(capacity), stream>>>(problem, capacity);
  return cudaGetLastError();
}

}  // namespace

int32_t launch(const DecodeParams& params, HeadType type, const void* const* heads, const Outputs& outputs,
               void* workspace, CUstream_st* stream) {
  if (check(params)) return cudaErrorInvalidValue;
  uintptr_t addresses = reinterpret_cast<uintptr_t>(workspace) | reinterpret_cast<uintptr_t>(outputs.boxes);
  for (int32_t level = 0; level < params.levels; ++level) addresses |= reinterpret_cast<uintptr_t>(heads[level]);
  if (addresses % 16) return cudaErrorMisalignedAddress;
  const Geometry geometry = make_geometry(params, type);
  return type == HeadType::kHalf ? launch_typed<Half>(params, geometry, heads, outputs, workspace, stream)
                                 : launch_typed<float>(params, geometry, heads, outputs, workspace, stream);
}

}  // namespace retinaface
