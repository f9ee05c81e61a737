// What the two AVX-512 tiers share: grid decoders, products of decoded blocks, and the loops around
// both. Everything is in an unnamed namespace of the including tier.
#pragma once

#include <immintrin.h>

#include "matrix_layered.hpp"
#include "matrix_tile.hpp"

namespace vq {
namespace {

// 4 KiB ahead is worth 20 % on weights from memory; weights in cache do not notice.
constexpr std::int32_t kPrefetchBytes = 4096;

inline __m512i load_bytes(const std::uint8_t *bytes) {
  return _mm512_loadu_si512(bytes);
}

inline void prefetch(const std::uint8_t *codes) {
  _mm_prefetch(reinterpret_cast<const char *>(codes + kPrefetchBytes), _MM_HINT_T0);
}

// Eight activations, once per row of a block.
inline __m512i broadcast8(const std::int8_t *x) {
  std::int64_t word;
  std::memcpy(&word, x, sizeof word);
  return _mm512_set1_epi64(word);
}

// acc + dot products of four unsigned with four signed bytes. As assembly, because GCC 12 copies and
// spills the accumulators of the intrinsic in loops: 1.4 times slower for batches.
inline __m512i dot4(__m512i acc, __m512i codes, __m512i x) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
  return acc;
}

// Two row sets of (columns 0-3, columns 4-7) sums per row to 16 sums.
inline __m512i add_halves(__m512i set0, __m512i set1) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_permutex2var_epi32(set0, even, set1),
                          _mm512_permutex2var_epi32(set0, odd, set1));
}

// Two roundings, as in every tier: an FMA here would change the result.
inline __m512 add_scaled(__m512 out, __m512i dots, __m512 scale, float x_scale) {
  const __m512 product =
      _mm512_mul_ps(_mm512_cvtepi32_ps(dots), _mm512_mul_ps(scale, _mm512_set1_ps(x_scale)));
  return _mm512_add_ps(out, product);
}

inline __m512 load_halves(const std::uint16_t *halves) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(halves)));
}

inline __m512i load_zeros(const std::uint8_t *zeros) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(zeros)));
}

// ---- decoders: step() turns bytes() codes at `p` into 2 * kBlocks blocks (set 0, set 1, ...) ----

struct Grid8 {
  static constexpr int kBlocks = 1;
  explicit Grid8(const MatrixStage &) {}
  static constexpr std::int64_t bytes() { return 128; }
  void step(const std::uint8_t *p, __m512i *w) const {
    w[0] = load_bytes(p);
    w[1] = load_bytes(p + kBlockBytes);
  }
};

struct Grid4 {
  static constexpr int kBlocks = 1;
  explicit Grid4(const MatrixStage &) {}
  static constexpr std::int64_t bytes() { return 64; }
  void step(const std::uint8_t *p, __m512i *w) const {
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i bytes = load_bytes(p);
    w[0] = _mm512_and_si512(bytes, mask);
    w[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
  }
};

// Two layers of four bits; codes lie in the upper one.
struct Layers {
  static constexpr int kBlocks = 1;
  std::ptrdiff_t to_lower;
  explicit Layers(const MatrixStage &stage) : to_lower(stage.lower - stage.codes) {}
  static constexpr std::int64_t bytes() { return 64; }
  void step(const std::uint8_t *p, __m512i *w) const {
    const __m512i mask = _mm512_set1_epi8(15);
    prefetch(p + to_lower);
    const __m512i upper = load_bytes(p);
    const __m512i lower = load_bytes(p + to_lower);
    // mask ? lower : upper, with the nibble that is wanted brought there
    w[0] = select(mask, lower, _mm512_slli_epi16(upper, 4));
    w[1] = select(mask, _mm512_srli_epi16(lower, 4), upper);
  }

 private:
  static __m512i select(__m512i mask, __m512i a, __m512i b) {
    return _mm512_ternarylogic_epi32(mask, a, b, 0xca);
  }
};

inline void split_pairs(__m512i bytes, __m512i *w) {
  const __m512i mask = _mm512_set1_epi8(3);
  w[0] = _mm512_and_si512(bytes, mask);
  w[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 2), mask);
  w[2] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
  w[3] = _mm512_and_si512(_mm512_srli_epi16(bytes, 6), mask);
}

