// The code that is compiled for the device only, on the host: its intrinsics are stand-ins, and count the 16-byte
// accesses that are not aligned, which a GPU refuses. A library with the functions of the host library.
#include <cmath>
#include <cstdint>
#include <cstring>

static int64_t misaligned = 0;
static int64_t aligned = 0;

static void note(const void* address) { ++(reinterpret_cast<uintptr_t>(address) % 16 ? misaligned : aligned); }

struct uint4 {
  uint32_t x, y, z, w;
  uint4() = default;
  uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) : x(x), y(y), z(z), w(w) {}
  uint4(const uint4&) = default;
  uint4& operator=(const uint4& other) {
    note(this);
    std::memcpy(static_cast<void*>(this), &other, sizeof other);
    return *this;
  }
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline uint8_t __ldg(const uint8_t* at) { return *at; }
inline uint4 __ldg(const uint4* at) {
  note(at);
  return *at;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int __popc(uint32_t bits) {
  int count = 0;
  for (; bits; bits &= bits - 1) ++count;
  return count;
}
inline int __ffs(int bits) {
  for (int i = 0; i < 32; ++i) {
    if (uint32_t(bits) >> i & 1u) return i + 1;
  }
  return 0;
}
struct half_stand_in {
  uint16_t bits;
};
inline half_stand_in __ushort_as_half(uint16_t bits) { return {bits}; }
inline float __half2float(half_stand_in half) {
  const int exponent = half.bits >> 10 & 31, fraction = half.bits & 1023;
  const float size = exponent == 31  ? fraction ? NAN : INFINITY
                     : exponent == 0 ? std::ldexp(float(fraction), -24)
                                     : std::ldexp(float(1024 + fraction), exponent - 25);
  return half.bits >> 15 ? -size : size;
}

#define __CUDA_ARCH__ 860
#include "check.cpp"
#include "host_api.cpp"
#undef RF_EXPORT
#include "letterbox_host.cpp"

// How many 16-byte accesses there were since the last call: aligned ones, and others.
extern "C" __attribute__((visibility("default"))) void counted(int64_t* both) {
  both[0] = aligned;
  both[1] = misaligned;
  aligned = misaligned = 0;
}
