// Vector-quantized weights whose vectors run along the outputs: index j of row g names the V
// weights of outputs g V .. g V + V - 1 at input j.
//
// Random look-ups of one table collide in the banks of shared memory. So a small codebook lies
// there once per group of lanes that one access serves: copy c of entry e at byte e * 128 + c * size,
// and lane l reads copy l mod (128 / size). Blocks are persistent, so the copies are made once.
#pragma once

#include "common.cuh"
#include "tile.cuh"

namespace vq {

constexpr int kEntryBytes = 128;  // all copies of one entry: one row of banks
constexpr int kIndicesPerLoad = 16;

// Bytes of shared memory that one look-up reads: V = 4 takes 8, V = 8 takes 16, V = 16 two pieces.
template <int V>
struct Piece {
  static constexpr int kValues = V < 8 ? V : 8;
  static constexpr int kBytes = 2 * kValues;
  static constexpr int kCopies = kEntryBytes / kBytes;
  static constexpr int kCount = V / kValues;
};

struct CodebookMatrix {
  const unsigned char *indices;  // [stages][outputs / V][stride]; two bytes each where LARGE
  const __half *entries;         // [stages][num_entries][V]
  int inputs;                    // used columns of a row
  int stride;                    // columns of a row, a multiple of 16
  int outputs;                   // a multiple of V
  int num_entries;
  int num_hot;  // LARGE only: leading entries that lie in shared memory
};

// Copies of all entries of all stages, [stage][piece][entry][copy].
template <int V, int STAGES>
VQ_INLINE void stage_copies(const CodebookMatrix &m, __half *shared) {
  constexpr int kPieces = STAGES * Piece<V>::kCount;
  constexpr int kHalves = kEntryBytes / 2;
  const int total = kPieces * m.num_entries * kHalves;
  for (int i = static_cast<int>(threadIdx.x); i < total; i += kThreads) {
    const int value = i % Piece<V>::kValues;
    const int entry = i / kHalves % m.num_entries;
    const int piece = i / kHalves / m.num_entries;
    const int stage = piece / Piece<V>::kCount;
    const int part = piece % Piece<V>::kCount;
    shared[i] = m.entries[(static_cast<long long>(stage) * m.num_entries + entry) * V +
                          part * Piece<V>::kValues + value];
  }
  __syncthreads();
}

// The leading entries of every stage of a large codebook, [stage][num_hot][V].
template <int V, int STAGES>
VQ_INLINE void stage_hot(const CodebookMatrix &m, __half *hot) {
  const int per_stage = m.num_hot * V;
  for (int i = static_cast<int>(threadIdx.x); i < STAGES * per_stage; i += kThreads) {
    hot[i] = m.entries[static_cast<long long>(i / per_stage) * m.num_entries * V + i % per_stage];
  }
  __syncthreads();
}

// One look-up of 2 * WORDS halves.
template <int WORDS>
VQ_INLINE void load_entry(const void *address, unsigned (&words)[WORDS]) {
  static_assert(WORDS == 2 || WORDS == 4, "8 or 16 bytes");
  if constexpr (WORDS == 4) {
    const uint4 four = *reinterpret_cast<const uint4 *>(address);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  } else {
    const uint2 two = *reinterpret_cast<const uint2 *>(address);
    words[0] = two.x, words[1] = two.y;
  }
}

// acc += entry * x for one look-up of VALUES halves at `address`.
template <int VALUES>
VQ_INLINE void add_entry(const void *address, __half2 x, __half2 *acc) {
  unsigned words[VALUES / 2];
  load_entry(address, words);
#pragma unroll
  for (int i = 0; i < VALUES / 2; ++i) acc[i] = __hfma2(half2_of_bits(words[i]), x, acc[i]);
}

// Where entry `index` of a stage lies, for this lane.
template <int V>
struct SmallTable {
  const unsigned char *shared;
  int num_entries;

  VQ_INLINE const void *find(int stage, int piece, unsigned index) const {
    const int row = (stage * Piece<V>::kCount + piece) * num_entries + static_cast<int>(index);
    return shared + row * kEntryBytes + lane_id() % Piece<V>::kCopies * Piece<V>::kBytes;
  }
};

template <int V>
struct LargeTable {
  const __half *hot;      // shared [stages][num_hot][V]
  const __half *entries;  // global [stages][num_entries][V]
  int num_hot;
  int num_entries;

