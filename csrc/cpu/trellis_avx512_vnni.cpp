// AVX-512 tier of the weight encoders: 16 states are one register, comparisons give their mask.
// Compiled with the flags of CMakeLists.txt; only reached after the run-time check in dispatch.cpp.
#include <immintrin.h>

#include <cstdint>

namespace vq {
namespace {

struct Lanes {
  __m512 value;

  static Lanes all(float x) { return {_mm512_set1_ps(x)}; }
  static Lanes load(const float *p) { return {_mm512_loadu_ps(p)}; }
  void store(float *p) const { _mm512_storeu_ps(p, value); }
  std::uint32_t below(Lanes limit) const {
    return _mm512_cmp_ps_mask(value, limit.value, _CMP_LT_OQ);
  }
  friend Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.value, b.value)}; }
  friend Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.value, b.value)}; }
  friend Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.value, b.value)}; }
  friend Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.value, b.value)}; }
  // a where a < b, else b: NaN in a never wins.
  friend Lanes lesser(Lanes a, Lanes b) { return {_mm512_min_ps(a.value, b.value)}; }
};

// Lanes (16 j + i) >> kBits of 16 for i = 0..15.
template <int kBits>
Lanes spread(Lanes from, int j) {
  const __m512i lane = _mm512_srli_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), kBits);
  const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32((16 * j) >> kBits));
  return {_mm512_permutexvar_ps(index, from.value)};
}

}  // namespace
}  // namespace vq

#include "trellis_tier.hpp"

namespace vq {

const SweepOps sweep_ops_avx512_vnni = {viterbi, round_to_grid, subtract};

}  // namespace vq
