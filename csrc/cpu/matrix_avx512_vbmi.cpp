// AVX-512 VNNI + VBMI tier: byte permutes decode trellises and codebooks in registers.
//
// Trellis, 16 rows of 8 columns: vpermi2b brings the bytes that a column's states lie in into one
// 64-bit lane, vpmultishiftqb cuts a 16-bit window per row out of it (its low trellis_bits bits are
// the state), vpmullw by multiplier << (8 + index_bits - trellis_bits) leaves the table index in the
// high byte, below what came from bits above the state. A permute ignores those bits of an index,
// and takes 64 entries from one register or 128 from two.
// Codebooks: index bytes select from the entries of one component, 64 (vpermb) or 128 (vpermi2b) at
// a time; entries of larger codebooks are loaded one by one and transposed by one permute.
// Compiled with the flags of CMakeLists.txt; only reached after the run-time check in dispatch.cpp.
#include <type_traits>

#include "matrix_avx512.hpp"

namespace vq {
namespace {

// A table of 64 bytes in each of some registers. `upper` are the indices of 128 and more.
template <int kRegisters>
struct Component {
  __m512i part[kRegisters];

  explicit Component(const std::uint8_t *table) {
    for (int i = 0; i < kRegisters; ++i) {
      part[i] = load_bytes(table + i * kBlockBytes);
    }
  }
  __m512i look_up(__m512i index, __mmask64 upper) const {
    if constexpr (kRegisters == 1) {
      return _mm512_permutexvar_epi8(index, part[0]);
    } else {
      const __m512i low = _mm512_permutex2var_epi8(part[0], index, part[1]);
      if constexpr (kRegisters == 2) {
        return low;
      } else {
        const __m512i high = _mm512_permutex2var_epi8(part[2], index, part[3]);
        return _mm512_mask_blend_epi8(upper, low, high);
      }
    }
  }
};

// High bytes of 16-bit lanes [column][row 0-3], [column][row 4-7] as bytes [row][column].
inline __m512i transposed_high_bytes() {
  alignas(64) std::uint8_t index[kBlockBytes];
  for (int i = 0; i < kBlockBytes; ++i) {
    const int row = i / kBlock;
    const int column = i % kBlock;
    index[i] = static_cast<std::uint8_t>(row / 4 * 64 + column * 8 + row % 4 * 2 + 1);
  }
  return load_bytes(index);
}

template <int kFrames, int kIndexBits>
class Tcq {
 public:
  static constexpr int kBlocks = 1;

  explicit Tcq(const MatrixStage &stage)
      : table_(stage.tcq->table),
        gather_(load_bytes(stage.tcq->gather)),
        collect_(transposed_high_bytes()),
        multiplier_(_mm512_set1_epi16(
            static_cast<std::int16_t>(stage.tcq->multiplier
                                      << (8 + kIndexBits - stage.tcq->trellis_bits)))),
        frame_bytes_(kBlock * kPairRows / kFrames * stage.tcq->bits / 8),
        before_(stage.panel_bytes - (kFrames - 1) * frame_bytes_) {
    for (int i = 0; i < 4; ++i) {
      shifts_[i] = load_bytes(stage.tcq->shifts[i]);
    }
  }
  std::int64_t bytes() const { return kFrames * frame_bytes_; }

  void step(const std::uint8_t *p, __m512i *w) const {
    const __m512i first = load_bytes(p);
    __m512i source = _mm512_permutex2var_epi8(load_bytes(p - before_), gather_, first);
    w[0] = set(source, shifts_[0], shifts_[1]);
    if (kFrames == 2) {
      source = _mm512_permutex2var_epi8(first, gather_, load_bytes(p + frame_bytes_));
    }
    w[1] = set(source, shifts_[2], shifts_[3]);
  }

