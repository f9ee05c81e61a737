// CUDA's language on the CPU, as far as our kernels speak it: one thread per CUDA thread, blocks
// one after the other. Slow, and exact enough to test indices and synchronization without a GPU.
// Half precision is the compiler's _Float16, with every operation rounded once as on the device.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

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

namespace vq_emulation {

constexpr int kLanes = 32;

// What the threads of the running block share.
struct Block {
  explicit Block(int num_threads, std::size_t shared_bytes)
      : all(num_threads),
        memory(shared_bytes + 128),
        exchange(static_cast<std::size_t>(num_threads)) {
    for (int warp = 0; warp < num_threads / kLanes; ++warp) {
      warps.push_back(std::make_unique<std::barrier<>>(kLanes));
    }
  }

  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<unsigned char> memory;
  std::vector<std::uint32_t> exchange;
};

inline thread_local Block *block = nullptr;

inline unsigned char *dynamic_shared() {
  const auto address = reinterpret_cast<std::uintptr_t>(block->memory.data());
  return reinterpret_cast<unsigned char *>((address + 127) / 128 * 128);
}

}  // namespace vq_emulation

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 gridDim, blockDim;

namespace vq_emulation {

// Runs `kernel` like kernel<<<grid, num_threads, shared_bytes>>>; shared memory starts as garbage.
template <typename Kernel>
void launch(dim3 grid, int num_threads, std::size_t shared_bytes, const Kernel &kernel) {
  gridDim = grid;
  blockDim = dim3{static_cast<unsigned>(num_threads)};
  for (unsigned by = 0; by < grid.y; ++by) {
    for (unsigned bx = 0; bx < grid.x; ++bx) {
      Block shared(num_threads, shared_bytes);
      std::fill(shared.memory.begin(), shared.memory.end(), static_cast<unsigned char>(0xcd));
      std::vector<std::thread> threads;
      for (int t = 0; t < num_threads; ++t) {
        threads.emplace_back([&, t] {
          block = &shared;
          threadIdx = dim3{static_cast<unsigned>(t), 0, 0};
          blockIdx = dim3{bx, by, 0};
          kernel();
        });
      }
      for (auto &thread : threads) thread.join();
    }
  }
}

inline std::uint32_t shuffle(std::uint32_t value, int source) {
  const auto self = threadIdx.x;
  const auto first = self / kLanes * kLanes;
  std::barrier<> &warp = *block->warps[self / kLanes];
  block->exchange[self] = value;
  warp.arrive_and_wait();
  const bool exists = source >= 0 && source < kLanes;
  const std::uint32_t result =
      exists ? block->exchange[first + static_cast<unsigned>(source)] : value;
  warp.arrive_and_wait();
  return result;
}

}  // namespace vq_emulation

inline void __syncthreads() { vq_emulation::block->all.arrive_and_wait(); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }

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
  return std::atomic_ref<unsigned>(*address).fetch_add(value);
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

inline float __half2float(__half half) { return static_cast<float>(half.value); }
inline __half __float2half(float value) { return __half{static_cast<_Float16>(value)}; }
inline __half2 __halves2half2(__half x, __half y) { return __half2{x, y}; }
inline float2 __half22float2(__half2 pair) {
  return float2{__half2float(pair.x), __half2float(pair.y)};
}
inline __half2 __hsub2(__half2 a, __half2 b) {
  return __half2{__float2half(__half2float(a.x) - __half2float(b.x)),
                 __float2half(__half2float(a.y) - __half2float(b.y))};
}
// A product of halves is exact in float; the sum is rounded to float, then to half.
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __half2{
      __float2half(std::fma(__half2float(a.x), __half2float(b.x), __half2float(c.x))),
      __float2half(std::fma(__half2float(a.y), __half2float(b.y), __half2float(c.y)))};
}

using std::max;
using std::min;
