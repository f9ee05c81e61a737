// GEMV over trellis-coded weights: every input column is one bitstream along the outputs, and the
// weight of output r is an 8-bit table entry named by a hash of the L bits that end with symbol r.
//
// A lane owns 8 outputs at 4 bits, 16 at 2, else 32, whose symbols fill whole 32-bit words; the
// bits before them are its neighbour's last word. The table lies in shared memory once per lane, as
// float, so that look-ups never collide.
#pragma once

#include "common.cuh"

namespace vq {

constexpr int kTable = 256;
constexpr int kChunk = 64;  // inputs staged at a time

template <int BITS>
struct TrellisShape {
  static constexpr int kWords = BITS == 3 ? 3 : 1;            // words per lane
  static constexpr int kRows = 32 * kWords / BITS;            // outputs per lane
  static constexpr int kBlockRows = kRows * kLanes;           // outputs per block
};

struct TrellisMatrix {
  const unsigned *streams;    // [inputs][stride], little-endian words
  const signed char *table;   // [256]
  const __half *scales;       // [groups][outputs]
  int inputs;
  int outputs;
  int stride;                 // words per column, covering `outputs` rounded up to whole lanes
  int group_size;             // inputs per scale
  unsigned multiplier;        // already shifted left by 32 - L
  int trellis_bits;           // L
};

// The 32 bits whose lowest L end with symbol `row` of a lane: the stream from bit
// (row + 1) * BITS - L on, where negative bits are the previous word's.
template <int BITS>
VQ_INLINE unsigned trellis_window(const unsigned (&words)[TrellisShape<BITS>::kWords],
                                  unsigned previous, int row, int trellis_bits) {
  const int bit = (row + 1) * BITS - trellis_bits;
  if (bit < 0) return __funnelshift_r(previous, words[0], 32 + bit);
  const int word = bit / 32;
  const unsigned next = word + 1 < TrellisShape<BITS>::kWords ? words[word + 1] : 0u;
  return __funnelshift_r(words[word], next, bit % 32);
}

// Top byte of the hash. The multiplier's shift drops every bit above the state.
VQ_INLINE unsigned trellis_index(unsigned window, unsigned multiplier) {
  return (window * multiplier) >> 24;
}

template <int BITS, int BATCH>
struct TrellisGemv {
  static constexpr int kRows = TrellisShape<BITS>::kRows;
  static constexpr int kWords = TrellisShape<BITS>::kWords;

  const TrellisMatrix &m;
  const float *table;  // shared [256][kLanes]
  const float *x;      // shared [kChunk][BATCH]
  int lane_word;       // this lane's first word of a column

  VQ_INLINE void add_column(int input, int staged, float (&acc)[BATCH][kRows]) const {
    const unsigned *stream = m.streams + static_cast<long long>(input) * m.stride;
    unsigned words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      words[w] = lane_word + w < m.stride ? __ldcs(stream + lane_word + w) : 0u;
    }
    unsigned previous = __shfl_up_sync(0xffffffffu, words[kWords - 1], 1);
    if (lane_id() == 0) {
      previous = lane_word > 0 && lane_word <= m.stride ? stream[lane_word - 1] : 0u;
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const unsigned window = trellis_window<BITS>(words, previous, row, m.trellis_bits);
      const float value = table[trellis_index(window, m.multiplier) * kLanes + lane_id()];
#pragma unroll
      for (int b = 0; b < BATCH; ++b) acc[b][row] += value * x[staged * BATCH + b];
    }
  }
};

// total += scale of the group * acc, and acc = 0.
template <int ROWS, int BATCH>
VQ_INLINE void close_group(const TrellisMatrix &m, int group, int first_row,
                           float (&acc)[BATCH][ROWS], float (&total)[BATCH][ROWS]) {
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    const int output = first_row + row;
    const float scale =
        output < m.outputs
            ? __half2float(m.scales[static_cast<long long>(group) * m.outputs + output])
            : 0.0f;
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      total[b][row] += scale * acc[b][row];
      acc[b][row] = 0.0f;
    }
  }
}