struct Grid2 {
  static constexpr int kBlocks = 2;
  explicit Grid2(const MatrixStage &) {}
  static constexpr std::int64_t bytes() { return 64; }
  void step(const std::uint8_t *p, __m512i *w) const { split_pairs(load_bytes(p), w); }
};

// a | (b & c)
inline __m512i or_and(__m512i a, __m512i b, __m512i c) {
  return _mm512_ternarylogic_epi32(a, b, c, 0xf8);
}

struct Grid3 {
  static constexpr int kBlocks = 4;
  explicit Grid3(const MatrixStage &) {}
  static constexpr std::int64_t bytes() { return 192; }
  void step(const std::uint8_t *p, __m512i *w) const {
    const __m512i four = _mm512_set1_epi8(4);
    const __m512i high = load_bytes(p);
    split_pairs(load_bytes(p + kBlockBytes), w);
    split_pairs(load_bytes(p + 2 * kBlockBytes), w + 4);
    w[0] = or_and(w[0], _mm512_slli_epi16(high, 2), four);
    w[1] = or_and(w[1], _mm512_slli_epi16(high, 1), four);
    w[2] = or_and(w[2], high, four);
    w[3] = or_and(w[3], _mm512_srli_epi16(high, 1), four);
    w[4] = or_and(w[4], _mm512_srli_epi16(high, 2), four);
    w[5] = or_and(w[5], _mm512_srli_epi16(high, 3), four);
    w[6] = or_and(w[6], _mm512_srli_epi16(high, 4), four);
    w[7] = or_and(w[7], _mm512_srli_epi16(high, 5), four);
  }
};

// ---- one row of activations: decode in registers and multiply ----

// Sums of one segment, 16 lanes.
template <class Decoder>
inline __m512i dot_segment(const Decoder &decoder, const std::uint8_t *p, std::int32_t num_blocks,
                           const std::int8_t *q) {
  constexpr int kStep = Decoder::kBlocks > 2 ? Decoder::kBlocks : 2;  // blocks per turn
  __m512i even0 = _mm512_setzero_si512(), even1 = even0, odd0 = even0, odd1 = even0;
  for (std::int32_t block = 0; block < num_blocks; block += kStep) {
    __m512i w[2 * kStep];
    for (int i = 0; i < kStep / Decoder::kBlocks; ++i) {
      prefetch(p + i * decoder.bytes());
      decoder.step(p + i * decoder.bytes(), w + 2 * Decoder::kBlocks * i);
    }
    for (int i = 0; i < kStep; i += 2) {
      const __m512i x0 = broadcast8(q + i * kBlock);
      const __m512i x1 = broadcast8(q + (i + 1) * kBlock);
      even0 = dot4(even0, w[2 * i], x0);
      even1 = dot4(even1, w[2 * i + 1], x0);
      odd0 = dot4(odd0, w[2 * i + 2], x1);
      odd1 = dot4(odd1, w[2 * i + 3], x1);
    }
    p += kStep / Decoder::kBlocks * decoder.bytes();
    q += kStep * kBlock;
  }
  return add_halves(_mm512_add_epi32(even0, odd0), _mm512_add_epi32(even1, odd1));
}

inline __mmask16 valid_lanes(const MatrixPart &part, std::int32_t panel) {
  const std::int32_t count = std::min<std::int32_t>(kPairRows, part.rows - panel * kPairRows);
  return static_cast<__mmask16>((1u << count) - 1u);
}

