// The kernels on the host, for callers that speak C: trt_runtime/kernels.py and the tests.
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "block_host.h"
#include "decode_nms.cuh"

#define RF_EXPORT extern "C" __attribute__((visibility("default")))

namespace retinaface {
namespace {

// How a block is played on the host; trt_runtime/kernels.py has the names.
enum Order : int32_t { kForward, kReverse, kShuffled, kThreads };

struct Schedule {
  int32_t order;
  int32_t threads;  // kThreads: threads of a block, a multiple of warp_size
  int32_t warp_size;
  int32_t skipped_line;  // kThreads: line of decode_nms.cuh whose barrier is left out; 0 for none
  uint64_t seed;         // kShuffled
};

template <typename T, typename Block>
void run_blocks(Block& block, const Problem<T>& problem, int32_t capacity) {
  ScanShared scan_shared;
  const auto shared = std::make_unique<FinishShared>();
  for (int32_t image = 0; image < problem.params.batch; ++image) {
    block.order(problem.geometry.slices, [&](int32_t slice) { scan(block, problem, image, slice, scan_shared); });
    finish(block, problem, image, *shared, capacity);
  }
}

template <typename T>
void run_threads(const Problem<T>& problem, int32_t capacity, const Schedule& schedule) {
  const auto block_of = [&](auto&& kernel) {
    Barrier barrier(schedule.threads, schedule.skipped_line);
    std::vector<std::unique_ptr<Barrier>> warps;
    for (int32_t i = 0; i < schedule.threads / schedule.warp_size; ++i) {
      warps.push_back(std::make_unique<Barrier>(schedule.warp_size, schedule.skipped_line));
    }
    std::vector<std::thread> threads;
    for (int32_t rank = 0; rank < schedule.threads; ++rank) {
      threads.emplace_back([&, rank] {
        ThreadBlock block{rank, schedule.threads, schedule.warp_size, barrier, *warps[rank / schedule.warp_size]};
        kernel(block);
      });
    }
    for (std::thread& thread : threads) thread.join();
  };
  const auto shared = std::make_unique<FinishShared>();
  for (int32_t image = 0; image < problem.params.batch; ++image) {
    for (int32_t slice = 0; slice < problem.geometry.slices; ++slice) {
      ScanShared scan_shared;
      block_of([&](ThreadBlock& block) { scan(block, problem, image, slice, scan_shared); });
    }
    block_of([&](ThreadBlock& block) { finish(block, problem, image, *shared, capacity); });
  }
}

template <typename T>
void run(const DecodeParams& params, HeadType type, const void* const* heads, const Outputs& outputs, int32_t capacity,
         const Schedule& schedule) {
  const Geometry geometry = make_geometry(params, type);
  // not zeros, which would hide a read of what nobody wrote
  std::vector<uint64_t> workspace(workspace_bytes(params) / sizeof(uint64_t) + 1, 0xa5a5a5a5a5a5a5a5u);
  Problem<T> problem{params, geometry, {}, outputs, workspace.data()};
  for (int32_t level = 0; level < params.levels; ++level) problem.heads[level] = static_cast<const T*>(heads[level]);
  if (schedule.order == kThreads) {
    run_threads(problem, capacity, schedule);
  } else if (schedule.order == kReverse) {
    LoopBlock<Reverse> block{};
    run_blocks(block, problem, capacity);
  } else if (schedule.order == kShuffled) {
    LoopBlock<Shuffled> block{Shuffled(schedule.seed)};
    run_blocks(block, problem, capacity);
  } else {
    LoopBlock<Forward> block{};
    run_blocks(block, problem, capacity);
  }
}

}  // namespace
}  // namespace retinaface

// nullptr, or what is wrong with the parameters.
RF_EXPORT const char* retinaface_host_check(const retinaface::DecodeParams* params) {
  return retinaface::check(*params);
}

// `capacity`: candidates held in what is shared memory on the device, a power of two from 64 to 4096.
// 0, or 1 if there is no memory.
RF_EXPORT int32_t retinaface_host_decode_nms(const retinaface::DecodeParams* params, int32_t head_type,
                                             const void* const* heads, const retinaface::Outputs* outputs,
                                             int32_t capacity, const retinaface::Schedule* schedule) try {
  const auto type = static_cast<retinaface::HeadType>(head_type);
  if (type == retinaface::HeadType::kHalf) {
    retinaface::run<retinaface::Half>(*params, type, heads, *outputs, capacity, *schedule);
  } else {
    retinaface::run<float>(*params, type, heads, *outputs, capacity, *schedule);
  }
  return 0;
} catch (const std::exception&) {  // no memory, or no thread
  return 1;
}

// The elementary functions, for tests.
RF_EXPORT void retinaface_host_exp(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = retinaface::exponential(x[i]);
}
RF_EXPORT void retinaface_host_sigmoid(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = retinaface::sigmoid(x[i]);
}
RF_EXPORT void retinaface_host_half_to_float(const uint16_t* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = retinaface::to_float(retinaface::Half{x[i]});
}
