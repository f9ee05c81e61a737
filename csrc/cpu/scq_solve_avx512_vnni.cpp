// AVX-512 tier of the SCQ solver: 16 floats or 8 doubles are one register.
// Compiled with the flags of avx512_vnni; only reached after the run-time check in dispatch.cpp.
#include "lanes_avx512.hpp"

namespace vq {
namespace {

// See scq_solve_baseline.cpp for these three.
float least(Lanes lanes) {
  return _mm512_reduce_min_ps(lanes.value);
}

// Writes 16 numbers always.
void pack(std::uint32_t mask, std::int32_t first, std::int32_t *out) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i numbers = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), numbers));
}

void transpose4(const float *const *rows, std::int32_t at, Lanes *out) {
  __m512 quad[4];
  for (int i = 0; i < 4; ++i) {
    quad[i] = _mm512_castps128_ps512(_mm_loadu_ps(rows[i] + at));
    quad[i] = _mm512_insertf32x4(quad[i], _mm_loadu_ps(rows[i + 4] + at), 1);
    quad[i] = _mm512_insertf32x4(quad[i], _mm_loadu_ps(rows[i + 8] + at), 2);
    quad[i] = _mm512_insertf32x4(quad[i], _mm_loadu_ps(rows[i + 12] + at), 3);
  }
  const __m512 a = _mm512_unpacklo_ps(quad[0], quad[1]);
  const __m512 b = _mm512_unpackhi_ps(quad[0], quad[1]);
  const __m512 c = _mm512_unpacklo_ps(quad[2], quad[3]);
  const __m512 d = _mm512_unpackhi_ps(quad[2], quad[3]);
  out[0] = {_mm512_shuffle_ps(a, c, 0x44)};
  out[1] = {_mm512_shuffle_ps(a, c, 0xee)};
  out[2] = {_mm512_shuffle_ps(b, d, 0x44)};
  out[3] = {_mm512_shuffle_ps(b, d, 0xee)};
}

}  // namespace
}  // namespace vq

#define VQ_SCQ_TILE_ROWS 6
#define VQ_SCQ_TILE_PANELS 2
#include "scq_solve_tier.hpp"

namespace vq {

const ScqOps scq_ops_avx512_vnni = {solve_range, differentiate_range, scatter_all, nearest_range};

}  // namespace vq
