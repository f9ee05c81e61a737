// CUDA's language on the CPU, as far as our kernels speak it: one fiber per CUDA thread, blocks one
// after the other. Slow, and exact enough to test indices, fragments and synchronization without a
// GPU. Half precision is the compiler's _Float16, with every operation rounded once as on the
// device; products of matrices are summed in float.
//
// What a GPU would do silently ends the program here: a barrier that not all threads reach, a
// misaligned or out-of-range asynchronous copy, a write behind the shared memory. Threads run in a
// random order from barrier to barrier, and asynchronous copies happen either at once or as late as
// they may, so that a missing barrier or wait shows in one of the runs.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct __half {
  _Float16 value;
};
struct __half2 {
  __half x, y;
};

inline dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace vq_emulation {

constexpr int kLanes = 32;
constexpr std::size_t kStackBytes = 128 * 1024;
constexpr std::size_t kGuardBytes = 256;
constexpr unsigned char kGarbage = 0xff;  // NaN, in half and in single precision

[[noreturn]] inline void fail(const char *what) {
  std::printf("FAILED: %s, block %u %u, thread %u\n", what, blockIdx.x, blockIdx.y, threadIdx.x);
  std::fflush(stdout);
  std::_Exit(EXIT_FAILURE);
}

inline void require(bool condition, const char *what) {
  if (!condition) fail(what);
}

struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
  bool any = false, result = false;  // of the predicates, so far and of the last generation
};

// A copy that was asked for and may not have happened yet.
struct Copy {
  void *target;
  const void *source;
  int copied, size;

  void run() const {
    if (copied > 0) std::memcpy(target, source, static_cast<std::size_t>(copied));
    std::memset(static_cast<char *>(target) + copied, 0, static_cast<std::size_t>(size - copied));
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  const Barrier *awaited = nullptr;
  unsigned generation = 0;
  bool is_done = false;
  std::vector<Copy> open;                 // copies of no group yet
  std::vector<std::vector<Copy>> groups;  // committed, oldest first

  bool can_run() const {
    return !is_done && (awaited == nullptr || awaited->generation != generation);
  }
};

struct Warp {
  Barrier barrier;
  const char *operation = nullptr;
  std::array<void *, kLanes> lanes{};
};

// The running block.
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier all;
  std::vector<unsigned char> memory;
  unsigned char *shared = nullptr;
  std::size_t shared_bytes = 0;
  ucontext_t scheduler;
  const std::function<void()> *kernel = nullptr;
};

inline Block block;
inline bool copies_are_late = true;
inline std::mt19937 schedule(1);

inline unsigned char *dynamic_shared() {
  return block.shared;
}

inline Fiber &this_fiber() {
  return block.fibers[threadIdx.x];
}

inline void wait_for(const Barrier &barrier) {
  Fiber &self = this_fiber();
  self.awaited = &barrier;
  self.generation = barrier.generation;
  swapcontext(&self.context, &block.scheduler);
  self.awaited = nullptr;
}

// True for the one that comes last.
inline bool is_last(Barrier &barrier) {
  return ++barrier.arrived == barrier.expected;
}

inline void release(Barrier &barrier) {
  barrier.arrived = 0;
  barrier.result = barrier.any;
  barrier.any = false;
  ++barrier.generation;
}

inline void run_fiber() {
  (*block.kernel)();
  this_fiber().is_done = true;
  require(this_fiber().open.empty() && this_fiber().groups.empty(), "a copy nobody waited for");
  swapcontext(&this_fiber().context, &block.scheduler);
}

