// Arithmetic that gives the same bits on the device and on the host.
//
// Neither side may fuse a * b + c on its own: the device uses the _rn intrinsics, which the compiler never contracts,
// and the host is compiled with -ffp-contract=off. Where a fused operation is wanted it is written fma().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define RF_FN __host__ __device__ __forceinline__
#define RF_BODY __device__ __forceinline__  // calls a Block, which is there on the device only
#define RF_UNROLL_4 _Pragma("unroll 4")     // four loads in flight
#else
#define RF_FN inline
#define RF_BODY inline
#define RF_UNROLL_4
#endif

namespace retinaface {

#ifdef __CUDA_ARCH__
RF_FN float add(float a, float b) { return __fadd_rn(a, b); }
RF_FN float sub(float a, float b) { return __fsub_rn(a, b); }
RF_FN float mul(float a, float b) { return __fmul_rn(a, b); }
RF_FN float div(float a, float b) { return __fdiv_rn(a, b); }
RF_FN float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
RF_FN uint32_t bits_of(float x) { return __float_as_uint(x); }
RF_FN float float_of(uint32_t bits) { return __uint_as_float(bits); }
#else
RF_FN float add(float a, float b) { return a + b; }
RF_FN float sub(float a, float b) { return a - b; }
RF_FN float mul(float a, float b) { return a * b; }
RF_FN float div(float a, float b) { return a / b; }
RF_FN float fma(float a, float b, float c) { return std::fmaf(a, b, c); }
RF_FN uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
RF_FN float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
#endif

// The lower and the upper of two numbers; of a number and a NaN either, and of zeros either: nothing may hang on these.
#ifdef __CUDA_ARCH__
RF_FN float lower(float a, float b) { return fminf(a, b); }
RF_FN float upper(float a, float b) { return fmaxf(a, b); }
#else
RF_FN float lower(float a, float b) { return b < a ? b : a; }
RF_FN float upper(float a, float b) { return b > a ? b : a; }
#endif
// relu keeps a NaN, as numpy does: the area of a box that overflowed is NaN, so it overlaps nothing.
RF_FN float relu(float a) { return a < 0.f ? 0.f : a; }

// One NaN for all: machines differ in the bits they give to it.
RF_FN float one_nan(float x) { return x == x ? x : float_of(0x7fc00000u); }

// Number of bits set, and index of the lowest one.
#ifdef __CUDA_ARCH__
RF_FN int32_t bit_count(uint32_t bits) { return __popc(bits); }
RF_FN int32_t lowest_bit(uint32_t bits) { return __ffs(int32_t(bits)) - 1; }
#else
RF_FN int32_t bit_count(uint32_t bits) { return __builtin_popcount(bits); }
RF_FN int32_t lowest_bit(uint32_t bits) { return __builtin_ctz(bits); }
#endif

struct Half {
  uint16_t bits;
};

RF_FN float to_float(float x) { return x; }

RF_FN float to_float(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t exponent = x.bits >> 10 & 31u;
  const uint32_t fraction = x.bits & 0x3ffu;
  if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  const float value = float(fraction) * 0x1p-24f;  // subnormal in fp16, exact in fp32
  return sign ? -value : value;
#endif
}

// exp(x) to 1.1 ulp, by Cody and Waite's reduction x = k ln 2 + r and a polynomial in r; infinity above 88.72, 0 below
// -104. Like the true one it never falls while x rises: seen on all floats from 1e-6 in magnitude to both ends.
RF_FN float exponential(float x) {
  if (x > 88.72284f) return float_of(0x7f800000u);
  if (x < -104.f) return 0.f;
  const float shift = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const float k = sub(add(mul(x, 1.44269504f), shift), shift);
  float r = fma(k, -0.693145752f, x);
  r = fma(k, -1.42860677e-6f, r);
  float q = 1.98412698e-4f;
  q = fma(q, r, 1.38888889e-3f);
  q = fma(q, r, 8.33333333e-3f);
  q = fma(q, r, 4.16666667e-2f);
  q = fma(q, r, 1.66666667e-1f);
  q = fma(q, r, 0.5f);
  const float p = add(1.f, fma(mul(r, r), q, r));
  // 2^k in two factors: the first never leaves the normal range, the second may round into the subnormal one
  const int32_t whole = int32_t(k);
  const int32_t half = whole / 2;
  return mul(mul(p, float_of(uint32_t(half + 127) << 23)), float_of(uint32_t(whole - half + 127) << 23));
}

// 1 / (1 + exp(-x)), 0 below -88.72; never falls while x rises, so that what is sorted by x is sorted by it.
RF_FN float sigmoid(float x) { return div(1.f, add(1.f, exponential(-x))); }

// Maps floats to integers of the same order; NaN does not occur. -0 must have been removed.
RF_FN uint32_t orderable(float x) {
  const uint32_t bits = bits_of(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

RF_FN float from_orderable(uint32_t value) { return float_of(value >> 31 ? value & 0x7fffffffu : ~value); }

}  // namespace retinaface
