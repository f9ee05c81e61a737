// Trellis-coded weights: every input column is one bitstream along the outputs, and the
// weight of output r is an 8-bit table entry named by a hash of the L bits that end with symbol r.
//
// A lane owns 8 outputs at 4 bits, 16 at 2, else 32, whose symbols fill whole 32-bit words; the
// bits before them are its neighbour's last word. The table lies in shared memory once per lane, as
// float, so that look-ups never collide.
#pragma once

#include "common.cuh"
#include "tile.cuh"

namespace vq {

constexpr int kTable = 256;
constexpr int kChunk = 64;  // inputs staged at a time

template <int BITS>
struct TrellisShape {
  static constexpr int kWords = BITS == 3 ? 3 : 1;   // words per lane
  static constexpr int kRows = 32 * kWords / BITS;   // outputs per lane
  static constexpr int kBlockRows = kRows * kLanes;  // outputs per block
};

struct TrellisMatrix {
  const unsigned *streams;   // [inputs][stride], little-endian words
  const signed char *table;  // [256]
  const __half *scales;      // [groups][outputs]
  int inputs;
  int outputs;
  int stride;           // words per column, a multiple of 4 that covers the outputs
  int group_size;       // inputs per scale
  unsigned multiplier;  // already shifted left by 32 - L
  int trellis_bits;     // L
};

// The 32 bits of the stream that end with symbol `row` of a lane. Which words they come from is
// known at compile time, whatever L.
template <int BITS>
VQ_INLINE unsigned trellis_window(const unsigned (&words)[TrellisShape<BITS>::kWords],
                                  unsigned previous, int row) {
  const int end = (row + 1) * BITS;
  const unsigned before = end < 32 ? previous : words[end / 32 - 1];
  return end % 32 == 0 ? before : __funnelshift_r(before, words[end / 32], end % 32);
}

// Top byte of the hash of the last L bits. The multiplier's shift drops every bit above them.
VQ_INLINE unsigned trellis_index(const TrellisMatrix &m, unsigned window) {
  return ((window >> (32 - m.trellis_bits)) * m.multiplier) >> 24;
}

constexpr int kTableBytes = 4 * kTable * kLanes;

// The table once per lane, [256][kLanes].
VQ_INLINE void stage_table(const TrellisMatrix &m, float *table) {
  for (int i = static_cast<int>(threadIdx.x); i < kTable * kLanes; i += kThreads) {
    table[i] = static_cast<float>(m.table[i / kLanes]);
  }
}

// Table value of symbol `row` of a lane.
template <int BITS>
VQ_INLINE float trellis_value(const TrellisMatrix &m, const float *table,
                              const unsigned (&words)[TrellisShape<BITS>::kWords],
                              unsigned previous, int row) {
  const unsigned window = trellis_window<BITS>(words, previous, row);
  return table[trellis_index(m, window) * kLanes + lane_id()];
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
      const float value = trellis_value<BITS>(m, table, words, previous, row);
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
  stage_table(m, table);
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

// Tiles of decoded weights (tile.cuh). Packed: per input three words that nobody uses, the word
// before the tile's, and the tile's.
template <int BITS>
struct TrellisTiles {
  static constexpr bool kByInput = true;
  static constexpr int kWords = TrellisShape<BITS>::kWords;
  static constexpr int kRows = TrellisShape<BITS>::kRows;
  static constexpr int kLanesPerTile = kTileOutputs / kRows;
  static constexpr int kTileWords = kTileOutputs * BITS / 32;
  static constexpr int kPitch = 4 + kTileWords;  // words
  static constexpr int kPackedBytes = 4 * kTileInputs * kPitch;

  const TrellisMatrix &m;
  int output;
  const float *table;  // shared [256][kLanes]
  int end;             // inputs from which on `scales` do not hold
  __half2 scales[kRows / 2];

  VQ_INLINE void fetch(int input, unsigned char *packed) const {
    constexpr int kChunks = kTileWords / 4;
    unsigned *words = reinterpret_cast<unsigned *>(packed);
    const int first = output / kTileOutputs * kTileWords;
    for (int i = static_cast<int>(threadIdx.x); i < kTileInputs * kChunks; i += kThreads) {
      const int row = i / kChunks, word = first + i % kChunks * 4;
      const bool inside = input + row < m.inputs && word < m.stride;
      const long long at = static_cast<long long>(input + row) * m.stride + word;
      copy_async<16>(words + row * kPitch + 4 + i % kChunks * 4, m.streams + (inside ? at : 0),
                     inside);
    }
    const int row = static_cast<int>(threadIdx.x);
    if (row >= kTileInputs) return;
    const bool inside = input + row < m.inputs && first > 0;
    const long long at = static_cast<long long>(input + row) * m.stride + first - 1;
    copy_async<4>(words + row * kPitch + 3, m.streams + (inside ? at : 0), inside);
  }

  VQ_INLINE void load_scales(int input, int lane) {
    const int group = input / m.group_size;
    end = (group + 1) * m.group_size;
    const __half *row = m.scales + static_cast<long long>(group) * m.outputs;
#pragma unroll
    for (int i = 0; i < kRows; i += 2) {
      const int first = output + lane * kRows + i;
      scales[i / 2] = __halves2half2(first < m.outputs ? row[first] : __float2half(0.0f),
                                     first + 1 < m.outputs ? row[first + 1] : __float2half(0.0f));
    }
  }

  // A thread decodes the same outputs of some inputs, so that it keeps their scales.
  VQ_INLINE void decode(int input, const unsigned char *packed, __half *tile) {
    const int lane = static_cast<int>(threadIdx.x) % kLanesPerTile;
    const unsigned *words = reinterpret_cast<const unsigned *>(packed) + 4 + lane * kWords;
#pragma unroll 1
    for (int k = static_cast<int>(threadIdx.x) / kLanesPerTile; k < kTileInputs;
         k += kThreads / kLanesPerTile) {
      if (input + k >= end && input + k < m.inputs) load_scales(input + k, lane);
      unsigned own[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) own[w] = words[k * kPitch + w];
      const unsigned previous = words[k * kPitch - 1];
      __half *at = tile + k * TileShape<kByInput>::kPitch + lane * kRows;
#pragma unroll
      for (int row = 0; row < kRows; row += 8) {
        unsigned halves[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const __half2 values =
              __floats2half2_rn(trellis_value<BITS>(m, table, own, previous, row + 2 * i),
                                trellis_value<BITS>(m, table, own, previous, row + 2 * i + 1));
          halves[i] = bits_of_half2(__hmul2(values, scales[row / 2 + i]));
        }
        store_words(at + row, halves);
      }
    }
  }
};

// Stages the table at the beginning of `shared` and moves it behind.
template <int BITS>
VQ_INLINE TrellisTiles<BITS> trellis_tiles(const TrellisMatrix &m, int output,
                                           unsigned char *&shared) {
  float *table = reinterpret_cast<float *>(shared);
  stage_table(m, table);
  __syncthreads();
  shared += kTableBytes;
  return TrellisTiles<BITS>{m, output, table, 0, {}};
}

}  // namespace vq