// Adds the warps' sums in their order and writes the block's outputs.
template <int BITS, int BATCH>
VQ_INLINE void trellis_reduce(const float (&total)[BATCH][TrellisShape<BITS>::kRows], float *shared,
                              int outputs, __half *y, const Splits &splits) {
  constexpr int kRows = TrellisShape<BITS>::kRows;
  constexpr int kBlockRows = TrellisShape<BITS>::kBlockRows;
  const int base = static_cast<int>(blockIdx.x) * kBlockRows;
  const long long size = static_cast<long long>(BATCH) * outputs;
#pragma unroll
  for (int b = 0; b < BATCH; ++b) {
    for (int turn = 0; turn < kWarps; ++turn) {
      __syncthreads();
      if (warp_id() != turn) continue;
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        float *sum = &shared[row * kLanes + lane_id()];
        *sum = turn == 0 ? total[b][row] : *sum + total[b][row];
      }
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kBlockRows; i += kThreads) {
      const int output = base + i;
      if (output >= outputs) continue;
      const float sum = shared[i % kRows * kLanes + i / kRows];
      store_slice(splits, y, size, static_cast<long long>(b) * outputs + output, sum);
    }
  }
  if (gridDim.y == 1) return;
  add_splits(splits, y, size, BATCH * kBlockRows, [=](int i) -> long long {
    const int output = base + i % kBlockRows;
    return output < outputs ? static_cast<long long>(i / kBlockRows) * outputs + output : -1;
  });
}

// x is [BATCH][inputs] with the column scales multiplied in. Shared memory: the table (32 KiB),
// then kChunk * BATCH floats.
template <int BITS, int BATCH>
VQ_INLINE void trellis_gemv(const TrellisMatrix &m, const __half *x, __half *y,
                            const Splits &splits, unsigned char *shared) {
  constexpr int kRows = TrellisShape<BITS>::kRows;
  float *table = reinterpret_cast<float *>(shared);
  float *staged = table + kTable * kLanes;
  for (int i = static_cast<int>(threadIdx.x); i < kTable * kLanes; i += kThreads) {
    table[i] = static_cast<float>(m.table[i / kLanes]);
  }
  const int groups = (m.inputs + m.group_size - 1) / m.group_size;
  const int slices = static_cast<int>(gridDim.y);
  const int slice = static_cast<int>(blockIdx.y);
  const int lane = static_cast<int>(blockIdx.x) * kLanes + lane_id();
  const TrellisGemv<BITS, BATCH> work{m, table, staged, lane * TrellisShape<BITS>::kWords};
  float acc[BATCH][kRows] = {};
  float total[BATCH][kRows] = {};
  // One group may be shared by several slices; every slice scales its own part.
  const int begin = static_cast<int>(static_cast<long long>(m.inputs) * slice / slices);
  const int end = static_cast<int>(static_cast<long long>(m.inputs) * (slice + 1) / slices);
  for (int group = begin / m.group_size; group < groups && group * m.group_size < end; ++group) {
    const int from = max(begin, group * m.group_size);
    const int to = min(end, (group + 1) * m.group_size);
    for (int chunk = from; chunk < to; chunk += kChunk) {
      const int count = min(kChunk, to - chunk);
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < count * BATCH; i += kThreads) {
        staged[i] =
            __half2float(x[static_cast<long long>(i % BATCH) * m.inputs + chunk + i / BATCH]);
      }
      __syncthreads();
      for (int c = warp_id(); c < count; c += kWarps) work.add_column(chunk + c, c, acc);
    }
    close_group<kRows, BATCH>(m, group, lane * kRows, acc, total);
  }
  __syncthreads();
  trellis_reduce<BITS, BATCH>(total, table, m.outputs, y, splits);
}

}  // namespace vq
