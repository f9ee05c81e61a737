// AVX2 tier: every format decodes in registers into a tile.
// vpmaddubsw multiplies unsigned codes by signed activations into 16-bit pair sums; codes of 8 bits
// would overflow them, so those become signed and lend their sign to the activations.
// Compiled with -mavx2 -mf16c; only reached after the run-time check in dispatch.cpp.
#include "matrix_avx2.hpp"
#include "matrix_layered.hpp"

namespace vq {
namespace {

constexpr std::int32_t kBlocksPerFlush = 8;    // 8 * 2 * 15 * 127 = 30480 fits 16 bits
constexpr std::int32_t kPrefetchBytes = 4096;  // as measured for the AVX-512 tiers

inline __m256i broadcast8(const std::int8_t *x) {
  std::int64_t word;
  std::memcpy(&word, x, sizeof word);
  return _mm256_set1_epi64x(word);
}

// ---- decoding of grids ----

inline void prefetch(const std::uint8_t *codes) {
  _mm_prefetch(reinterpret_cast<const char *>(codes + kPrefetchBytes), _MM_HINT_T0);
}

void decode_grid4(const std::uint8_t *codes, std::int32_t num_blocks, std::uint8_t *tile) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (std::int32_t block = 0; block < num_blocks; ++block) {
    prefetch(codes);
    for (std::int32_t at = 0; at < kBlockBytes; at += kHalf) {
      const __m256i bytes = load_half(codes + at);
      store_half(tile + at, _mm256_and_si256(bytes, mask));
      store_half(tile + kBlockBytes + at, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask));
    }
    codes += kBlockBytes;
    tile += 2 * kBlockBytes;
  }
}

void decode_layers(const std::uint8_t *upper, const std::uint8_t *lower, std::int32_t num_blocks,
                   std::uint8_t *tile) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (std::int32_t at = 0; at < num_blocks * kBlockBytes; at += kHalf) {
    prefetch(upper + at);
    prefetch(lower + at);
    const __m256i high = load_half(upper + at);
    const __m256i low = load_half(lower + at);
    const __m256i first = _mm256_slli_epi16(_mm256_and_si256(high, mask), 4);
    const __m256i second = _mm256_and_si256(_mm256_srli_epi16(low, 4), mask);
    std::uint8_t *blocks = tile + at / kBlockBytes * 2 * kBlockBytes + at % kBlockBytes;
    store_half(blocks, _mm256_or_si256(first, _mm256_and_si256(low, mask)));
    store_half(blocks + kBlockBytes, _mm256_or_si256(_mm256_andnot_si256(mask, high), second));
  }
}

// Half of four blocks out of bit pairs; `high` holds the third bits of the blocks from `bit` on.
inline void store_pairs(__m256i bytes, __m256i high, int bit, std::uint8_t *tile) {
  const __m256i three = _mm256_set1_epi8(3);
  const __m256i one = _mm256_set1_epi8(1);
  for (int i = 0; i < 4; ++i) {
    const __m256i low = _mm256_and_si256(_mm256_srli_epi16(bytes, 2 * i), three);
    const __m256i top = _mm256_and_si256(_mm256_srli_epi16(high, bit + i), one);
    store_half(tile + i * kBlockBytes, _mm256_or_si256(low, _mm256_slli_epi16(top, 2)));
  }
}

void decode_grid2(const std::uint8_t *codes, std::int32_t num_blocks, std::uint8_t *tile) {
  for (std::int32_t block = 0; block < num_blocks; block += 2) {
    prefetch(codes);
    for (std::int32_t at = 0; at < kBlockBytes; at += kHalf) {
      store_pairs(load_half(codes + at), _mm256_setzero_si256(), 0, tile + at);
    }
    codes += kBlockBytes;
    tile += 4 * kBlockBytes;
  }
}

void decode_grid3(const std::uint8_t *codes, std::int32_t num_blocks, std::uint8_t *tile) {
  for (std::int32_t block = 0; block < num_blocks; block += 4) {
    prefetch(codes);
    for (std::int32_t at = 0; at < kBlockBytes; at += kHalf) {
      const __m256i high = load_half(codes + at);
      store_pairs(load_half(codes + kBlockBytes + at), high, 0, tile + at);
      store_pairs(load_half(codes + 2 * kBlockBytes + at), high, 4, tile + 4 * kBlockBytes + at);
    }
    codes += 3 * kBlockBytes;
    tile += 8 * kBlockBytes;
  }
}