 private:
  __m512i set(__m512i source, __m512i shift_low, __m512i shift_high) const {
    const __m512i low = _mm512_multishift_epi64_epi8(shift_low, source);
    const __m512i high = _mm512_multishift_epi64_epi8(shift_high, source);
    const __m512i index = _mm512_permutex2var_epi8(_mm512_mullo_epi16(low, multiplier_), collect_,
                                                   _mm512_mullo_epi16(high, multiplier_));
    return table_.look_up(index, kIndexBits < 8 ? 0 : _mm512_movepi8_mask(index));
  }

  Component<1 << (kIndexBits - 6)> table_;
  __m512i gather_;
  __m512i collect_;
  __m512i multiplier_;
  __m512i shifts_[4];
  std::int64_t frame_bytes_;
  std::int64_t before_;
};

template <int kFrames, class Use>
void with_index_bits(const MatrixStage &stage, Use use) {
  switch (stage.tcq->index_bits) {
    case 6:
      return use(Tcq<kFrames, 6>(stage));
    case 7:
      return use(Tcq<kFrames, 7>(stage));
    default:
      return use(Tcq<kFrames, 8>(stage));
  }
}

// use(decoder) with the decoder of the stage's trellis.
template <class Use>
void with_tcq(const MatrixStage &stage, Use use) {
  if (stage.tcq->frames == 1) {
    with_index_bits<1>(stage, use);
  } else {
    with_index_bits<2>(stage, use);
  }
}

// ---- small codebooks: one component of 8 index rows per row set ----

// Four components of one row of activations over all columns: lanes of two pairs.
template <int kRegisters>
void multiply_components(const MatrixJob &job, const MatrixStage &stage, const std::uint8_t *codes,
                         std::int32_t pair, bool has_second, float *lanes) {
  const MatrixPart &part = *job.part;
  const std::uint8_t *table = stage.table + pair * 2 * 256;
  const std::uint8_t *second = has_second ? table + 2 * 256 : table;
  const Component<kRegisters> t0(table), t1(table + 256), t2(second), t3(second + 256);
  const __m512 scale0 = _mm512_loadu_ps(stage.lane_scales + pair * kPairRows);
  const __m512 scale1 = _mm512_loadu_ps(stage.lane_scales + (pair + 1) * kPairRows);
  __m512 out0 = _mm512_setzero_ps(), out1 = out0;
  for (std::int32_t column = 0; column < part.columns; column += part.segment) {
    const std::int32_t count = std::min(part.segment, part.columns - column);
    const std::int8_t *q = job.x.q + column;
    __m512i acc0 = _mm512_setzero_si512(), acc1 = acc0, acc2 = acc0, acc3 = acc0;
    for (std::int32_t c = 0; c < count; c += kBlock) {
      prefetch(codes);
      const __m512i index = load_bytes(codes);
      const __mmask64 upper = _mm512_movepi8_mask(index);
      const __m512i x = broadcast8(q + c);
      acc0 = dot4(acc0, t0.look_up(index, upper), x);
      acc1 = dot4(acc1, t1.look_up(index, upper), x);
      acc2 = dot4(acc2, t2.look_up(index, upper), x);
      acc3 = dot4(acc3, t3.look_up(index, upper), x);
      codes += kBlockBytes;
    }
    const __m512i zero = _mm512_set1_epi32(stage.zero * segment_sum(job.x, 0, column, count));
    const float x_scale = job.x.scales[column / kActivationGroup];
    out0 = add_scaled(out0, _mm512_sub_epi32(add_halves(acc0, acc1), zero), scale0, x_scale);
    out1 = add_scaled(out1, _mm512_sub_epi32(add_halves(acc2, acc3), zero), scale1, x_scale);
  }
  _mm512_store_ps(lanes + pair * kPairRows, out0);
  if (has_second) {
    _mm512_store_ps(lanes + (pair + 1) * kPairRows, out1);
  }
}

template <int kRegisters>
void multiply_small(const MatrixJob &job, const MatrixStage &stage, const std::uint8_t *codes,
                    float *lanes) {
  for (std::int32_t pair = 0; pair < stage.pairs; pair += 2) {
    multiply_components<kRegisters>(job, stage, codes, pair, pair + 1 < stage.pairs, lanes);
  }
}

template <int kRegisters>
void decode_small(const MatrixStage &stage, const std::uint8_t *codes, std::int32_t num_blocks,
                  std::uint8_t *tile) {
  for (std::int32_t pair = 0; pair < stage.pairs; ++pair) {
    const Component<kRegisters> t0(stage.table + 2 * pair * 256);
    const Component<kRegisters> t1(stage.table + (2 * pair + 1) * 256);
    for (std::int32_t block = 0; block < num_blocks; ++block) {
      const __m512i index = load_bytes(codes + block * kBlockBytes);
      const __mmask64 upper = _mm512_movepi8_mask(index);
      _mm512_store_si512(tile, t0.look_up(index, upper));
      _mm512_store_si512(tile + kBlockBytes, t1.look_up(index, upper));
      tile += 2 * kBlockBytes;
    }
  }
}

// ---- large codebooks: entries of 4, 8 or 16 bytes, loaded one by one ----

inline __m128i load_entries8(const std::uint8_t *table, const std::uint16_t *index) {
  const __m128i low =
      _mm_loadl_epi64(reinterpret_cast<const __m128i *>(table + std::int64_t{index[0]} * 8));
  const auto *high = reinterpret_cast<const double *>(table + std::int64_t{index[1]} * 8);
  return _mm_castpd_si128(_mm_loadh_pd(_mm_castsi128_pd(low), high));
}

inline __m128i load_entries4(const std::uint8_t *table, const std::uint16_t *index) {
  std::int32_t entry[4];
  for (int i = 0; i < 4; ++i) {
    std::memcpy(entry + i, table + std::int64_t{index[i]} * 4, sizeof entry[i]);
  }
  return _mm_setr_epi32(entry[0], entry[1], entry[2], entry[3]);
}

inline __m512i join(__m128i a, __m128i b, __m128i c, __m128i d) {
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(c), d, 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

inline __m128i load_entry16(const std::uint8_t *table, std::uint16_t index) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i *>(table + std::int64_t{index} * 16));
}

// Two row sets of 8 columns; `index` [8 columns] of the index rows that they hold.
template <int kEntry>
class Entries;

template <>
class Entries<8> {
 public:
  explicit Entries(const std::uint8_t *table) : table_(table) {
    alignas(64) std::uint8_t order[kBlockBytes];
    for (int i = 0; i < kBlockBytes; ++i) {
      order[i] = static_cast<std::uint8_t>(i % kBlock * 8 + i / kBlock);
    }
    order_ = load_bytes(order);
  }
  static constexpr int kIndices = 16;  // of a pair
  void pair(const std::uint16_t *index, __m512i *w) const {
    w[0] = set(index);
    w[1] = set(index + 8);
  }