// Formats with one pair per panel.
template <class Decoder>
void multiply_row(const MatrixJob &job, std::int32_t begin, std::int32_t end) {
  const MatrixPart &part = *job.part;
  const MatrixStage &stage = part.stages[0];
  const Decoder decoder(stage);
  const __m512 offset = _mm512_set1_ps(job.x.offsets != nullptr ? job.x.offsets[0] : 0.0f);
  for (std::int32_t panel = begin; panel < end; ++panel) {
    const std::uint8_t *codes = stage.codes + panel * stage.panel_bytes;
    const std::int64_t at = std::int64_t{panel} * part.num_groups * kPairRows;
    const std::uint16_t *scales = part.scales + at;
    const std::uint8_t *zeros = part.zeros != nullptr ? part.zeros + at : nullptr;
    __m512 out = _mm512_setzero_ps();
    std::int32_t until = part.segments_per_group;
    for (std::int32_t column = 0; column < part.columns; column += part.segment) {
      const std::int32_t count = std::min(part.segment, part.columns - column);
      const __m512i sum = _mm512_set1_epi32(segment_sum(job.x, 0, column, count));
      const __m512i zero = zeros != nullptr ? load_zeros(zeros) : _mm512_set1_epi32(stage.zero);
      const __m512i dots = dot_segment(decoder, codes, count / kBlock, job.x.q + column);
      out = add_scaled(out, _mm512_sub_epi32(dots, _mm512_mullo_epi32(zero, sum)),
                       load_halves(scales), job.x.scales[column / kActivationGroup]);
      codes += count / kBlock / Decoder::kBlocks * decoder.bytes();
      if (--until == 0) {
        until = part.segments_per_group;
        scales += kPairRows;
        zeros = zeros != nullptr ? zeros + kPairRows : nullptr;
      }
    }
    if (job.x.offsets != nullptr) {
      out = _mm512_add_ps(out, offset);
    }
    _mm512_mask_storeu_ps(job.y + part.row_begin + panel * kPairRows, valid_lanes(part, panel),
                          out);
  }
}

// ---- a few rows: every code is decoded once for up to eight of them ----

constexpr std::int32_t kRowsAtOnce = 8;      // more would spill accumulators
constexpr std::int32_t kBatchBytes = 24576;  // activations that stay in the first-level cache
constexpr std::int32_t kSharedRows = 4;      // from here a slow decoder pays for a tile

// Columns [begin, end) of one pair of row sets, whose codes lie at `codes`.
struct PairSlice {
  const std::uint8_t *codes;
  std::int32_t begin;
  std::int32_t end;
  const std::uint16_t *scales;  // [group][16], or nullptr:
  const float *lane_scales;     // [16], for all columns
  const std::uint8_t *zeros;    // [group][16], or nullptr:
  std::int32_t zero;
  float *y;  // 16 results of this row of the batch:
  std::int32_t first_row;
  std::int64_t y_stride;
  __mmask16 valid;
  bool adds_offsets;
};

// All columns of a panel of one pair.
inline PairSlice slice_of(const MatrixJob &job, std::int32_t panel, const std::uint8_t *codes) {
  const MatrixPart &part = *job.part;
  const std::int64_t at = std::int64_t{panel} * part.num_groups * kPairRows;
  return {codes,
          0,
          part.columns,
          part.scales + at,
          nullptr,
          part.zeros != nullptr ? part.zeros + at : nullptr,
          part.stages[0].zero,
          job.y + part.row_begin + panel * kPairRows,
          0,
          job.y_stride,
          valid_lanes(part, panel),
          job.x.offsets != nullptr};
}

// Sums of one segment for kRows rows of activations.
template <class Decoder, int kRows>
inline void dot_rows(const Decoder &decoder, const std::uint8_t *p, std::int32_t num_blocks,
                     const std::int8_t *q, std::int64_t stride, __m512i *sums) {
  __m512i set0[kRows], set1[kRows];
  for (int i = 0; i < kRows; ++i) {
    set0[i] = set1[i] = _mm512_setzero_si512();
  }
  for (std::int32_t block = 0; block < num_blocks; block += Decoder::kBlocks) {
    __m512i w[2 * Decoder::kBlocks];
    prefetch(p);
    decoder.step(p, w);
    for (int j = 0; j < Decoder::kBlocks; ++j) {
      for (int i = 0; i < kRows; ++i) {
        const __m512i x = broadcast8(q + i * stride + j * kBlock);
        set0[i] = dot4(set0[i], w[2 * j], x);
        set1[i] = dot4(set1[i], w[2 * j + 1], x);
      }
    }
    p += decoder.bytes();
    q += Decoder::kBlocks * kBlock;
  }
  for (int i = 0; i < kRows; ++i) {
    sums[i] = add_halves(set0[i], set1[i]);
  }
}

