// The launcher for callers that speak C: tests, benchmarks, ctypes.
#include "decode_nms.h"

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
