// Letterbox on the GPU: frames of any size become the network's input. Needs neither TensorRT nor a framework.
//
// A frame is scaled by bilinear interpolation, lies in the top-left corner and is padded on the right and at the
// bottom: what facespec.letterbox does with cv2.resize, in the same fixed-point arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace retinaface {

constexpr int32_t kMaxFrameSide = 16384;  // pixels; up to here a float holds a position to 1/1024 of a pixel

// BGR is 8-bit, three bytes a pixel. NV12 is a luma plane, and a plane of half its size of interleaved U and V.
enum PixelFormat : int32_t { kBgr = 0, kNv12Bt601 = 1, kNv12Bt601Full = 2, kNv12Bt709 = 3, kNv12Bt709Full = 4 };

// Where a frame lies and what becomes of it. The kernel reads these from memory, so that a captured launch can be
// replayed on other frames. Plain data; ctypes mirrors it in trt_runtime/kernels.py, which also validates it. One of
// zeros is a batch slot without a frame: all padding.
struct LetterboxFrame {
  const void* data;             // BGR, or Y; no alignment is asked for, 16 bytes make a copy faster
  const void* chroma;           // UV of NV12
  int64_t pitch, chroma_pitch;  // bytes from row to row
  int32_t height, width;        // of the frame, 1 .. kMaxFrameSide; even for NV12
  int32_t scaled_height;        // of what it is scaled to, 1 .. kMaxFrameSide;
  int32_t scaled_width;         // what does not fit into the network's input is cut off
  int32_t format;               // PixelFormat
  int32_t reserved[3];
};
static_assert(sizeof(LetterboxFrame) == 64 && offsetof(LetterboxFrame, pitch) == 16 &&
                  offsetof(LetterboxFrame, height) == 32 && offsetof(LetterboxFrame, format) == 48,
              "trt_runtime/kernels.py has another layout");

// A call, whatever the frames are.
struct LetterboxCall {
  const LetterboxFrame* frames;  // [batch]
  int32_t batch;                 // 1 .. 65535
  int32_t height, width;         // of the network's input, up to kMaxFrameSide; the width a multiple of 32
  uint32_t pad_bgr;              // b | g << 8 | r << 16
  uint8_t* out;                  // [batch, height, width, 3], BGR
};

inline bool is_possible(const LetterboxCall& call) {
  return call.frames && call.out && call.batch >= 1 && call.batch <= 65535 && call.height >= 1 &&
         call.height <= kMaxFrameSide && call.width >= 1 && call.width <= kMaxFrameSide && call.width % 32 == 0;
}

// One kernel on the stream; allocates nothing, never synchronises, may be captured in a graph once it has run. frames
// must be 8-byte aligned and out 16-byte aligned, both in device memory. Returns a cudaError_t.
int32_t letterbox(const LetterboxCall& call, CUstream_st* stream);

}  // namespace retinaface