// Rows [row, row + kRows) of the batch. A slice that does not begin with column 0 goes on with the
// sums in y.
template <class Decoder, int kRows>
void multiply_slice(const MatrixJob &job, const Decoder &decoder, const PairSlice &slice,
                    std::int32_t row) {
  const MatrixPart &part = *job.part;
  const std::int64_t stride = padded_columns(job.x.columns);
  const std::int64_t groups = activation_groups(job.x.columns);
  const std::int64_t prefixes = prefix_length(job.x.columns);
  const std::int8_t *q = job.x.q + row * stride;
  const float *x_scales = job.x.scales + row * groups;
  const std::int32_t *prefix = job.x.prefix + row * prefixes;
  float *y = slice.y + (row - slice.first_row) * slice.y_stride;
  __m512 out[kRows];
  for (int i = 0; i < kRows; ++i) {
    out[i] = slice.begin == 0 ? _mm512_setzero_ps()
                              : _mm512_maskz_loadu_ps(slice.valid, y + i * slice.y_stride);
  }
  const std::uint8_t *codes = slice.codes;
  for (std::int32_t column = slice.begin; column < slice.end; column += part.segment) {
    const std::int32_t count = std::min(part.segment, slice.end - column);
    __m512i dots[kRows];
    dot_rows<Decoder, kRows>(decoder, codes, count / kBlock, q + column, stride, dots);
    codes += count / kBlock / Decoder::kBlocks * decoder.bytes();
    const std::int32_t group =
        slice.scales != nullptr ? column / part.segment / part.segments_per_group * kPairRows : 0;
    const __m512 scale = slice.scales != nullptr ? load_halves(slice.scales + group)
                                                 : _mm512_loadu_ps(slice.lane_scales);
    const __m512i zero =
        slice.zeros != nullptr ? load_zeros(slice.zeros + group) : _mm512_set1_epi32(slice.zero);
    const std::int32_t *before = prefix + column / kPrefixStep;
    const std::int32_t *after = prefix + (column + count) / kPrefixStep;
    for (int i = 0; i < kRows; ++i) {
      const __m512i sum = _mm512_set1_epi32(after[i * prefixes] - before[i * prefixes]);
      out[i] = add_scaled(out[i], _mm512_sub_epi32(dots[i], _mm512_mullo_epi32(zero, sum)), scale,
                          x_scales[i * groups + column / kActivationGroup]);
    }
  }
  const bool adds = slice.adds_offsets && slice.end == part.columns;
  for (int i = 0; i < kRows; ++i) {
    if (adds) {
      out[i] = _mm512_add_ps(out[i], _mm512_set1_ps(job.x.offsets[row + i]));
    }
    _mm512_mask_storeu_ps(y + i * slice.y_stride, slice.valid, out[i]);
  }
}

// Rows [begin, end) in equal blocks of at most kRowsAtOnce.
template <class Decoder>
void multiply_rows(const MatrixJob &job, const Decoder &decoder, const PairSlice &slice,
                   std::int32_t begin, std::int32_t end) {
  using Multiply = void (*)(const MatrixJob &, const Decoder &, const PairSlice &, std::int32_t);
  static constexpr Multiply kMultiply[kRowsAtOnce] = {
      multiply_slice<Decoder, 1>, multiply_slice<Decoder, 2>, multiply_slice<Decoder, 3>,
      multiply_slice<Decoder, 4>, multiply_slice<Decoder, 5>, multiply_slice<Decoder, 6>,
      multiply_slice<Decoder, 7>, multiply_slice<Decoder, 8>};
  const std::int32_t blocks = (end - begin + kRowsAtOnce - 1) / kRowsAtOnce;
  for (std::int32_t i = 0, row = begin; i < blocks; ++i) {
    const std::int32_t count = (end - row) / (blocks - i);
    kMultiply[count - 1](job, decoder, slice, row);
    row += count;
  }
}

