// Decoders of codebooks and trellises in 256-bit registers, for the tiers without byte permutes
// across a whole register. Everything is in an unnamed namespace of the including tier.
//
// Codebooks: the entries of 8 columns are loaded one by one and transposed, two index rows at a
// time, one in each half of the registers.
// Trellises: a column's states lie in 8 bytes, so one shuffle puts the bytes of 8 rows into 32-bit
// lanes and one shift brings every state to the low bits. Two columns then share a register, and
// vpmullw leaves the table index in the high byte, as in matrix_avx512_vbmi.cpp. A table of 256 is 16
// shuffles and a tree of 15 blends, one of 64 is four and three.
#pragma once

#include <immintrin.h>

#include "matrix_tile.hpp"

namespace vq {
namespace {

constexpr std::int32_t kHalf = 32;  // bytes of a register: four rows of a block

inline __m256i load_half(const std::uint8_t *bytes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes));
}

inline void store_half(std::uint8_t *bytes, __m256i value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(bytes), value);
}

inline void store_quarter(std::uint8_t *bytes, __m128i value) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(bytes), value);
}

// ---- codebooks ----

inline __m128i two_entries8(const std::uint8_t *first, const std::uint8_t *second) {
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(first));
  const auto *high = reinterpret_cast<const double *>(second);
  return _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(low), high));
}

inline __m128i one_entry4(const std::uint8_t *entry) {
  std::int32_t value;
  std::memcpy(&value, entry, sizeof value);
  return _mm_cvtsi32_si128(value);
}

inline __m256i both(__m128i low, __m128i high) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

// Entries `stride` bytes apart, of which eight bytes (four for entries of 4) are used.
struct EntryTable {
  const std::uint8_t *bytes;
  std::int64_t stride;

  template <class Index>
  const std::uint8_t *at(Index index) const {
    return bytes + static_cast<std::int64_t>(index) * stride;
  }
};

// Two neighbouring columns of two index rows.
template <class Index>
inline __m256i two_columns8(const EntryTable &table, const Index *row, const Index *next) {
  return both(two_entries8(table.at(row[0]), table.at(row[1])),
              two_entries8(table.at(next[0]), table.at(next[1])));
}

template <class Index>
inline __m128i four_columns4(const EntryTable &table, const Index *row) {
  const __m128i low =
      _mm_unpacklo_epi32(one_entry4(table.at(row[0])), one_entry4(table.at(row[1])));
  const __m128i high =
      _mm_unpacklo_epi32(one_entry4(table.at(row[2])), one_entry4(table.at(row[3])));
  return _mm_unpacklo_epi64(low, high);
}

// Components 2i and 2i + 1 of 8 columns into out[i], index row `row` in the low halves and `next` in
// the high ones.
template <class Index>
inline void transpose8(const EntryTable &table, const Index *row, const Index *next, __m256i *out) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15));
  const __m256i a = _mm256_shuffle_epi8(two_columns8(table, row, next), order);
  const __m256i b = _mm256_shuffle_epi8(two_columns8(table, row + 2, next + 2), order);
  const __m256i c = _mm256_shuffle_epi8(two_columns8(table, row + 4, next + 4), order);
  const __m256i d = _mm256_shuffle_epi8(two_columns8(table, row + 6, next + 6), order);
  const __m256i low_ab = _mm256_unpacklo_epi16(a, b), high_ab = _mm256_unpackhi_epi16(a, b);
  const __m256i low_cd = _mm256_unpacklo_epi16(c, d), high_cd = _mm256_unpackhi_epi16(c, d);
  out[0] = _mm256_unpacklo_epi32(low_ab, low_cd);
  out[1] = _mm256_unpackhi_epi32(low_ab, low_cd);
  out[2] = _mm256_unpacklo_epi32(high_ab, high_cd);
  out[3] = _mm256_unpackhi_epi32(high_ab, high_cd);
}

// The same for entries of four components.
template <class Index>
inline void transpose4(const EntryTable &table, const Index *row, const Index *next, __m256i *out) {
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i left =
      _mm256_shuffle_epi8(both(four_columns4(table, row), four_columns4(table, next)), order);
  const __m256i right = _mm256_shuffle_epi8(
      both(four_columns4(table, row + 4), four_columns4(table, next + 4)), order);
  out[0] = _mm256_unpacklo_epi32(left, right);
  out[1] = _mm256_unpackhi_epi32(left, right);
}

