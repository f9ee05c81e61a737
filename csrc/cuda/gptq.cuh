// GPTQ's own layout: word row r of column n packs inputs along k, so 32 lanes that own
// four neighbouring columns each read 512 contiguous bytes. 32 inputs take BITS word rows whatever
// the width, which makes them the unit of work.
#pragma once

#include "common.cuh"
#include "tile.cuh"

namespace vq {

constexpr int kTile = 32;             // inputs per unit of work
constexpr int kPairs = kTile / 2;     // half2 per unit
constexpr int kColumns = 4 * kLanes;  // outputs per block

// The two inputs of a tile whose codes pair `p` holds. They are as far apart as one mask of a word
// finds them: half a word, or neighbours at 3 bits, where codes straddle words.
template <int BITS>
VQ_INLINE int pair_low(int p) {
  constexpr int kHalf = 16 / BITS;  // codes in half a word
  return BITS == 3 ? 2 * p : 2 * kHalf * (p / kHalf) + p % kHalf;
}

template <int BITS>
VQ_INLINE int pair_high(int p) {
  return BITS == 3 ? 2 * p + 1 : pair_low<BITS>(p) + 16 / BITS;
}

// Codes of pair `p` in the low bits of two 16-bit halves.
template <int BITS>
VQ_INLINE unsigned pair_codes(const unsigned (&words)[BITS], int p) {
  if constexpr (BITS == 3) {
    const int bit = 6 * p;
    const int word = bit / 32;
    const unsigned next = word + 1 < BITS ? words[word + 1] : 0u;
    const unsigned six = __funnelshift_r(words[word], next, bit % 32);
    return (six & 0x00000007u) | ((six << 13) & 0x00070000u);
  } else {
    constexpr int kHalf = 16 / BITS;
    constexpr unsigned kMask = ((1u << BITS) - 1u) * 0x00010001u;
    return (words[p / kHalf] >> (BITS * (p % kHalf))) & kMask;
  }
}

// 0x6400 is 1024 in half precision, whose last bits count ones: 1024 + code, exactly. `zeros` are
// subtracted, two halves like the codes.
VQ_INLINE __half2 halves_of_codes(unsigned codes, unsigned zeros = 0u) {
  return __hsub2(half2_of_bits(codes | 0x64006400u), half2_of_bits(zeros | 0x64006400u));
}

// Puts pairs `p` and p + 1 (p even) where their inputs lie among the 32 of a tile.
template <int BITS>
VQ_INLINE void store_in_order(const __half2 (&pairs)[2], int p, unsigned (&halves)[kPairs]) {
  if constexpr (BITS == 3) {
    halves[p] = bits_of_half2(pairs[0]);
    halves[p + 1] = bits_of_half2(pairs[1]);
  } else {
    halves[pair_low<BITS>(p) / 2] = bits_of_half2(__lows2half2(pairs[0], pairs[1]));
    halves[pair_high<BITS>(p) / 2] = bits_of_half2(__highs2half2(pairs[0], pairs[1]));
  }
}

struct GptqMatrix {
  const unsigned *words;       // [inputs * BITS / 32][outputs]
  const __half *scales;        // [groups][outputs]
  const unsigned char *zeros;  // [groups][outputs], or NULL: 2^(BITS - 1) everywhere
  int inputs;                  // a multiple of 32
  int outputs;                 // a multiple of 4
  int group_size;              // a multiple of 32
};

template <int BITS, int BATCH>
struct GptqGemv {
  const GptqMatrix &m;
  const __half *x;  // [BATCH][inputs]
  int first;        // first tile of this block's slice
  int count;        // tiles of the slice
  __half2 *pairs;   // shared [count][kPairs][BATCH]
  float *sums;      // shared [count][BATCH]