// ---- products: kSets row sets with kRows rows of activations ----

// A row set's sums, two per row: of rows 0-3 and of rows 4-7.
struct SetSums {
  __m256i upper;
  __m256i lower;
};

template <int kSets, int kRows>
struct Sums {
  SetSums of[kSets][kRows];
};

inline __m256i widen(__m256i pairs) {
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// Codes below 16.
template <int kSets, int kRows>
void add_small(const std::uint8_t *blocks, std::int32_t num_blocks, const std::int8_t *x,
               std::int64_t stride, Sums<kSets, kRows> &sums) {
  for (std::int32_t start = 0; start < num_blocks; start += kBlocksPerFlush) {
    const std::int32_t end = std::min(num_blocks, start + kBlocksPerFlush);
    Sums<kSets, kRows> pairs{};
    for (std::int32_t block = start; block < end; ++block) {
      const std::uint8_t *codes = blocks + block * 2 * kBlockBytes;
      for (int row = 0; row < kRows; ++row) {
        const __m256i values = broadcast8(x + row * stride + block * kBlock);
        for (int set = 0; set < kSets; ++set) {
          const std::uint8_t *at = codes + set * kBlockBytes;
          SetSums &sum = pairs.of[set][row];
          sum.upper = _mm256_add_epi16(sum.upper, _mm256_maddubs_epi16(load_half(at), values));
          sum.lower =
              _mm256_add_epi16(sum.lower, _mm256_maddubs_epi16(load_half(at + kHalf), values));
        }
      }
    }
    for (int row = 0; row < kRows; ++row) {
      for (int set = 0; set < kSets; ++set) {
        SetSums &sum = sums.of[set][row];
        sum.upper = _mm256_add_epi32(sum.upper, widen(pairs.of[set][row].upper));
        sum.lower = _mm256_add_epi32(sum.lower, widen(pairs.of[set][row].lower));
      }
    }
  }
}

inline __m256i add_products(__m256i sum, __m256i steps, __m256i values) {
  const __m256i pairs =
      _mm256_maddubs_epi16(_mm256_abs_epi8(steps), _mm256_sign_epi8(values, steps));
  return _mm256_add_epi32(sum, widen(pairs));
}

// Codes minus 128.
template <int kSets, int kRows>
void add_signed(const std::uint8_t *blocks, std::int32_t num_blocks, const std::int8_t *x,
                std::int64_t stride, Sums<kSets, kRows> &sums) {
  const __m256i flip = _mm256_set1_epi8(-128);
  for (std::int32_t block = 0; block < num_blocks; ++block) {
    const std::uint8_t *codes = blocks + block * 2 * kBlockBytes;
    for (int set = 0; set < kSets; ++set) {
      const std::uint8_t *at = codes + set * kBlockBytes;
      const __m256i upper = _mm256_xor_si256(load_half(at), flip);
      const __m256i lower = _mm256_xor_si256(load_half(at + kHalf), flip);
      for (int row = 0; row < kRows; ++row) {
        const __m256i values = broadcast8(x + row * stride + block * kBlock);
        SetSums &sum = sums.of[set][row];
        sum.upper = add_products(sum.upper, upper, values);
        sum.lower = add_products(sum.lower, lower, values);
      }
    }
  }
}

// Sums per row from (row, half of the columns) sums of rows 0-3 and 4-7.
inline __m256i add_halves(__m256i low, __m256i high) {
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), _MM_SHUFFLE(3, 1, 2, 0));
}

// Multiply and add stay two roundings, as in every tier: an FMA here would change the result.
inline void add_scaled(__m256i dots, const SegmentScale &scale, int lane, std::int32_t zero_shift,
                       std::int32_t sum, float x_scale, float *lanes) {
  const auto *zeros = reinterpret_cast<const __m256i *>(scale.zero + lane);
  const __m256i zero = _mm256_sub_epi32(_mm256_load_si256(zeros), _mm256_set1_epi32(zero_shift));
  const __m256i exact = _mm256_sub_epi32(dots, _mm256_mullo_epi32(zero, _mm256_set1_epi32(sum)));
  const __m256 factor = _mm256_mul_ps(_mm256_load_ps(scale.scale + lane), _mm256_set1_ps(x_scale));
  const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(exact), factor);
  _mm256_store_ps(lanes + lane, _mm256_add_ps(_mm256_load_ps(lanes + lane), product));
}

