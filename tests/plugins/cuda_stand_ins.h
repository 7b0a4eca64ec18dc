// Stand-ins for what nvcc and a GPU bring: intrinsics, and kernels whose blocks run one after the other, each thread of
// theirs a thread of the host. They count the 16-byte accesses that are not aligned, which a GPU refuses.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __CUDA_ARCH__ 860
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

inline std::atomic<int64_t> misaligned{0}, aligned{0};

inline void note(const void* address) { ++(reinterpret_cast<uintptr_t>(address) % 16 ? misaligned : aligned); }

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

// What a launch is made of.
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 0, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

constexpr int kLanes = 32;
struct WarpStandIn {
  pthread_barrier_t barrier;
  bool votes[kLanes];
};
inline pthread_barrier_t block_barrier;
inline std::vector<WarpStandIn> warps;

inline void __syncthreads() { pthread_barrier_wait(&block_barrier); }
inline void __syncwarp() { pthread_barrier_wait(&warps[threadIdx.x / kLanes].barrier); }
inline uint32_t __ballot_sync(uint32_t, bool vote) {
  WarpStandIn& warp = warps[threadIdx.x / kLanes];
  warp.votes[threadIdx.x % kLanes] = vote;
  __syncwarp();
  uint32_t word = 0;
  for (int i = 0; i < kLanes; ++i) word |= uint32_t(warp.votes[i]) << i;
  __syncwarp();
  return word;
}
inline int32_t atomicAdd(int32_t* at, int32_t value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline int32_t atomicOr(int32_t* at, int32_t value) { return __atomic_fetch_or(at, value, __ATOMIC_RELAXED); }

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMisalignedAddress = 716 };
struct cudaFuncAttributes {};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

// kernel<<<grid, block, 0, stream>>>(argument)
template <typename Kernel, typename Argument>
void simulate(Kernel* kernel, dim3 grid, dim3 block, const Argument& argument) {
  gridDim = grid;
  blockDim = block;
  pthread_barrier_init(&block_barrier, nullptr, block.x);
  warps = std::vector<WarpStandIn>((block.x + kLanes - 1) / kLanes);
  for (WarpStandIn& warp : warps) pthread_barrier_init(&warp.barrier, nullptr, kLanes);
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 256 * 1024);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        std::vector<pthread_t> threads(block.x);
        std::vector<std::function<void()>> work(block.x);
        for (unsigned i = 0; i < block.x; ++i) {
          work[i] = [&, i] {
            threadIdx = dim3(i);
            blockIdx = dim3(x, y, z);
            kernel(argument);
          };
          const auto run = [](void* function) -> void* {
            (*static_cast<std::function<void()>*>(function))();
            return nullptr;
          };
          if (pthread_create(&threads[i], &attributes, run, &work[i])) std::abort();
        }
        for (const pthread_t thread : threads) pthread_join(thread, nullptr);
      }
    }
  }
  pthread_attr_destroy(&attributes);
}