// Decodes in registers for every block of rows: for decoders that are cheap beside the products.
template <class Decoder>
void multiply_batch(const MatrixJob &job, std::int32_t begin, std::int32_t end) {
  const MatrixPart &part = *job.part;
  const MatrixStage &stage = part.stages[0];
  const Decoder decoder(stage);
  const std::int32_t fitting = kBatchBytes / padded_columns(job.x.columns);
  const std::int32_t chunk = std::max(fitting / kRowsAtOnce, 1) * kRowsAtOnce;
  for (std::int32_t row = 0; row < job.x.batch; row += chunk) {
    for (std::int32_t panel = begin; panel < end; ++panel) {
      const PairSlice slice = slice_of(job, panel, stage.codes + panel * stage.panel_bytes);
      multiply_rows(job, decoder, slice, row, std::min(row + chunk, job.x.batch));
    }
  }
}

// ---- many rows: tiles ----

template <class Decoder>
void decode_pair(const Decoder &decoder, const std::uint8_t *codes, std::int32_t count,
                 std::uint8_t *tile) {
  for (std::int32_t block = 0; block < count / kBlock; block += Decoder::kBlocks) {
    __m512i w[2 * Decoder::kBlocks];
    prefetch(codes);
    decoder.step(codes, w);
    for (int i = 0; i < 2 * Decoder::kBlocks; ++i) {
      _mm512_store_si512(tile + i * kBlockBytes, w[i]);
    }
    codes += decoder.bytes();
    tile += 2 * Decoder::kBlocks * kBlockBytes;
  }
}

// Decodes into a tile that all rows share.
template <class Decoder>
void multiply_tiles(const MatrixJob &job, std::int32_t begin, std::int32_t end) {
  const MatrixPart &part = *job.part;
  const MatrixStage &stage = part.stages[0];
  const Decoder decoder(stage);
  const Grid8 decoded(stage);
  alignas(64) std::uint8_t tile[kTileColumns * kPairRows];
  for (std::int32_t panel = begin; panel < end; ++panel) {
    const std::uint8_t *codes = stage.codes + panel * stage.panel_bytes;
    PairSlice slice = slice_of(job, panel, tile);
    for (; slice.begin < part.columns; slice.begin = slice.end) {
      slice.end = std::min(slice.begin + kTileColumns, part.columns);
      const std::int32_t count = slice.end - slice.begin;
      decode_pair(decoder, codes, count, tile);
      codes += count / kBlock / Decoder::kBlocks * decoder.bytes();
      multiply_rows(job, decoded, slice, 0, job.x.batch);
    }
  }
}

inline bool decode_grid(const MatrixStage &stage, std::int32_t panel, std::int32_t column,
                        std::int32_t count, std::uint8_t *tile) {
  const std::uint8_t *codes = stage.codes + panel * stage.panel_bytes;
  switch (stage.decode) {
    case Decode::kGrid2:
      decode_pair(Grid2(stage), codes + column * 4, count, tile);
      return true;
    case Decode::kGrid3:
      decode_pair(Grid3(stage), codes + column * 6, count, tile);
      return true;
    case Decode::kGrid4:
      decode_pair(Grid4(stage), codes + column * 8, count, tile);
      return true;
    case Decode::kGrid8:
      decode_pair(Grid8(stage), codes + column * 16, count, tile);
      return true;
    case Decode::kLayers:
      decode_pair(Layers(stage), codes + column * 8, count, tile);
      return true;
    default:
      return false;
  }
}

// ---- codebooks: panels of several pairs, whose lanes are rows in another order ----

// lanes [pairs * 16] of one batch row to y, as store_lanes; lane_of[row] is the inverse of lane_rows.
inline void store_gathered(const MatrixJob &job, const float *lanes, const std::int32_t *lane_of,
                           std::int32_t count, std::int32_t row, bool first, bool last, float *y) {
  const bool has_offset = last && job.x.offsets != nullptr;
  const __m512 offset = _mm512_set1_ps(has_offset ? job.x.offsets[row] : 0.0f);
  for (std::int32_t at = 0; at < count; at += kPairRows) {
    const std::int32_t left = std::min(count - at, std::int32_t{kPairRows});
    const auto mask = static_cast<__mmask16>((1u << left) - 1u);
    const __m512i index = _mm512_load_si512(lane_of + at);
    __m512 sum = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, index, lanes, 4);
    if (!first) {
      sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y + at), sum);
    }
    if (has_offset) {
      sum = _mm512_add_ps(sum, offset);
    }
    _mm512_mask_storeu_ps(y + at, mask, sum);
  }
}

