// Letterbox of a tile of the network's input, written once for the device and the host.
//
// A tile is 32 pixels by 4 rows, the work of one warp: 96 bytes a row, so what is written are whole aligned words.
// Tiles of padding, and those of frames that need no scaling and lie on 16 bytes, are written 16 bytes at a time.
//
// The arithmetic is that of cv2.resize with INTER_LINEAR on 8 bits: weights of 11 bits, the vertical pass on values
// without their lowest 4 bits. At exactly half the size, where cv2 averages, it gives the same.
#pragma once

#include "arithmetic.h"
#include "letterbox.h"

namespace retinaface {

constexpr int32_t kTileRows = 4;
constexpr int32_t kTileColumns = 32;
constexpr int32_t kTileWords = kTileColumns * 3 / 4;    // of 4 bytes, in a row
constexpr int32_t kTileChunks = kTileColumns * 3 / 16;  // of 16 bytes, in a row

constexpr int32_t kWeightBits = 11;
constexpr int32_t kOne = 1 << kWeightBits;

struct LetterboxShared {
  uint32_t pixels[kTileRows][kTileColumns];  // b | g << 8 | r << 16
};

struct alignas(16) Chunk {
  uint32_t words[4];
};

// Frames are read through the read-only cache.
#ifdef __CUDA_ARCH__
RF_FN int32_t load_byte(const uint8_t* from) { return __ldg(from); }
RF_FN Chunk load_chunk(const uint8_t* from) {
  const uint4 value = __ldg(reinterpret_cast<const uint4*>(from));
  return {value.x, value.y, value.z, value.w};
}
RF_FN void store_chunk(uint8_t* to, const Chunk& chunk) {
  *reinterpret_cast<uint4*>(to) = make_uint4(chunk.words[0], chunk.words[1], chunk.words[2], chunk.words[3]);
}
RF_FN void store_word(uint8_t* to, uint32_t word) { *reinterpret_cast<uint32_t*>(to) = word; }
#else
RF_FN int32_t load_byte(const uint8_t* from) { return *from; }
RF_FN Chunk load_chunk(const uint8_t* from) {
  Chunk chunk;
  std::memcpy(&chunk, from, sizeof chunk);
  return chunk;
}
RF_FN void store_chunk(uint8_t* to, const Chunk& chunk) { std::memcpy(to, &chunk, sizeof chunk); }
RF_FN void store_word(uint8_t* to, uint32_t word) { std::memcpy(to, &word, sizeof word); }
#endif

// The two pixels of an axis that make one of the output, and the weight of the second.
struct Tap {
  int32_t first, second, weight;
};

// How the pixels of one axis are scaled.
struct Axis {
  int32_t scaled, side;
  float inverse;  // 1 / (2 * scaled)
};

RF_FN Axis axis_of(int32_t scaled, int32_t side) { return {scaled, side, div(1.f, float(2 * scaled))}; }

// Pixel centres lie at halves, before and after scaling. The position is the quotient rounded to a float, as in cv2,
// because the weight may depend on it: a product and Markstein's correction, which spares a division each. The
// numerator itself may not fit in a float.
RF_FN Tap tap_of(int32_t at, const Axis& axis) {
  if (axis.scaled == axis.side) return {at, at, 0};
  const int32_t numerator = (2 * at + 1) * axis.side - axis.scaled;
  const float rounded = float(numerator);
  const float near = mul(rounded, axis.inverse);
  const float rest = add(fma(-near, float(2 * axis.scaled), rounded), float(numerator - int32_t(rounded)));
  const float position = fma(rest, axis.inverse, near);
  const int32_t before = position < 0.f ? -1 : int32_t(position);
  const float fraction = sub(position, float(before));
  const float shift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const int32_t weight = int32_t(sub(add(mul(fraction, float(kOne)), shift), shift));
  return {before < 0 ? 0 : before, before + 1 < axis.side ? before + 1 : axis.side - 1, weight};
}

struct Pixel {
  int32_t b, g, r;
};

struct BgrReader {
  const uint8_t* data;
  int64_t pitch;

  RF_FN Pixel operator()(int32_t y, int32_t x) const {
    const uint8_t* at = data + y * pitch + 3 * x;
    return {load_byte(at), load_byte(at + 1), load_byte(at + 2)};
  }
};

// From Y, U and V to B, G and R, in units of 2^-20.
struct Matrix {
  int32_t black;  // the luma that is black
  int32_t y, v_to_r, u_to_g, v_to_g, u_to_b;
};

RF_FN Matrix matrix_of(int32_t format) {
  switch (format) {
    case kNv12Bt601:  // of three decimals, as in cv2
      return {16, 1220542, 1673527, -409993, -852492, 2116026};
    case kNv12Bt601Full:
      return {0, 1048576, 1470104, -360853, -748826, 1858077};
    case kNv12Bt709:
      return {16, 1220945, 1879825, -223607, -558796, 2215014};
    default:  // kNv12Bt709Full
      return {0, 1048576, 1651297, -196424, -490864, 1945738};
  }
}

RF_FN int32_t to_byte(int32_t value) { return value < 0 ? 0 : value > 255 ? 255 : value; }

// Chroma is not interpolated, and luma below black is black: as in cv2.
struct Nv12Reader {
  const uint8_t* luma;
  const uint8_t* chroma;
  int64_t pitch, chroma_pitch;
  Matrix matrix;