// Blocks of components in order of rows: row sets are components. Index rows `row` and row + 1.
inline void store_components(const __m256i *parts, std::int32_t count, std::int32_t row,
                             std::int64_t pair_bytes, std::uint8_t *block) {
  for (std::int32_t i = 0; i < count; ++i) {
    const __m256i sets = _mm256_permute4x64_epi64(parts[i], _MM_SHUFFLE(3, 1, 2, 0));
    std::uint8_t *out = block + i * pair_bytes + row * kBlock;
    store_quarter(out, _mm256_castsi256_si128(sets));
    store_quarter(out + kBlockBytes, _mm256_extracti128_si256(sets, 1));
  }
}

// Entries of index row `row` to `first`, those of row + 1 to `second`, 8 bytes per component.
template <int kParts>
inline void store_entries(const __m256i *parts, std::uint8_t *first, std::uint8_t *second) {
  for (int i = 0; i < kParts; i += 2) {
    store_half(first + i * 16, _mm256_permute2x128_si256(parts[i], parts[i + 1], 0x20));
    store_half(second + i * 16, _mm256_permute2x128_si256(parts[i], parts[i + 1], 0x31));
  }
}

// One block of 8 columns; `indices` [8][8]. Codes of up to 256 entries, kEntry bytes each.
template <int kEntry>
inline void decode_small_block(const MatrixStage &stage, const std::uint8_t *indices,
                               std::int64_t pair_bytes, std::uint8_t *block) {
  constexpr int kParts = kEntry == 4 ? 2 : 4;
  for (std::int32_t row = 0; row < kBlock; row += 2) {
    const std::uint8_t *at = indices + row * kBlock;
    for (std::int32_t pair = 0; pair < stage.pairs; pair += kParts) {
      const EntryTable table{stage.entries + 2 * pair, kEntry};
      __m256i parts[kParts];
      if constexpr (kEntry == 4) {
        transpose4(table, at, at + kBlock, parts);
      } else {
        transpose8(table, at, at + kBlock, parts);
      }
      store_components(parts, std::min(kParts, stage.pairs - pair), row, pair_bytes,
                       block + pair * pair_bytes);
    }
  }
}

template <int kEntry>
inline void decode_large_block(const MatrixStage &stage, const std::uint16_t *indices,
                               std::int64_t pair_bytes, std::uint8_t *block) {
  for (std::int32_t row = 0; row < kBlock; row += 2) {
    const std::uint16_t *at = indices + row * kBlock;
    __m256i parts[4];
    if constexpr (kEntry == 4) {
      transpose4({stage.entries, 4}, at, at + kBlock, parts);
      std::uint8_t *set = block + row / 4 * pair_bytes + row / 2 % 2 * kBlockBytes;
      store_entries<2>(parts, set, set + kHalf);
    } else if constexpr (kEntry == 8) {
      transpose8({stage.entries, 8}, at, at + kBlock, parts);
      std::uint8_t *pair = block + row / 2 * pair_bytes;
      store_entries<4>(parts, pair, pair + kBlockBytes);
    } else {
      for (int half = 0; half < 2; ++half) {
        transpose8({stage.entries + 8 * half, 16}, at, at + kBlock, parts);
        std::uint8_t *set = block + row * pair_bytes + half * kBlockBytes;
        store_entries<4>(parts, set, set + pair_bytes);
      }
    }
  }
}

template <int kEntry>
void decode_entries(const MatrixStage &stage, const std::uint8_t *codes, std::int32_t num_blocks,
                    std::uint8_t *tile) {
  const std::int64_t pair_bytes = std::int64_t{num_blocks} * 2 * kBlockBytes;
  for (std::int32_t block = 0; block < num_blocks; ++block) {
    std::uint8_t *out = tile + block * 2 * kBlockBytes;
    if (stage.decode == Decode::kVqSmall) {
      decode_small_block<kEntry>(stage, codes + block * kBlockBytes, pair_bytes, out);
    } else {
      const std::uint8_t *indices = codes + block * 2 * kBlockBytes;
      decode_large_block<kEntry>(stage, reinterpret_cast<const std::uint16_t *>(indices),
                                 pair_bytes, out);
    }
  }
}