 private:
  __m512i set(const std::uint16_t *index) const {
    const __m512i entries =
        join(load_entries8(table_, index), load_entries8(table_, index + 2),
             load_entries8(table_, index + 4), load_entries8(table_, index + 6));
    return _mm512_permutexvar_epi8(order_, entries);
  }
  const std::uint8_t *table_;
  __m512i order_;
};

template <>
class Entries<4> {
 public:
  explicit Entries(const std::uint8_t *table) : table_(table) {
    alignas(64) std::uint8_t order[kBlockBytes];
    for (int i = 0; i < kBlockBytes; ++i) {
      const int row = i / kBlock;
      order[i] = static_cast<std::uint8_t>(row / 4 * 32 + i % kBlock * 4 + row % 4);
    }
    order_ = load_bytes(order);
  }
  static constexpr int kIndices = 32;
  void pair(const std::uint16_t *index, __m512i *w) const {
    w[0] = set(index);
    w[1] = set(index + 16);
  }

 private:
  __m512i set(const std::uint16_t *index) const {
    const __m512i entries =
        join(load_entries4(table_, index), load_entries4(table_, index + 4),
             load_entries4(table_, index + 8), load_entries4(table_, index + 12));
    return _mm512_permutexvar_epi8(order_, entries);
  }
  const std::uint8_t *table_;
  __m512i order_;
};

template <>
class Entries<16> {
 public:
  explicit Entries(const std::uint8_t *table) : table_(table) {
    alignas(64) std::uint8_t order[kBlockBytes];
    for (int i = 0; i < kBlockBytes; ++i) {
      order[i] = static_cast<std::uint8_t>(i % kBlock * 16 + i / kBlock);
    }
    low_ = load_bytes(order);
    high_ = _mm512_add_epi8(low_, _mm512_set1_epi8(8));
  }
  static constexpr int kIndices = 8;
  void pair(const std::uint16_t *index, __m512i *w) const {
    const __m512i left = join(load_entry16(table_, index[0]), load_entry16(table_, index[1]),
                              load_entry16(table_, index[2]), load_entry16(table_, index[3]));
    const __m512i right = join(load_entry16(table_, index[4]), load_entry16(table_, index[5]),
                               load_entry16(table_, index[6]), load_entry16(table_, index[7]));
    w[0] = _mm512_permutex2var_epi8(left, low_, right);
    w[1] = _mm512_permutex2var_epi8(left, high_, right);
  }

