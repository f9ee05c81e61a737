// What all CUDA kernels share. Self-contained: no torch, no C++ library, so that NVRTC compiles the
// same sources at run time, and a small shim compiles them for the CPU in the tests.
#pragma once

#if defined(VQ_CUDA_EMULATION)
#include "emulation.hpp"
#else
#include <cuda_fp16.h>
#endif

#define VQ_INLINE __device__ __forceinline__

namespace vq {

constexpr int kThreads = 256;
constexpr int kWarps = 8;
constexpr int kLanes = 32;

VQ_INLINE int lane_id() {
  return static_cast<int>(threadIdx.x) % kLanes;
}
VQ_INLINE int warp_id() {
  return static_cast<int>(threadIdx.x) / kLanes;
}

VQ_INLINE __half2 half2_of_bits(unsigned bits) {
  return *reinterpret_cast<__half2 *>(&bits);
}

VQ_INLINE unsigned bits_of_half2(__half2 pair) {
  return *reinterpret_cast<unsigned *>(&pair);
}

VQ_INLINE float low_plus_high(__half2 pair) {
  const float2 both = __half22float2(pair);
  return both.x + both.y;
}

// Weights are read once: past L1, and first to go from L2.
VQ_INLINE uint4 load_stream(const void *address) {
  return __ldcs(reinterpret_cast<const uint4 *>(address));
}

VQ_INLINE unsigned word_of(const uint4 &four, int index) {
  return index == 0 ? four.x : index == 1 ? four.y : index == 2 ? four.z : four.w;
}

// How the partial sums of gridDim.y slices of the inputs become one output. `partial` holds
// [gridDim.y][count] floats and `counters` one zero per blockIdx.x, which is left at zero.
struct Splits {
  float *partial;
  unsigned *counters;
};

// The block that arrives last adds the slices in their order, so the result does not depend on the
// order of arrival. Element i of this block's `count` is at `address(i)` of y, or nowhere if < 0.
template <typename Address>
VQ_INLINE void add_splits(const Splits &splits, __half *y, long long size, int count,
                          const Address &address) {
  __threadfence();
  __syncthreads();
  int is_last = 0;
  if (threadIdx.x == 0) {
    is_last = atomicAdd(&splits.counters[blockIdx.x], 1u) + 1 == gridDim.y;
    if (is_last) splits.counters[blockIdx.x] = 0;
  }
  if (!__syncthreads_or(is_last)) return;
  __threadfence();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    const long long at = address(i);
    if (at < 0) continue;
    float sum = 0.0f;
    for (unsigned split = 0; split < gridDim.y; ++split) {
      sum += __ldcg(&splits.partial[split * size + at]);
    }
    y[at] = __float2half(sum);
  }
}

// Writes one finished value of this block's slice: straight to y, or to the slice's partial sums.
VQ_INLINE void store_slice(const Splits &splits, __half *y, long long size, long long at,
                           float value) {
  if (gridDim.y == 1) {
    y[at] = __float2half(value);
  } else {
    splits.partial[blockIdx.y * size + at] = value;
  }
}

}  // namespace vq
