// AVX2 tier of the SCQ solver: 16 floats or 8 doubles are two registers.
// Compiled with -mavx2; only reached after the run-time check in dispatch.cpp.
#include "lanes_avx2.hpp"

namespace vq {
namespace {

// See scq_solve_baseline.cpp for these three.
float least(Lanes lanes) {
  const __m256 eight = _mm256_min_ps(lanes.low, lanes.high);
  const __m128 four = _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_min_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_min_ss(two, _mm_movehdup_ps(two)));
}

void pack(std::uint32_t mask, std::int32_t first, std::int32_t *out) {
  for (; mask != 0; mask &= mask - 1) {
    *out++ = first + __builtin_ctz(mask);
  }
}

void transpose_half(const float *const *rows, std::int32_t at, __m256 *out) {
  __m256 quad[4];
  for (int i = 0; i < 4; ++i) {
    quad[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[i] + at)),
                                   _mm_loadu_ps(rows[i + 4] + at), 1);
  }
  const __m256 a = _mm256_unpacklo_ps(quad[0], quad[1]);
  const __m256 b = _mm256_unpackhi_ps(quad[0], quad[1]);
  const __m256 c = _mm256_unpacklo_ps(quad[2], quad[3]);
  const __m256 d = _mm256_unpackhi_ps(quad[2], quad[3]);
  out[0] = _mm256_shuffle_ps(a, c, 0x44);
  out[1] = _mm256_shuffle_ps(a, c, 0xee);
  out[2] = _mm256_shuffle_ps(b, d, 0x44);
  out[3] = _mm256_shuffle_ps(b, d, 0xee);
}

void transpose4(const float *const *rows, std::int32_t at, Lanes *out) {
  __m256 low[4];
  __m256 high[4];
  transpose_half(rows, at, low);
  transpose_half(rows + 8, at, high);
  for (int i = 0; i < 4; ++i) {
    out[i] = {low[i], high[i]};
  }
}

}  // namespace
}  // namespace vq

// Four rows of 16 codes: eight registers of sums, of the sixteen there are.
#define VQ_SCQ_TILE_ROWS 4
#define VQ_SCQ_TILE_PANELS 1
#include "scq_solve_tier.hpp"

namespace vq {

const ScqOps scq_ops_avx2 = {solve_range, differentiate_range, scatter_all, nearest_range};

}  // namespace vq