  VQ_INLINE const void *find(int stage, int piece, unsigned index) const {
    const bool is_hot = static_cast<int>(index) < num_hot;
    const __half *table = is_hot ? hot : entries;
    const long long row = static_cast<long long>(stage) * (is_hot ? num_hot : num_entries) + index;
    return table + row * V + piece * Piece<V>::kValues;
  }
};

// Indices in a word: four of one byte, or two of two bytes.
template <bool LARGE>
constexpr int kPerWord = LARGE ? 2 : 4;

template <bool LARGE>
VQ_INLINE unsigned index_in(unsigned word, int i) {
  return LARGE ? (word >> (16 * i)) & 0xffffu : (word >> (8 * i)) & 0xffu;
}

// Index i of 16 (8 where LARGE).
template <bool LARGE>
VQ_INLINE unsigned index_of(const uint4 &packed, int i) {
  return index_in<LARGE>(word_of(packed, i / kPerWord<LARGE>), i % kPerWord<LARGE>);
}

// The V outputs of row `row`, summed over this lane's inputs. Half precision over one load of
// indices (8 or 16 products), then float.
template <int V, int STAGES, int BATCH, bool LARGE, typename Table>
VQ_INLINE void add_row(const CodebookMatrix &m, const Table &table, const __half *x, int row,
                       float (&acc)[BATCH][V]) {
  constexpr int kIndices = LARGE ? kIndicesPerLoad / 2 : kIndicesPerLoad;
  constexpr int kWords = Piece<V>::kValues / 2;
  const int rows = m.outputs / V;
  for (int j = lane_id() * kIndices; j < m.stride; j += kLanes * kIndices) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      const long long at = (static_cast<long long>(stage) * rows + row) * m.stride + j;
      const uint4 packed = load_stream(m.indices + at * (LARGE ? 2 : 1));
#pragma unroll
      for (int piece = 0; piece < Piece<V>::kCount; ++piece) {
        for (int b = 0; b < BATCH; ++b) {
          __half2 part[kWords];
#pragma unroll
          for (int w = 0; w < kWords; ++w) part[w] = half2_of_bits(0u);
#pragma unroll
          for (int i = 0; i < kIndices; ++i) {
            const __half value = x[static_cast<long long>(b) * m.stride + j + i];
            add_entry<Piece<V>::kValues>(table.find(stage, piece, index_of<LARGE>(packed, i)),
                                         __halves2half2(value, value), part);
          }
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            const float2 both = __half22float2(part[w]);
            acc[b][piece * Piece<V>::kValues + 2 * w] += both.x;
            acc[b][piece * Piece<V>::kValues + 2 * w + 1] += both.y;
          }
        }
      }
    }
  }
}

// Every warp takes rows in turn until none is left; x is [BATCH][stride], zero beyond the inputs.
template <int V, int STAGES, int BATCH, bool LARGE, typename Table>
VQ_INLINE void codebook_rows(const CodebookMatrix &m, const Table &table, const __half *x,
                             __half *y) {
  const int step = static_cast<int>(gridDim.x) * kWarps;
  for (int row = static_cast<int>(blockIdx.x) * kWarps + warp_id(); row < m.outputs / V;
       row += step) {
    float acc[BATCH][V] = {};
    add_row<V, STAGES, BATCH, LARGE>(m, table, x, row, acc);
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float sum = acc[b][v];
#pragma unroll
        for (int offset = kLanes / 2; offset > 0; offset /= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        }
        if (lane_id() == v) {
          y[static_cast<long long>(b) * m.outputs + row * V + v] = __float2half(sum);
        }
      }
    }
  }
}

template <int V, int STAGES, int BATCH>
VQ_INLINE void codebook_gemv(const CodebookMatrix &m, const __half *x, __half *y,
                             unsigned char *shared) {
  stage_copies<V, STAGES>(m, reinterpret_cast<__half *>(shared));
  codebook_rows<V, STAGES, BATCH, false>(m, SmallTable<V>{shared, m.num_entries}, x, y);
}

template <int V, int STAGES>
VQ_INLINE LargeTable<V> stage_large(const CodebookMatrix &m, unsigned char *shared) {
  __half *hot = reinterpret_cast<__half *>(shared);
  stage_hot<V, STAGES>(m, hot);
  return LargeTable<V>{hot, m.entries, m.num_hot, m.num_entries};
}

template <int V, int STAGES, int BATCH>
VQ_INLINE void large_codebook_gemv(const CodebookMatrix &m, const __half *x, __half *y,
                                   unsigned char *shared) {
  codebook_rows<V, STAGES, BATCH, true>(m, stage_large<V, STAGES>(m, shared), x, y);
}