inline void prepare_block(unsigned num_threads, std::size_t shared_bytes) {
  block.fibers.resize(num_threads);
  block.warps.assign(num_threads / kLanes, Warp{});
  for (auto &warp : block.warps) warp.barrier.expected = kLanes;
  block.all = Barrier{num_threads};
  block.memory.assign(shared_bytes + 128 + kGuardBytes, kGarbage);
  const auto address = reinterpret_cast<std::uintptr_t>(block.memory.data());
  block.shared = reinterpret_cast<unsigned char *>((address + 127) / 128 * 128);
  block.shared_bytes = shared_bytes;
  for (auto &fiber : block.fibers) {
    fiber.is_done = false;
    fiber.awaited = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
}

inline void run_block() {
  std::vector<unsigned> order(block.fibers.size());
  for (unsigned t = 0; t < order.size(); ++t) order[t] = t;
  std::shuffle(order.begin(), order.end(), schedule);
  for (bool is_running = true; is_running;) {
    is_running = false;
    for (const unsigned t : order) {
      if (!block.fibers[t].can_run()) continue;
      is_running = true;
      threadIdx = dim3{t, 0, 0};
      swapcontext(&block.scheduler, &block.fibers[t].context);
    }
  }
  for (const unsigned t : order) {
    threadIdx.x = t;
    require(block.fibers[t].is_done, "a barrier that not all threads reach");
  }
  for (std::size_t i = 0; i < kGuardBytes; ++i) {
    require(block.shared[block.shared_bytes + i] == kGarbage, "a write behind the shared memory");
  }
}

// Runs `kernel` like kernel<<<grid, num_threads, shared_bytes>>>; shared memory starts as garbage.
inline void launch(dim3 grid, int num_threads, std::size_t shared_bytes,
                   const std::function<void()> &kernel) {
  gridDim = grid;
  blockDim = dim3{static_cast<unsigned>(num_threads)};
  block.kernel = &kernel;
  for (unsigned by = 0; by < grid.y; ++by) {
    for (unsigned bx = 0; bx < grid.x; ++bx) {
      blockIdx = dim3{bx, by, 0};
      prepare_block(static_cast<unsigned>(num_threads), shared_bytes);
      run_block();
    }
  }
}

// What a warp does together: the lane that comes last does it for all of them.
template <typename Lane, typename Work>
void together(const char *operation, Lane &lane, const Work &work) {
  Warp &warp = block.warps[threadIdx.x / kLanes];
  if (warp.barrier.arrived == 0) warp.operation = operation;
  require(warp.operation == operation, "lanes of one warp do different things");
  warp.lanes[threadIdx.x % kLanes] = &lane;
  if (!is_last(warp.barrier)) return wait_for(warp.barrier);
  work([&warp](int i) -> Lane & {
    return *static_cast<Lane *>(warp.lanes[static_cast<std::size_t>(i)]);
  });
  release(warp.barrier);
}

struct Shuffle {
  std::uint32_t value;
  int source;
  std::uint32_t result;
};

inline std::uint32_t shuffle(std::uint32_t value, int source) {
  static const char *const kName = "shuffle";
  Shuffle mine{value, source, value};
  together(kName, mine, [](const auto &lane) {
    for (int i = 0; i < kLanes; ++i) {
      const int from = lane(i).source;
      if (from >= 0 && from < kLanes) lane(i).result = lane(from).value;
    }
  });
  return mine.result;
}

inline bool is_aligned(const void *address, std::uintptr_t size) {
  return reinterpret_cast<std::uintptr_t>(address) % size == 0;
}

inline void require_shared(const void *address, std::size_t size) {
  const auto *bytes = static_cast<const unsigned char *>(address);
  require(bytes >= block.shared && bytes + size <= block.shared + block.shared_bytes,
          "an access outside of the shared memory");
}

inline void copy_async(void *target, const void *source, int copied, int size) {
  const auto alignment = static_cast<std::uintptr_t>(size);
  require(is_aligned(target, alignment) && is_aligned(source, alignment), "a misaligned copy");
  require_shared(target, static_cast<std::size_t>(size));
  const Copy copy{target, source, copied, size};
  if (copies_are_late) {
    this_fiber().open.push_back(copy);
  } else {
    copy.run();
  }
}

inline void commit_copies() {
  this_fiber().groups.push_back(std::move(this_fiber().open));
  this_fiber().open.clear();
}

// Until at most `pending` of the last groups are not there yet.
inline void wait_copies(std::size_t pending) {
  auto &groups = this_fiber().groups;
  while (groups.size() > pending) {
    for (const Copy &copy : groups.front()) copy.run();
    groups.erase(groups.begin());
  }
}

struct LoadMatrices {
  const void *row;
  std::uint16_t halves[8];  // of the four registers, low half first
};

// ldmatrix .m8n8.x4 of the PTX manual: lanes 8 i .. 8 i + 7 name the rows of matrix i, and lane l
// receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, or of that column if transposed.
inline void load_matrices(unsigned (&registers)[4], const void *row, bool is_transposed) {
  static const char *const kNames[] = {"ldmatrix", "ldmatrix.trans"};
  require(is_aligned(row, 16), "a misaligned row of a matrix");
  require_shared(row, 16);
  LoadMatrices mine{row, {}};
  together(kNames[is_transposed], mine, [is_transposed](const auto &lane) {
    for (int l = 0; l < kLanes; ++l) {
      for (int i = 0; i < 8; ++i) {
        const int matrix = i / 2, near = l / 4, far = 2 * (l % 4) + i % 2;
        const int from = is_transposed ? far : near, element = is_transposed ? near : far;
        std::memcpy(&lane(l).halves[i],
                    static_cast<const char *>(lane(8 * matrix + from).row) + 2 * element, 2);
      }
    }
  });
  std::memcpy(registers, mine.halves, sizeof registers);
}

struct MultiplyAdd {
  __half a[8], b[4];
  float *d;
};

// mma .m16n8k16 of the PTX manual, A by rows and B by columns in half precision, C = D in float.
// With group = lane / 4 and member = lane % 4, element i of a lane's fragments is
//   A: row group + 8 (i / 2 % 2), column 2 member + i % 2 + 8 (i / 4)
//   B: row 2 member + i % 2 + 8 (i / 2), column group
//   C: row group + 8 (i / 2), column 2 member + i % 2
inline void multiply_add(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  static const char *const kName = "mma";
  MultiplyAdd mine{};
  const unsigned b[2] = {b0, b1};
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  mine.d = d;
  together(kName, mine, [](const auto &lane) {
    float left[16][16], right[16][8];
    for (int l = 0; l < kLanes; ++l) {
      const int group = l / 4, member = l % 4;
      for (int i = 0; i < 8; ++i) {
        left[group + 8 * (i / 2 % 2)][2 * member + i % 2 + 8 * (i / 4)] =
            static_cast<float>(lane(l).a[i].value);
      }
      for (int i = 0; i < 4; ++i) {
        right[2 * member + i % 2 + 8 * (i / 2)][group] = static_cast<float>(lane(l).b[i].value);
      }
    }
    for (int l = 0; l < kLanes; ++l) {
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        lane(l).d[i] += sum;
      }
    }
  });
}

}  // namespace vq_emulation

