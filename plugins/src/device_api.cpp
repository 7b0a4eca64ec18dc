// The launchers for callers that speak C: tests, benchmarks, ctypes.
#include "decode_nms.h"
#include "letterbox.h"

#define RF_EXPORT extern "C" __attribute__((visibility("default")))

RF_EXPORT const char* retinaface_check(const retinaface::DecodeParams* params) { return retinaface::check(*params); }

RF_EXPORT size_t retinaface_workspace_bytes(const retinaface::DecodeParams* params) {
  return retinaface::workspace_bytes(*params);
}

RF_EXPORT int32_t retinaface_launch(const retinaface::DecodeParams* params, int32_t head_type, const void* const* heads,
                                    const retinaface::Outputs* outputs, void* workspace, void* stream) {
  return retinaface::launch(*params, static_cast<retinaface::HeadType>(head_type), heads, *outputs, workspace,
                            static_cast<CUstream_st*>(stream));
}

RF_EXPORT int32_t retinaface_letterbox(const void* frames, int32_t batch, int32_t height, int32_t width,
                                       uint32_t pad_bgr, void* out, void* stream) {
  return retinaface::letterbox({static_cast<const retinaface::LetterboxFrame*>(frames), batch, height, width, pad_bgr,
                                static_cast<uint8_t*>(out)},
                               static_cast<CUstream_st*>(stream));
}