  RF_FN Pixel operator()(int32_t y, int32_t x) const {
    const uint8_t* at = chroma + (y >> 1) * chroma_pitch + (x & ~1);
    const int32_t above = load_byte(luma + y * pitch + x) - matrix.black;
    const int32_t u = load_byte(at) - 128, v = load_byte(at + 1) - 128;
    const int32_t grey = (above < 0 ? 0 : above) * matrix.y + (1 << 19);
    return {to_byte((grey + matrix.u_to_b * u) >> 20), to_byte((grey + matrix.u_to_g * u + matrix.v_to_g * v) >> 20),
            to_byte((grey + matrix.v_to_r * v) >> 20)};
  }
};

RF_FN int32_t across(int32_t first, int32_t second, int32_t weight) {
  return (first * (kOne - weight) + second * weight) >> 4;
}

RF_FN int32_t down(int32_t first, int32_t second, int32_t weight) {
  return ((first * (kOne - weight) >> 16) + (second * weight >> 16) + 2) >> 2;
}

RF_FN uint32_t packed(const Pixel& pixel) {
  return uint32_t(pixel.b) | uint32_t(pixel.g) << 8 | uint32_t(pixel.r) << 16;
}

template <typename Reader>
RF_FN uint32_t sample(const Reader& read, const Tap& y, const Tap& x) {
  if ((y.weight | x.weight) == 0) return packed(read(y.first, x.first));
  const Pixel a = read(y.first, x.first), b = read(y.first, x.second);
  const Pixel c = read(y.second, x.first), d = read(y.second, x.second);
  return packed({down(across(a.b, b.b, x.weight), across(c.b, d.b, x.weight), y.weight),
                 down(across(a.g, b.g, x.weight), across(c.g, d.g, x.weight), y.weight),
                 down(across(a.r, b.r, x.weight), across(c.r, d.r, x.weight), y.weight)});
}

// The last 4 - phase bytes, of 3, of one pixel and as many as then fit of the next: three words hold four pixels.
RF_FN uint32_t word_of(uint32_t pixel, uint32_t next, int32_t phase) {
  return pixel >> 8 * phase | next << (24 - 8 * phase);
}

template <typename Warp, typename Reader>
RF_BODY void sample_tile(Warp& warp, const Reader& read, const LetterboxFrame& frame, int32_t first_y, int32_t first_x,
                         uint32_t pad, LetterboxShared& shared) {
  const Axis axis_y = axis_of(frame.scaled_height, frame.height), axis_x = axis_of(frame.scaled_width, frame.width);
  warp.each(kTileColumns, [&](int32_t column) {
    const int32_t x = first_x + column;
    const Tap tap_x = tap_of(x, axis_x);
    for (int32_t row = 0; row < kTileRows; ++row) {
      const int32_t y = first_y + row;
      const bool inside = y < frame.scaled_height && x < frame.scaled_width;
      shared.pixels[row][column] = inside ? sample(read, tap_of(y, axis_y), tap_x) : pad;
    }
  });
}

// Writes rows first_y .. and columns first_x .. of one image. Called by a whole warp.
template <typename Warp>
RF_BODY void letterbox_tile(Warp& warp, const LetterboxCall& call, int32_t image, int32_t first_y, int32_t first_x,
                            LetterboxShared& shared) {
  const LetterboxFrame frame = call.frames[image];
  const int64_t out_pitch = int64_t(call.width) * 3;
  uint8_t* const out = call.out + (int64_t(image) * call.height + first_y) * out_pitch + first_x * 3;
  const int32_t rows = call.height - first_y < kTileRows ? call.height - first_y : kTileRows;
  const auto* const data = static_cast<const uint8_t*>(frame.data);

  if (first_y >= frame.scaled_height || first_x >= frame.scaled_width) {
    const uint32_t pad = call.pad_bgr;
    warp.each(rows * kTileChunks, [&](int32_t i) {
      Chunk chunk;
      const int32_t column = i % kTileChunks;
      for (int32_t word = 0; word < 4; ++word) chunk.words[word] = word_of(pad, pad, (4 * column + word) % 3);
      store_chunk(out + i / kTileChunks * out_pitch + 16 * column, chunk);
    });
    return;
  }

  const bool whole = first_y + rows <= frame.scaled_height && first_x + kTileColumns <= frame.scaled_width;
  const bool same_size = frame.scaled_height == frame.height && frame.scaled_width == frame.width;
  if (frame.format == kBgr && same_size && whole && (reinterpret_cast<uintptr_t>(data) | frame.pitch) % 16 == 0) {
    const uint8_t* const from = data + first_y * frame.pitch + first_x * 3;
    warp.each(rows * kTileChunks, [&](int32_t i) {
      const int32_t row = i / kTileChunks, column = 16 * (i % kTileChunks);
      store_chunk(out + row * out_pitch + column, load_chunk(from + row * frame.pitch + column));
    });
    return;
  }

  if (frame.format == kBgr) {
    sample_tile(warp, BgrReader{data, frame.pitch}, frame, first_y, first_x, call.pad_bgr, shared);
  } else {
    const Nv12Reader read{data, static_cast<const uint8_t*>(frame.chroma), frame.pitch, frame.chroma_pitch,
                          matrix_of(frame.format)};
    sample_tile(warp, read, frame, first_y, first_x, call.pad_bgr, shared);
  }
  warp.sync();
  warp.each(rows * kTileWords, [&](int32_t i) {
    const int32_t row = i / kTileWords, word = i % kTileWords, pixel = word + word / 3;
    const uint32_t* const pixels = shared.pixels[row];
    store_word(out + row * out_pitch + 4 * word, word_of(pixels[pixel], pixels[pixel + 1], word % 3));
  });
}

}  // namespace retinaface