void decode_vectors(const MatrixStage &stage, const std::uint8_t *codes, std::int32_t num_blocks,
                    std::uint8_t *tile) {
  if (stage.entry_bytes == 4) {
    decode_entries<4>(stage, codes, num_blocks, tile);
  } else if (stage.entry_bytes == 8) {
    decode_entries<8>(stage, codes, num_blocks, tile);
  } else {
    decode_entries<16>(stage, codes, num_blocks, tile);
  }
}

// ---- trellises ----

// Bytes [16 * first, 16 * (first + count)) of a table by the low bits of 64 indices.
template <int kCount>
inline void look_up(const std::uint8_t *table, const __m256i *low, const __m256i (*bits)[2],
                    __m256i *out) {
  if constexpr (kCount == 1) {
    const __m256i part =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table)));
    out[0] = _mm256_shuffle_epi8(part, low[0]);
    out[1] = _mm256_shuffle_epi8(part, low[1]);
  } else {
    __m256i upper[2];
    look_up<kCount / 2>(table, low, bits + 1, out);
    look_up<kCount / 2>(table + kCount / 2 * 16, low, bits + 1, upper);
    out[0] = _mm256_blendv_epi8(out[0], upper[0], bits[0][0]);
    out[1] = _mm256_blendv_epi8(out[1], upper[1], bits[0][1]);
  }
}

// table[index] of 64 bytes, where the low kIndexBits bits of an index count.
template <int kIndexBits>
inline void look_up_block(const std::uint8_t *table, const __m256i *index, std::uint8_t *out) {
  const __m256i mask = _mm256_set1_epi8(15);
  const __m256i low[2] = {_mm256_and_si256(index[0], mask), _mm256_and_si256(index[1], mask)};
  const __m256i bits[4][2] = {{index[0], index[1]},
                              {_mm256_slli_epi16(index[0], 1), _mm256_slli_epi16(index[1], 1)},
                              {_mm256_slli_epi16(index[0], 2), _mm256_slli_epi16(index[1], 2)},
                              {_mm256_slli_epi16(index[0], 3), _mm256_slli_epi16(index[1], 3)}};
  __m256i values[2];
  look_up<1 << (kIndexBits - 4)>(table, low, bits + (8 - kIndexBits), values);
  store_half(out, values[0]);
  store_half(out + kHalf, values[1]);
}

// Where the states of 8 rows lie in the 8 bytes of a column.
struct Windows {
  __m256i bytes;
  __m256i shifts;

  // Lanes hold rows 0, 1, 4, 5 and 2, 3, 6, 7 of them: interleaving columns makes that 0-3 and 4-7.
  Windows(const TcqPlan &plan, std::int32_t first_row) {
    constexpr std::int32_t kLaneRows[kBlock] = {0, 1, 4, 5, 2, 3, 6, 7};
    alignas(32) std::uint8_t from[kHalf];
    alignas(32) std::int32_t shift[kBlock];
    for (std::int32_t lane = 0; lane < kBlock; ++lane) {
      const std::int32_t row = first_row + kLaneRows[lane];
      const std::int32_t bit = 16 + (row + 1) * plan.bits - plan.trellis_bits;
      shift[lane] = bit % 8;
      for (std::int32_t i = 0; i < 4; ++i) {
        const std::int32_t byte = bit / 8 + i;
        from[4 * lane + i] = static_cast<std::uint8_t>(byte < 8 ? byte : 0x80);  // 0x80: none
      }
    }
    bytes = _mm256_load_si256(reinterpret_cast<const __m256i *>(from));
    shifts = _mm256_load_si256(reinterpret_cast<const __m256i *>(shift));
  }
  __m256i states(std::uint64_t column) const {
    const __m256i all = _mm256_set1_epi64x(static_cast<long long>(column));
    return _mm256_srlv_epi32(_mm256_shuffle_epi8(all, bytes), shifts);
  }
};

