// The letterbox kernel on the device, and its launch.
#include "block_device.cuh"
#include "letterbox.cuh"

namespace retinaface {
namespace {

constexpr int32_t kBlockTiles = 4;  // one above the other, a warp each

__global__ void __launch_bounds__(kBlockTiles* kWarp) letterbox_kernel(const __grid_constant__ LetterboxCall call) {
  __shared__ LetterboxShared shared[kBlockTiles];
  const int32_t tile = int32_t(threadIdx.x) / kWarp;
  const int32_t first_y = (int32_t(blockIdx.y) * kBlockTiles + tile) * kTileRows;
  if (first_y >= call.height) return;
  DeviceWarp warp;
  letterbox_tile(warp, call, int32_t(blockIdx.z), first_y, int32_t(blockIdx.x) * kTileColumns, shared[tile]);
}

}  // namespace

int32_t letterbox(const LetterboxCall& call, CUstream_st* stream) {
  if (!is_possible(call)) return cudaErrorInvalidValue;
  if (reinterpret_cast<uintptr_t>(call.frames) % 8 || reinterpret_cast<uintptr_t>(call.out) % 16) {
    return cudaErrorMisalignedAddress;
  }
  const int32_t block_rows = kBlockTiles * kTileRows;
  const dim3 blocks(call.width / kTileColumns, (call.height + block_rows - 1) / block_rows, call.batch);
  letterbox_kernel<<<blocks, kBlockTiles * kWarp, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace retinaface