struct Avx2 {
  static constexpr int kRows = 4;

  static void decode(const MatrixStage &stage, std::int32_t panel, std::int32_t column,
                     std::int32_t count, std::uint8_t *tile) {
    const std::uint8_t *codes = stage.codes + panel * stage.panel_bytes;
    switch (stage.decode) {
      case Decode::kGrid2:
        return decode_grid2(codes + column * 4, count / kBlock, tile);
      case Decode::kGrid3:
        return decode_grid3(codes + column * 6, count / kBlock, tile);
      case Decode::kGrid4:
        return decode_grid4(codes + column * 8, count / kBlock, tile);
      case Decode::kLayers:
        return decode_layers(codes + column * 8,
                             stage.lower + panel * stage.panel_bytes + column * 8, count / kBlock,
                             tile);
      case Decode::kGrid8:
        return decode_tile_baseline(stage, panel, column, count, tile);
      default:
        return decode_codebooks(stage, panel, column, count, tile);
    }
  }

  static void load_scale(const MatrixPart &part, const MatrixStage &stage, std::int32_t panel,
                         std::int32_t pair, std::int32_t segment, SegmentScale &out) {
    out.has_small_codes = stage.decode == Decode::kGrid2 || stage.decode == Decode::kGrid3 ||
                          stage.decode == Decode::kGrid4;
    if (stage.lane_scales != nullptr || part.zeros != nullptr) {
      load_segment_scale(part, stage, panel, pair, segment, out);
      return;
    }
    const std::int64_t at =
        (std::int64_t{panel} * part.num_groups + segment / part.segments_per_group) * kPairRows;
    for (int lane = 0; lane < kPairRows; lane += kBlock) {
      const auto *halves = reinterpret_cast<const __m128i *>(part.scales + at + lane);
      _mm256_store_ps(out.scale + lane, _mm256_cvtph_ps(_mm_loadu_si128(halves)));
      _mm256_store_si256(reinterpret_cast<__m256i *>(out.zero + lane),
                         _mm256_set1_epi32(stage.zero));
    }
  }

  // As many row sets at once as leave their sums in registers.
  template <int kCount>
  static void segment_rows(const std::uint8_t *blocks, std::int32_t num_blocks,
                           const std::int8_t *x, std::int64_t x_stride, const SegmentScale &scale,
                           const std::int32_t *sums, const float *x_scales, float *lanes,
                           std::int64_t lanes_stride) {
    constexpr int kSets = kCount <= 2 ? 2 : 1;
    const std::int32_t zero_shift = scale.has_small_codes ? 0 : 128;
    for (int first = 0; first < 2; first += kSets) {
      Sums<kSets, kCount> dots{};
      if (scale.has_small_codes) {
        add_small(blocks + first * kBlockBytes, num_blocks, x, x_stride, dots);
      } else {
        add_signed(blocks + first * kBlockBytes, num_blocks, x, x_stride, dots);
      }
      for (int set = 0; set < kSets; ++set) {
        for (int row = 0; row < kCount; ++row) {
          const SetSums &sum = dots.of[set][row];
          add_scaled(add_halves(sum.upper, sum.lower), scale, (first + set) * kBlock, zero_shift,
                     sums[row], x_scales[row], lanes + row * lanes_stride);
        }
      }
    }
  }

  static void segment(const std::uint8_t *blocks, std::int32_t num_blocks, const std::int8_t *x,
                      std::int64_t x_stride, std::int32_t rows, const SegmentScale &scale,
                      const std::int32_t *sums, const float *x_scales, float *lanes,
                      std::int64_t lanes_stride) {
    using Segment =
        void (*)(const std::uint8_t *, std::int32_t, const std::int8_t *, std::int64_t,
                 const SegmentScale &, const std::int32_t *, const float *, float *, std::int64_t);
    static constexpr Segment kSegment[kRows] = {segment_rows<1>, segment_rows<2>, segment_rows<3>,
                                                segment_rows<4>};
    kSegment[rows - 1](blocks, num_blocks, x, x_stride, scale, sums, x_scales, lanes, lanes_stride);
  }
};

}  // namespace

const MatrixOps matrix_ops_avx2 = {
    TileLoops<Avx2>::panels, Avx2::decode, {layered_largest, layered_estimate}};

}  // namespace vq