  VQ_INLINE void stage_inputs() const {
    for (int i = static_cast<int>(threadIdx.x); i < count * kPairs * BATCH; i += kThreads) {
      const int b = i % BATCH;
      const int p = i / BATCH % kPairs;
      const __half *tile = x + static_cast<long long>(b) * m.inputs +
                           static_cast<long long>(first + i / (BATCH * kPairs)) * kTile;
      pairs[i] = __halves2half2(tile[pair_low<BITS>(p)], tile[pair_high<BITS>(p)]);
    }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count * BATCH; i += kThreads) {
      float sum = 0.0f;
      for (int p = 0; p < kPairs; ++p) {
        sum += low_plus_high(pairs[(i / BATCH * kPairs + p) * BATCH + i % BATCH]);
      }
      sums[i] = sum;
    }
    __syncthreads();
  }

  // Sum of code times input over one tile: half precision over 8 products, then float.
  VQ_INLINE float dot(const unsigned (&words)[BITS], int tile, int b) const {
    float total = 0.0f;
#pragma unroll
    for (int quad = 0; quad < kPairs; quad += 4) {
      __half2 part = half2_of_bits(0u);
#pragma unroll
      for (int p = quad; p < quad + 4; ++p) {
        part = __hfma2(halves_of_codes(pair_codes<BITS>(words, p)),
                       pairs[(tile * kPairs + p) * BATCH + b], part);
      }
      total += low_plus_high(part);
    }
    return total;
  }

  VQ_INLINE float zero_of(long long at) const {
    return m.zeros == nullptr ? static_cast<float>(1 << (BITS - 1))
                              : static_cast<float>(m.zeros[at]);
  }

  // Adds tile `tile` of the slice to the sums of four columns.
  VQ_INLINE void add_tile(int tile, int column, float (&acc)[BATCH][4]) const {
    uint4 rows[BITS];
    const long long row = static_cast<long long>(first + tile) * BITS;
#pragma unroll
    for (int r = 0; r < BITS; ++r) {
      rows[r] = load_stream(m.words + (row + r) * m.outputs + column);
    }
    const int group = (first + tile) * kTile / m.group_size;
    const long long at = static_cast<long long>(group) * m.outputs + column;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      unsigned words[BITS];
#pragma unroll
      for (int r = 0; r < BITS; ++r) words[r] = word_of(rows[r], c);
      const float scale = __half2float(m.scales[at + c]);
      const float zero = zero_of(at + c);
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        acc[b][c] += scale * (dot(words, tile, b) - zero * sums[tile * BATCH + b]);
      }
    }
  }
};

// Adds the warps' sums in their order and writes the block's columns.
template <int BATCH>
VQ_INLINE void gptq_reduce(const float (&acc)[BATCH][4], float *shared, int outputs, __half *y,
                           const Splits &splits) {
  __syncthreads();  // the inputs in shared memory are not needed any more
#pragma unroll
  for (int b = 0; b < BATCH; ++b) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      shared[(warp_id() * BATCH + b) * kColumns + lane_id() * 4 + c] = acc[b][c];
    }
  }
  __syncthreads();
  const int base = static_cast<int>(blockIdx.x) * kColumns;
  const auto address = [=](int i) -> long long {
    const int column = base + i % kColumns;
    return column < outputs ? static_cast<long long>(i / kColumns) * outputs + column : -1;
  };
  const long long size = static_cast<long long>(BATCH) * outputs;
  for (int i = static_cast<int>(threadIdx.x); i < BATCH * kColumns; i += kThreads) {
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += shared[warp * BATCH * kColumns + i];
    const long long at = address(i);
    if (at >= 0) store_slice(splits, y, size, at, sum);
  }
  if (gridDim.y > 1) add_splits(splits, y, size, BATCH * kColumns, address);
}