 private:
  const std::uint8_t *table_;
  __m512i low_;
  __m512i high_;
};

inline const std::uint16_t *indices_of(const std::uint8_t *codes) {
  return reinterpret_cast<const std::uint16_t *>(codes);
}

template <int kEntry>
void multiply_large(const MatrixJob &job, const MatrixStage &stage, const std::uint8_t *codes,
                    float *lanes) {
  constexpr int kPairs = 8 * kEntry / kPairRows;
  const Entries<kEntry> entries(stage.entries);
  const MatrixPart &part = *job.part;
  for (std::int32_t i = 0; i < kPairs * kPairRows; ++i) {
    lanes[i] = 0.0f;
  }
  for (std::int32_t column = 0; column < part.columns; column += part.segment) {
    const std::int32_t count = std::min(part.segment, part.columns - column);
    __m512i acc[2 * kPairs];
    for (__m512i &sum : acc) {
      sum = _mm512_setzero_si512();
    }
    for (std::int32_t c = column; c < column + count; c += kBlock) {
      const __m512i x = broadcast8(job.x.q + c);
      prefetch(codes);
      prefetch(codes + kBlockBytes);
      for (int pair = 0; pair < kPairs; ++pair) {
        __m512i w[2];
        entries.pair(indices_of(codes) + pair * Entries<kEntry>::kIndices, w);
        acc[2 * pair] = dot4(acc[2 * pair], w[0], x);
        acc[2 * pair + 1] = dot4(acc[2 * pair + 1], w[1], x);
      }
      codes += 2 * kBlockBytes;
    }
    const __m512i zero = _mm512_set1_epi32(stage.zero * segment_sum(job.x, 0, column, count));
    for (int pair = 0; pair < kPairs; ++pair) {
      const __m512i dots = _mm512_sub_epi32(add_halves(acc[2 * pair], acc[2 * pair + 1]), zero);
      float *out = lanes + pair * kPairRows;
      _mm512_store_ps(out, add_scaled(_mm512_load_ps(out), dots,
                                      _mm512_loadu_ps(stage.lane_scales + pair * kPairRows),
                                      job.x.scales[column / kActivationGroup]));
    }
  }
}

template <int kEntry>
void decode_large(const MatrixStage &stage, const std::uint8_t *codes, std::int32_t num_blocks,
                  std::uint8_t *tile) {
  const Entries<kEntry> entries(stage.entries);
  for (std::int32_t pair = 0; pair < stage.pairs; ++pair) {
    for (std::int32_t block = 0; block < num_blocks; ++block) {
      __m512i w[2];
      entries.pair(indices_of(codes + block * 2 * kBlockBytes) + pair * Entries<kEntry>::kIndices,
                   w);
      _mm512_store_si512(tile, w[0]);
      _mm512_store_si512(tile + kBlockBytes, w[1]);
      tile += 2 * kBlockBytes;
    }
  }
}

// ---- dispatch over formats ----

void decode_vq(const MatrixStage &stage, const std::uint8_t *codes, std::int32_t num_blocks,
               std::uint8_t *tile) {
  if (stage.decode == Decode::kVqSmall) {
    if (stage.num_codes <= 64) {
      decode_small<1>(stage, codes, num_blocks, tile);
    } else if (stage.num_codes <= 128) {
      decode_small<2>(stage, codes, num_blocks, tile);
    } else {
      decode_small<4>(stage, codes, num_blocks, tile);
    }
  } else if (stage.entry_bytes == 4) {
    decode_large<4>(stage, codes, num_blocks, tile);
  } else if (stage.entry_bytes == 8) {
    decode_large<8>(stage, codes, num_blocks, tile);
  } else {
    decode_large<16>(stage, codes, num_blocks, tile);
  }
}

struct Vbmi {
  static void decode(const MatrixStage &stage, std::int32_t panel, std::int32_t column,
                     std::int32_t count, std::uint8_t *tile) {
    if (decode_grid(stage, panel, column, count, tile)) {
      return;
    }
    const std::uint8_t *codes = stage.codes + panel * stage.panel_bytes;
    if (stage.decode == Decode::kTcq) {
      codes += std::int64_t{column} * 2 * stage.tcq->bits;
      with_tcq(stage, [&](const auto &decoder) { decode_pair(decoder, codes, count, tile); });
    } else {
      const std::int64_t bytes = stage.decode == Decode::kVqSmall ? 8 : 16;
      decode_vq(stage, codes + column * bytes, count / kBlock, tile);
    }
  }
};

void multiply_vq_stage(const MatrixJob &job, const MatrixStage &stage, std::int32_t panel,
                       float *lanes) {
  const std::uint8_t *codes = stage.codes + panel * stage.panel_bytes;
  if (stage.decode == Decode::kVqSmall) {
    if (stage.num_codes <= 64) {
      multiply_small<1>(job, stage, codes, lanes);
    } else if (stage.num_codes <= 128) {
      multiply_small<2>(job, stage, codes, lanes);
    } else {
      multiply_small<4>(job, stage, codes, lanes);
    }
  } else if (stage.entry_bytes == 4) {
    multiply_large<4>(job, stage, codes, lanes);
  } else if (stage.entry_bytes == 8) {
    multiply_large<8>(job, stage, codes, lanes);
  } else {
    multiply_large<16>(job, stage, codes, lanes);
  }
}

void multiply_vq_row(const MatrixJob &job, std::int32_t begin, std::int32_t end) {
  const MatrixPart &part = *job.part;
  alignas(64) float lanes[kMaxPairs * kPairRows];
  for (std::int32_t panel = begin; panel < end; ++panel) {
    for (std::int32_t s = 0; s < part.num_stages; ++s) {
      multiply_vq_stage(job, part.stages[s], panel, lanes);
      store_lanes(job, part.stages[s], panel, 0, lanes, s == 0, s + 1 == part.num_stages);
    }
  }
}

template <class Decoder>
void multiply_tcq(const MatrixJob &job, std::int32_t begin, std::int32_t end) {
  if (job.x.batch < kSharedRows) {
    multiply_any<Decoder>(job, begin, end);
  } else {
    multiply_tiles<Decoder>(job, begin, end);
  }
}

void panels(const MatrixJob &job, std::int32_t begin, std::int32_t end) {
  const MatrixStage &stage = job.part->stages[0];
  if (stage.decode == Decode::kTcq) {
    with_tcq(stage, [&](const auto &decoder) {
      multiply_tcq<std::decay_t<decltype(decoder)>>(job, begin, end);
    });
  } else if (!multiply_grid(job, begin, end)) {
    (job.x.batch == 1 ? multiply_vq_row : multiply_vectors<Vbmi>)(job, begin, end);
  }
}

}  // namespace

const MatrixOps matrix_ops_avx512_vbmi = {
    panels, Vbmi::decode, {layered_largest, layered_estimate}};

}  // namespace vq
