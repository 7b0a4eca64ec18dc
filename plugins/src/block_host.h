// A thread block as the kernels see it, on the host: loops in a chosen order, or real threads. See block_device.cuh.
//
// The order of a loop must not matter, and neither must the interleaving of threads: tests run every order, and the
// threads under ThreadSanitizer, which reports a barrier that is missing.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

namespace retinaface {

// Orders of a loop: order(n, f) calls f(i) for every i in [0, n).
struct Forward {
  template <typename F>
  void operator()(int32_t n, F&& f) const {
    for (int32_t i = 0; i < n; ++i) f(i);
  }
};

struct Reverse {
  template <typename F>
  void operator()(int32_t n, F&& f) const {
    for (int32_t i = n; i-- > 0;) f(i);
  }
};

struct Shuffled {
  explicit Shuffled(uint64_t seed) : random(seed) {}
  template <typename F>
  void operator()(int32_t n, F&& f) {
    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    for (const int32_t i : order) f(i);
  }
  std::mt19937_64 random;
};

// A value for each of `size` items, rubbish at first.
template <typename T>
struct OwnArray {
  explicit OwnArray(int32_t size) : values(size) {
    std::memset(static_cast<void*>(values.data()), 0xa5, size * sizeof(T));
  }
  T& operator[](int32_t i) { return values[i]; }
  std::vector<T> values;
};

// One host thread plays the whole block; a barrier has nothing to do.
template <typename Order>
struct LoopBlock {
  template <typename T>
  using Own = OwnArray<T>;

  struct Warp {
    template <typename F>
    void each(int32_t n, F&& f) {
      order(n, f);
    }
    template <typename F>
    uint32_t word(F&& f) {
      uint32_t word = 0;
      order(32, [&](int32_t lane) { word |= uint32_t(f(lane)) << lane; });
      return word;
    }
    void sync() {}
    Order& order;
  };

  template <typename F>
  void each(int32_t n, F&& f) {
    order(n, f);
  }
  template <typename F>
  void each_warp(int32_t n, F&& f) {
    Warp warp{order};
    order(n, [&](int32_t i) { f(warp, i); });
  }
  template <typename F>
  void each_own_warp(int32_t n, F&& f) {
    each_warp(n, f);
  }
  template <typename F>
  void each_word(int32_t first, int32_t last, uint32_t* words, F&& f) {
    order(std::max(last - first, 0), [&](int32_t i) {
      uint32_t word = 0;
      for (int32_t lane = 0; lane < 32; ++lane) word |= uint32_t(f(first + i, lane)) << lane;
      words[first + i] = word;
    });
  }
  template <typename F>
  void one(F&& f) {
    f();
  }
  void sync() {}
  int32_t fetch_add(int32_t* counter, int32_t value) {
    const int32_t before = *counter;
    *counter += value;
    return before;
  }
  void raise(int32_t* flag) { *flag = 1; }

  Order order;
};

// A barrier that a test may leave out, by the line it stands in, to see that it is needed.
struct Barrier {
  Barrier(int32_t threads, int32_t skipped_line) : skipped_line(skipped_line), threads(threads) {
    for (pthread_barrier_t& barrier : barriers) pthread_barrier_init(&barrier, nullptr, threads);
  }
  ~Barrier() {
    for (pthread_barrier_t& barrier : barriers) pthread_barrier_destroy(&barrier);
  }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void wait(int32_t line) {
    if (line == skipped_line) return;
    for (pthread_barrier_t& barrier : barriers) pthread_barrier_wait(&barrier);
  }
  // The bits of all threads, of which each brings others. It orders no other memory, as a ballot of the device does
  // not: ThreadSanitizer does not see it.
  __attribute__((no_sanitize("thread"))) uint32_t gather(uint32_t bits) {
    const uint64_t round = __atomic_fetch_add(&gathered, 1, __ATOMIC_SEQ_CST) / threads;
    uint64_t* const sum = &sums[round % 3];  // of the bits, and above them of the threads
    uint64_t value = __atomic_add_fetch(sum, uint64_t(1) << 32 | bits, __ATOMIC_SEQ_CST);
    if (int32_t(value >> 32) == threads) __atomic_store_n(&sums[(round + 2) % 3], 0, __ATOMIC_SEQ_CST);
    for (; int32_t(value >> 32) < threads; value = __atomic_load_n(sum, __ATOMIC_SEQ_CST)) sched_yield();
    return uint32_t(value);
  }
  // two: ThreadSanitizer lets a thread that leaves a barrier late see what others did before they entered it again
  pthread_barrier_t barriers[2];
  const int32_t skipped_line;
  const int32_t threads;
  uint64_t gathered = 0;
  uint64_t sums[3] = {};
};

// One of several host threads that play the block together; `warp_size` of them make a warp.
struct ThreadBlock {
  template <typename T>
  using Own = OwnArray<T>;  // of this thread, which uses its own items alone

  struct Warp {
    template <typename F>
    void each(int32_t n, F&& f) {
      for (int32_t i = lane; i < n; i += size) f(i);
    }
    template <typename F>
    uint32_t word(F&& f) {
      uint32_t mine = 0;
      for (int32_t i = lane; i < 32; i += size) mine |= uint32_t(f(i)) << i;
      return barrier.gather(mine);
    }
    void sync(int32_t line = __builtin_LINE()) { barrier.wait(line); }
    int32_t lane, size;
    Barrier& barrier;
  };

  template <typename F>
  void each(int32_t n, F&& f) {
    for (int32_t i = rank; i < n; i += threads) f(i);
  }
  template <typename F>
  void each_warp(int32_t n, F&& f) {
    Warp warp{rank % warp_size, warp_size, warp_barrier};
    for (int32_t i = rank / warp_size; i < n; i += threads / warp_size) f(warp, i);
  }
  template <typename F>
  void each_own_warp(int32_t n, F&& f) {
    each_warp(n, f);
  }
  template <typename F>
  void each_word(int32_t first, int32_t last, uint32_t* words, F&& f) {
    for (int32_t i = first + rank; i < last; i += threads) {
      uint32_t word = 0;
      for (int32_t lane = 0; lane < 32; ++lane) word |= uint32_t(f(i, lane)) << lane;
      words[i] = word;
    }
  }
  template <typename F>
  void one(F&& f) {
    if (rank == 0) f();
  }
  void sync(int32_t line = __builtin_LINE()) { barrier.wait(line); }
  int32_t fetch_add(int32_t* counter, int32_t value) { return __atomic_fetch_add(counter, value, __ATOMIC_RELAXED); }
  void raise(int32_t* flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }

  int32_t rank, threads, warp_size;
  Barrier& barrier;
  Barrier& warp_barrier;
};

}  // namespace retinaface
