// The letterbox kernel on the host, for callers that speak C: trt_runtime/kernels.py and the tests.
#include "block_host.h"
#include "letterbox.cuh"

#define RF_EXPORT extern "C" __attribute__((visibility("default")))

namespace retinaface {
namespace {

template <typename Order>
int32_t run(const LetterboxCall& call, Order order) {
  if (!is_possible(call)) return 1;
  typename LoopBlock<Order>::Warp warp{order};
  LetterboxShared shared;
  for (int32_t image = 0; image < call.batch; ++image) {
    for (int32_t y = 0; y < call.height; y += kTileRows) {
      for (int32_t x = 0; x < call.width; x += kTileColumns) letterbox_tile(warp, call, image, y, x, shared);
    }
  }
  return 0;
}

LetterboxCall call_of(const void* frames, int32_t batch, int32_t height, int32_t width, uint32_t pad_bgr, void* out) {
  return {static_cast<const LetterboxFrame*>(frames), batch, height, width, pad_bgr, static_cast<uint8_t*>(out)};
}

}  // namespace
}  // namespace retinaface

// 0, or 1 if the call is impossible. There is no stream.
RF_EXPORT int32_t retinaface_host_letterbox(const void* frames, int32_t batch, int32_t height, int32_t width,
                                            uint32_t pad_bgr, void* out, void*) {
  return retinaface::run(retinaface::call_of(frames, batch, height, width, pad_bgr, out), retinaface::Forward{});
}

// The same with the loops of a warp in another order, for tests: shuffled by the seed, or from behind where it is 0.
RF_EXPORT int32_t retinaface_host_letterbox_unordered(const void* frames, int32_t batch, int32_t height, int32_t width,
                                                      uint32_t pad_bgr, void* out, uint64_t seed) {
  const auto call = retinaface::call_of(frames, batch, height, width, pad_bgr, out);
  return seed ? retinaface::run(call, retinaface::Shuffled(seed)) : retinaface::run(call, retinaface::Reverse{});
}