// Rows [row, row + batch) of one stage into lanes [batch][pairs][16].
template <class Tier>
void multiply_pairs(const MatrixJob &job, const MatrixStage &stage, std::int32_t panel,
                    std::int32_t row, std::int32_t batch, float *lanes) {
  alignas(64) std::uint8_t tile[kTileBytes];
  const MatrixPart &part = *job.part;
  const Grid8 decoded(stage);
  const std::int64_t scales_at = std::int64_t{panel} * part.num_groups * kPairRows;
  const std::int32_t lane_count = stage.pairs * kPairRows;
  const std::int32_t width =
      std::min(kTileColumns, kTileBytes / (lane_count * kActivationGroup) * kActivationGroup);
  for (std::int32_t column = 0; column < part.columns; column += width) {
    const std::int32_t count = std::min(width, part.columns - column);
    Tier::decode(stage, panel, column, count, tile);
    for (std::int32_t pair = 0; pair < stage.pairs; ++pair) {
      const std::int32_t at = pair * kPairRows;
      const bool by_lane = stage.lane_scales != nullptr;
      const PairSlice slice{
          tile + std::int64_t{at} * count,
          column,
          column + count,
          by_lane ? nullptr : part.scales + scales_at,
          by_lane ? stage.lane_scales + at : nullptr,
          part.zeros != nullptr ? part.zeros + scales_at : nullptr,
          stage.zero,
          lanes + at,
          row,
          lane_count,
          0xffff,
          false,
      };
      multiply_rows(job, decoded, slice, row, row + batch);
    }
  }
}

template <class Tier>
void multiply_vectors(const MatrixJob &job, std::int32_t begin, std::int32_t end) {
  alignas(64) float lanes[kBatchFloats];
  alignas(64) std::int32_t lane_of[kMaxPairs * kPairRows] = {};
  const MatrixPart &part = *job.part;
  for (std::int32_t panel = begin; panel < end; ++panel) {
    const std::int32_t base = panel * part.panel_rows;
    const std::int32_t valid = std::min(part.panel_rows, part.rows - base);
    for (std::int32_t s = 0; s < part.num_stages; ++s) {
      const MatrixStage &stage = part.stages[s];
      const std::int32_t lane_count = stage.pairs * kPairRows;
      for (std::int32_t lane = 0; lane < lane_count; ++lane) {
        if (stage.lane_rows[lane] >= 0) {
          lane_of[stage.lane_rows[lane]] = lane;
        }
      }
      const std::int32_t chunk = std::min(kBatchRows, kBatchFloats / lane_count);
      for (std::int32_t row = 0; row < job.x.batch; row += chunk) {
        const std::int32_t batch = std::min(chunk, job.x.batch - row);
        multiply_pairs<Tier>(job, stage, panel, row, batch, lanes);
        for (std::int32_t b = 0; b < batch; ++b) {
          float *y = job.y + (row + b) * job.y_stride + part.row_begin + base;
          store_gathered(job, lanes + b * lane_count, lane_of, valid, row + b,
                         s == 0 && part.begins_rows, s + 1 == part.num_stages, y);
        }
      }
    }
  }
}

// One row or many.
template <class Decoder>
void multiply_any(const MatrixJob &job, std::int32_t begin, std::int32_t end) {
  if (job.x.batch == 1) {
    multiply_row<Decoder>(job, begin, end);
  } else {
    multiply_batch<Decoder>(job, begin, end);
  }
}

inline bool multiply_grid(const MatrixJob &job, std::int32_t begin, std::int32_t end) {
  switch (job.part->stages[0].decode) {
    case Decode::kGrid2:
      multiply_any<Grid2>(job, begin, end);
      return true;
    case Decode::kGrid3:
      multiply_any<Grid3>(job, begin, end);
      return true;
    case Decode::kGrid4:
      multiply_any<Grid4>(job, begin, end);
      return true;
    case Decode::kGrid8:
      multiply_any<Grid8>(job, begin, end);
      return true;
    case Decode::kLayers:
      multiply_any<Layers>(job, begin, end);
      return true;
    default:
      return false;
  }
}

}  // namespace
}  // namespace vq