// Tiles of decoded weights (tile.cuh). Packed: per stage and row of vectors the indices of the
// tile's inputs, 16 bytes apart from the next row's so that fewer of them share banks.
template <int V, int STAGES, bool LARGE, typename Table>
struct CodebookTiles {
  static constexpr bool kByInput = true;
  static constexpr int kIndexBytes = LARGE ? 2 : 1;
  static constexpr int kRows = kTileOutputs / V;
  static constexpr int kRowBytes = kTileInputs * kIndexBytes + 16;
  static constexpr int kPackedBytes = STAGES * kRows * kRowBytes;

  const CodebookMatrix &m;
  int output;
  Table table;

  VQ_INLINE void fetch(int input, unsigned char *packed) const {
    constexpr int kChunks = kTileInputs * kIndexBytes / 16;
    const int rows = m.outputs / V;
    for (int i = static_cast<int>(threadIdx.x); i < STAGES * kRows * kChunks; i += kThreads) {
      const int chunk = i % kChunks, stage = i / kChunks / kRows;
      const int row = output / V + i / kChunks % kRows;
      const int column = input + chunk * 16 / kIndexBytes;
      const bool inside = row < rows && column < m.stride;
      const long long at = (static_cast<long long>(stage) * rows + row) * m.stride + column;
      copy_async<16>(packed + i / kChunks * kRowBytes + chunk * 16,
                     m.indices + (inside ? at * kIndexBytes : 0), inside);
    }
  }

  // A thread decodes the inputs of one word; neighbours own neighbouring rows of vectors, whose
  // weights are neighbours in the tile.
  VQ_INLINE void decode(int, const unsigned char *packed, __half *tile) const {
    constexpr int kWords = kTileInputs / kPerWord<LARGE>;
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kWords; i += kThreads) {
      const int row = i % kRows, word = i / kRows;
      unsigned indices[STAGES];
#pragma unroll
      for (int stage = 0; stage < STAGES; ++stage) {
        indices[stage] = *reinterpret_cast<const unsigned *>(
            packed + (stage * kRows + row) * kRowBytes + 4 * word);
      }
#pragma unroll
      for (int j = 0; j < kPerWord<LARGE>; ++j) {
        __half *at = tile + (word * kPerWord<LARGE> + j) * TileShape<kByInput>::kPitch + row * V;
#pragma unroll
        for (int piece = 0; piece < Piece<V>::kCount; ++piece) {
          store_vector(indices, j, piece, at + piece * Piece<V>::kValues);
        }
      }
    }
  }

  VQ_INLINE void store_vector(const unsigned (&indices)[STAGES], int j, int piece,
                              __half *at) const {
    unsigned sum[Piece<V>::kValues / 2];
    load_entry(table.find(0, piece, index_in<LARGE>(indices[0], j)), sum);
#pragma unroll
    for (int stage = 1; stage < STAGES; ++stage) {
      unsigned entry[Piece<V>::kValues / 2];
      load_entry(table.find(stage, piece, index_in<LARGE>(indices[stage], j)), entry);
#pragma unroll
      for (int w = 0; w < Piece<V>::kValues / 2; ++w) {
        sum[w] = bits_of_half2(__hadd2(half2_of_bits(sum[w]), half2_of_bits(entry[w])));
      }
    }
    store_words(at, sum);
  }
};

// Bytes of shared memory of the tables, rounded so that what follows is aligned.
VQ_INLINE int align_table(int bytes) {
  return (bytes + 127) / 128 * 128;
}

template <int V, int STAGES>
using SmallTiles = CodebookTiles<V, STAGES, false, SmallTable<V>>;
template <int V, int STAGES>
using LargeTiles = CodebookTiles<V, STAGES, true, LargeTable<V>>;

// Stages the tables of a codebook at the beginning of `shared` and moves it behind them.
template <int V, int STAGES>
VQ_INLINE SmallTiles<V, STAGES> small_tiles(const CodebookMatrix &m, int output,
                                            unsigned char *&shared) {
  const SmallTable<V> table{shared, m.num_entries};
  stage_copies<V, STAGES>(m, reinterpret_cast<__half *>(shared));
  shared += STAGES * Piece<V>::kCount * m.num_entries * kEntryBytes;
  return SmallTiles<V, STAGES>{m, output, table};
}

template <int V, int STAGES>
VQ_INLINE LargeTiles<V, STAGES> large_tiles(const CodebookMatrix &m, int output,
                                            unsigned char *&shared) {
  const LargeTable<V> table = stage_large<V, STAGES>(m, shared);
  shared += align_table(2 * STAGES * m.num_hot * V);
  return LargeTiles<V, STAGES>{m, output, table};
}

}  // namespace vq
