// Weights in half precision, [outputs][inputs], for matrix products that a library does better.
#pragma once

#include "codebook.cuh"
#include "gptq.cuh"
#include "trellis.cuh"

namespace vq {

VQ_INLINE long long global_thread() {
  return static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
}

// One thread per tile of 32 inputs and output; neighbours own neighbouring outputs.
template <int BITS>
VQ_INLINE void gptq_dequantize(const GptqMatrix &m, __half *weights) {
  const long long at = global_thread();
  const int column = static_cast<int>(at % m.outputs);
  const long long tile = at / m.outputs;
  if (tile >= m.inputs / kTile) return;
  unsigned words[BITS];
#pragma unroll
  for (int r = 0; r < BITS; ++r) words[r] = m.words[(tile * BITS + r) * m.outputs + column];
  const long long group = tile * kTile / m.group_size * m.outputs + column;
  const float scale = __half2float(m.scales[group]);
  const float zero = m.zeros == nullptr ? static_cast<float>(1 << (BITS - 1))
                                        : static_cast<float>(m.zeros[group]);
  __half *row = weights + static_cast<long long>(column) * m.inputs + tile * kTile;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const float2 codes = __half22float2(halves_of_codes(pair_codes<BITS>(words, p)));
    row[pair_low<BITS>(p)] = __float2half((codes.x - zero) * scale);
    row[pair_high<BITS>(p)] = __float2half((codes.y - zero) * scale);
  }
}

// One thread per row of vectors and input; neighbours own neighbouring inputs.
template <bool LARGE>
VQ_INLINE void codebook_dequantize(const CodebookMatrix &m, int v, int stages, __half *weights) {
  const long long at = global_thread();
  const int input = static_cast<int>(at % m.inputs);
  const long long row = at / m.inputs;
  const int rows = m.outputs / v;
  if (row >= rows) return;
  for (int i = 0; i < v; ++i) {
    float sum = 0.0f;
    for (int stage = 0; stage < stages; ++stage) {
      const long long place = (static_cast<long long>(stage) * rows + row) * m.stride + input;
      const long long index =
          LARGE ? reinterpret_cast<const unsigned short *>(m.indices)[place] : m.indices[place];
      sum += __half2float(
          m.entries[(static_cast<long long>(stage) * m.num_entries + index) * v + i]);
    }
    weights[(row * v + i) * m.inputs + input] = __float2half(sum);
  }
}

// One thread per lane's outputs and input; neighbours own neighbouring inputs.
template <int BITS>
VQ_INLINE void trellis_dequantize(const TrellisMatrix &m, __half *weights) {
  constexpr int kWords = TrellisShape<BITS>::kWords;
  constexpr int kRows = TrellisShape<BITS>::kRows;
  const long long at = global_thread();
  const int input = static_cast<int>(at % m.inputs);
  const int lane = static_cast<int>(at / m.inputs);
  if (lane * kWords >= m.stride) return;
  const unsigned *stream = m.streams + static_cast<long long>(input) * m.stride + lane * kWords;
  unsigned words[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) words[w] = stream[w];
  const unsigned previous = lane > 0 ? stream[-1] : 0u;
  const long long group = static_cast<long long>(input / m.group_size) * m.outputs;
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int output = lane * kRows + row;
    if (output >= m.outputs) return;
    const unsigned window = trellis_window<BITS>(words, previous, row, m.trellis_bits);
    const float value = static_cast<float>(m.table[trellis_index(window, m.multiplier)]);
    weights[static_cast<long long>(output) * m.inputs + input] =
        __float2half(value * __half2float(m.scales[group + output]));
  }
}

}  // namespace vq