// Shared bytes: the larger of the staged inputs and the warps' sums.
template <int BITS, int BATCH>
VQ_INLINE void gptq_gemv(const GptqMatrix &m, const __half *x, __half *y, const Splits &splits,
                         unsigned char *shared) {
  const int tiles = m.inputs / kTile;
  const int per_slice = (tiles + static_cast<int>(gridDim.y) - 1) / static_cast<int>(gridDim.y);
  const int first = static_cast<int>(blockIdx.y) * per_slice;
  const int count = max(0, min(per_slice, tiles - first));
  __half2 *pairs = reinterpret_cast<__half2 *>(shared);
  float *sums = reinterpret_cast<float *>(pairs + static_cast<long long>(count) * kPairs * BATCH);
  const GptqGemv<BITS, BATCH> work{m, x, first, count, pairs, sums};
  work.stage_inputs();
  const int column = static_cast<int>(blockIdx.x) * kColumns + lane_id() * 4;
  float acc[BATCH][4] = {};
  if (column < m.outputs) {
    for (int tile = warp_id(); tile < count; tile += kWarps) work.add_tile(tile, column, acc);
  }
  gptq_reduce<BATCH>(acc, reinterpret_cast<float *>(shared), m.outputs, y, splits);
}

// Tiles of decoded weights (tile.cuh). Packed: 2 BITS rows of words, then the scales and the zeros
// of the two units of 32 inputs.
template <int BITS>
struct GptqTiles {
  static constexpr bool kByInput = false;
  static constexpr int kUnits = kTileInputs / kTile;
  static constexpr int kWordBytes = 4 * kUnits * BITS * kTileOutputs;
  static constexpr int kScaleBytes = 2 * kUnits * kTileOutputs;
  static constexpr int kPackedBytes = kWordBytes + kScaleBytes + kUnits * kTileOutputs;
  static_assert(kUnits * kTileOutputs == kThreads, "a thread decodes one unit of one output");

  const GptqMatrix &m;
  int output;

  VQ_INLINE void fetch(int input, unsigned char *packed) const {
    constexpr int kQuads = kTileOutputs / 4;
    const int rows = m.inputs / kTile * BITS;
    for (int i = static_cast<int>(threadIdx.x); i < kUnits * BITS * kQuads; i += kThreads) {
      const int row = input / kTile * BITS + i / kQuads, column = output + i % kQuads * 4;
      const bool inside = row < rows && column < m.outputs;
      const long long at = static_cast<long long>(row) * m.outputs + column;
      copy_async<16>(packed + 16 * i, m.words + (inside ? at : 0), inside);
    }
    const int i = static_cast<int>(threadIdx.x);
    if (i >= kUnits * kQuads) return;
    const int unit = input + i / kQuads * kTile, column = output + i % kQuads * 4;
    const bool inside = unit < m.inputs && column < m.outputs;
    const long long at =
        inside ? static_cast<long long>(unit / m.group_size) * m.outputs + column : 0;
    copy_async<8>(packed + kWordBytes + 8 * i, m.scales + at, inside);
    if (m.zeros == nullptr) return;
    copy_async<4>(packed + kWordBytes + kScaleBytes + 4 * i, m.zeros + at, inside);
  }

  VQ_INLINE void decode(int, const unsigned char *packed, __half *tile) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int unit = thread / kTileOutputs, column = thread % kTileOutputs;
    const unsigned *words = reinterpret_cast<const unsigned *>(packed);
    unsigned own[BITS];
#pragma unroll
    for (int r = 0; r < BITS; ++r) own[r] = words[(unit * BITS + r) * kTileOutputs + column];
    const __half scale = reinterpret_cast<const __half *>(packed + kWordBytes)[thread];
    const unsigned zero =
        m.zeros == nullptr ? 1u << (BITS - 1) : packed[kWordBytes + kScaleBytes + thread];
    const __half2 scales = __halves2half2(scale, scale);
    unsigned halves[kPairs];
#pragma unroll
    for (int p = 0; p < kPairs; p += 2) {
      __half2 pairs[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        pairs[i] =
            __hmul2(halves_of_codes(pair_codes<BITS>(own, p + i), zero * 0x00010001u), scales);
      }
      store_in_order<BITS>(pairs, p, halves);
    }
    store_words(tile + column * TileShape<kByInput>::kPitch + unit * kTile, halves);
  }
};

}  // namespace vq