inline int __syncthreads_or(int predicate) {
  auto &barrier = vq_emulation::block.all;
  barrier.any |= predicate != 0;
  if (vq_emulation::is_last(barrier)) {
    vq_emulation::release(barrier);
  } else {
    vq_emulation::wait_for(barrier);
  }
  return barrier.result;
}
inline void __syncthreads() {
  __syncthreads_or(0);
}
inline void __threadfence() {}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = vq_emulation::shuffle(bits, static_cast<int>(threadIdx.x % 32) ^ mask);
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

inline unsigned __shfl_up_sync(unsigned, unsigned value, int delta) {
  return vq_emulation::shuffle(value, static_cast<int>(threadIdx.x % 32) - delta);
}

inline unsigned atomicAdd(unsigned *address, unsigned value) {
  const unsigned before = *address;
  *address += value;
  return before;
}

template <typename T>
T __ldcs(const T *address) {
  return *address;
}

template <typename T>
T __ldcg(const T *address) {
  return *address;
}

inline unsigned __funnelshift_r(unsigned low, unsigned high, int shift) {
  const std::uint64_t both = (std::uint64_t{high} << 32) | low;
  return static_cast<unsigned>(both >> (shift & 31));
}

inline float __half2float(__half half) {
  return static_cast<float>(half.value);
}
inline __half __float2half(float value) {
  return __half{static_cast<_Float16>(value)};
}
inline __half2 __halves2half2(__half x, __half y) {
  return __half2{x, y};
}
inline __half2 __half2half2(__half x) {
  return __half2{x, x};
}
inline __half2 __lows2half2(__half2 a, __half2 b) {
  return __half2{a.x, b.x};
}
inline __half2 __highs2half2(__half2 a, __half2 b) {
  return __half2{a.y, b.y};
}
inline __half2 __floats2half2_rn(float x, float y) {
  return __half2{__float2half(x), __float2half(y)};
}
inline float2 __half22float2(__half2 pair) {
  return float2{__half2float(pair.x), __half2float(pair.y)};
}
inline __half2 __hsub2(__half2 a, __half2 b) {
  return __half2{__float2half(__half2float(a.x) - __half2float(b.x)),
                 __float2half(__half2float(a.y) - __half2float(b.y))};
}
inline __half2 __hadd2(__half2 a, __half2 b) {
  return __half2{__float2half(__half2float(a.x) + __half2float(b.x)),
                 __float2half(__half2float(a.y) + __half2float(b.y))};
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return __half2{__float2half(__half2float(a.x) * __half2float(b.x)),
                 __float2half(__half2float(a.y) * __half2float(b.y))};
}
// A product of halves is exact in float; the sum is rounded to float, then to half.
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __half2{__float2half(std::fma(__half2float(a.x), __half2float(b.x), __half2float(c.x))),
                 __float2half(std::fma(__half2float(a.y), __half2float(b.y), __half2float(c.y)))};
}

using std::max;
using std::min;
