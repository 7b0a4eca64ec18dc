// A thread block as the kernels see it, on the device. block_host.h has the same interface on the host.
#pragma once

#include <cstdint>

namespace retinaface {

constexpr int32_t kWarp = 32;

// The threads of one warp. Every call is made by all of them.
struct DeviceWarp {
  // f(i) for i in [0, n), in any order
  template <typename F>
  __device__ __forceinline__ void each(int32_t n, F&& f) {
    for (int32_t i = threadIdx.x % kWarp; i < n; i += kWarp) f(i);
  }
  // the 32 bits f(0) .. f(31), for all of the warp; nothing that is written before need be seen after
  template <typename F>
  __device__ __forceinline__ uint32_t word(F&& f) {
    return __ballot_sync(0xffffffffu, f(int32_t(threadIdx.x % kWarp)));
  }
  // what was written before is seen after, by the warp
  __device__ __forceinline__ void sync() { __syncwarp(); }
};

// The threads of one block; its size is a multiple of the warp's. Every call is made by all of them.
struct DeviceBlock {
  // A value for each of up to `size` items, as many as the block has threads at most, kept across a sync: each in the
  // registers of the thread that has item i as lane i % 32 of warp i / 32 in each_own_warp. No other thread can see it.
  template <typename T>
  struct Own {
    __device__ __forceinline__ explicit Own(int32_t) {}
    __device__ __forceinline__ T& operator[](int32_t) { return value; }
    T value;
  };

  // f(i) for i in [0, n), in any order
  template <typename F>
  __device__ __forceinline__ void each(int32_t n, F&& f) {
    for (int32_t i = threadIdx.x; i < n; i += blockDim.x) f(i);
  }
  // f(warp, i) for i in [0, n): each i by one whole warp
  template <typename F>
  __device__ __forceinline__ void each_warp(int32_t n, F&& f) {
    DeviceWarp warp;
    for (int32_t i = threadIdx.x / kWarp; i < n; i += blockDim.x / kWarp) f(warp, i);
  }
  // f(warp, i) for i in [0, n): each i by one whole warp, the same one in every call; n is that of the warps at most
  template <typename F>
  __device__ __forceinline__ void each_own_warp(int32_t n, F&& f) {
    DeviceWarp warp;
    const int32_t i = threadIdx.x / kWarp;
    if (i < n) f(warp, i);
  }
  // words[i] = the 32 bits f(i, 0) .. f(i, 31), for i in [first, last); f may read words[i]
  template <typename F>
  __device__ __forceinline__ void each_word(int32_t first, int32_t last, uint32_t* words, F&& f) {
    const int32_t lane = threadIdx.x % kWarp;
    for (int32_t i = first + int32_t(threadIdx.x / kWarp); i < last; i += blockDim.x / kWarp) {
      const uint32_t word = __ballot_sync(0xffffffffu, f(i, lane));
      __syncwarp();
      if (lane == 0) words[i] = word;
    }
  }
  // f() once
  template <typename F>
  __device__ __forceinline__ void one(F&& f) {
    if (threadIdx.x == 0) f();
  }
  // what was written before is seen after, by the block
  __device__ __forceinline__ void sync() { __syncthreads(); }

  __device__ __forceinline__ int32_t fetch_add(int32_t* counter, int32_t value) { return atomicAdd(counter, value); }
  __device__ __forceinline__ void raise(int32_t* flag) { atomicOr(flag, 1); }
};

}  // namespace retinaface