// Table indices of 8 rows (32-bit lanes) in 4 columns (bytes of a lane).
inline __m256i four_indices(const Windows &windows, const std::uint64_t *columns,
                            __m256i multiplier) {
  const __m256i even = _mm256_blend_epi16(windows.states(columns[0]),
                                          _mm256_slli_epi32(windows.states(columns[2]), 16), 0xaa);
  const __m256i odd = _mm256_blend_epi16(windows.states(columns[1]),
                                         _mm256_slli_epi32(windows.states(columns[3]), 16), 0xaa);
  const __m256i high = _mm256_set1_epi16(static_cast<std::int16_t>(0xff00));
  return _mm256_or_si256(_mm256_srli_epi16(_mm256_mullo_epi16(even, multiplier), 8),
                         _mm256_and_si256(_mm256_mullo_epi16(odd, multiplier), high));
}

// Two bytes of the frame before, then six of this one, of 8 columns; `bytes` per column and frame.
inline void gather_columns8(const std::uint8_t *before, const std::uint8_t *here,
                            std::int32_t bytes, std::uint64_t *columns) {
  for (std::int32_t c = 0; c < kBlock; ++c) {
    std::uint64_t word;
    std::uint16_t last;
    std::memcpy(&word, here + c * bytes, sizeof word);
    std::memcpy(&last, before + (c + 1) * bytes - 2, sizeof last);
    columns[c] = (word << 16) | last;
  }
}

template <int kIndexBits>
class TcqDecoder {
 public:
  explicit TcqDecoder(const MatrixStage &stage)
      : plan_(*stage.tcq),
        first_(plan_, 0),
        second_(plan_, plan_.frames == 1 ? kBlock : 0),
        multiplier_(_mm256_set1_epi16(
            static_cast<std::int16_t>(plan_.multiplier << (8 + kIndexBits - plan_.trellis_bits)))),
        bytes_(kPairRows / plan_.frames * plan_.bits / 8),
        panel_bytes_(stage.panel_bytes) {}

  // Both row sets of a block, whose codes lie at `here`.
  void block(const std::uint8_t *here, std::uint8_t *out) const {
    const std::int64_t frame = std::int64_t{kBlock} * bytes_;
    std::uint64_t columns[kBlock];
    gather_columns8(here - panel_bytes_ + (plan_.frames - 1) * frame, here, bytes_, columns);
    set(first_, columns, out);
    if (plan_.frames == 2) {
      gather_columns8(here, here + frame, bytes_, columns);
    }
    set(second_, columns, out + kBlockBytes);
  }

 private:
  void set(const Windows &windows, const std::uint64_t *columns, std::uint8_t *out) const {
    const __m256i left = four_indices(windows, columns, multiplier_);
    const __m256i right = four_indices(windows, columns + 4, multiplier_);
    const __m256i index[2] = {_mm256_unpacklo_epi32(left, right),
                              _mm256_unpackhi_epi32(left, right)};
    look_up_block<kIndexBits>(plan_.table, index, out);
  }

  const TcqPlan &plan_;
  Windows first_;
  Windows second_;
  __m256i multiplier_;
  std::int32_t bytes_;
  std::int64_t panel_bytes_;
};

template <int kIndexBits>
void decode_trellis(const MatrixStage &stage, const std::uint8_t *codes, std::int32_t num_blocks,
                    std::uint8_t *tile) {
  const TcqDecoder<kIndexBits> decoder(stage);
  const std::int32_t block_bytes = 2 * kBlock * stage.tcq->bits;
  for (std::int32_t block = 0; block < num_blocks; ++block) {
    decoder.block(codes + std::int64_t{block} * block_bytes, tile + block * 2 * kBlockBytes);
  }
}

// What decode_tile_baseline does, of codebooks and trellises.
inline void decode_codebooks(const MatrixStage &stage, std::int32_t panel, std::int32_t column,
                             std::int32_t count, std::uint8_t *tile) {
  const std::uint8_t *codes = stage.codes + panel * stage.panel_bytes;
  if (stage.decode == Decode::kTcq) {
    const std::int32_t index_bits = stage.tcq->index_bits;
    const auto decode = index_bits == 6   ? decode_trellis<6>
                        : index_bits == 7 ? decode_trellis<7>
                                          : decode_trellis<8>;
    return decode(stage, codes + std::int64_t{column} * 2 * stage.tcq->bits, count / kBlock, tile);
  }
  const std::int64_t index_bytes = stage.decode == Decode::kVqSmall ? 8 : 16;
  decode_vectors(stage, codes + column * index_bytes, count / kBlock, tile);
}

}  // namespace
}  // namespace vq
