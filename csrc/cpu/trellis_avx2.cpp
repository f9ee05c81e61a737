// AVX2 tier of the weight encoders: 16 states are two registers.
// Compiled with -mavx2; only reached after the run-time check in dispatch.cpp.
#include <immintrin.h>

#include <cstdint>

namespace vq {
namespace {

struct Lanes {
  __m256 low;
  __m256 high;

  static Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Lanes load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  void store(float *p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }
  std::uint32_t below(Lanes limit) const {
    const int first = _mm256_movemask_ps(_mm256_cmp_ps(low, limit.low, _CMP_LT_OQ));
    const int second = _mm256_movemask_ps(_mm256_cmp_ps(high, limit.high, _CMP_LT_OQ));
    return static_cast<std::uint32_t>(first | (second << 8));
  }
  friend Lanes operator+(Lanes a, Lanes b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  friend Lanes operator-(Lanes a, Lanes b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
  }
  friend Lanes operator*(Lanes a, Lanes b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
  }
  friend Lanes operator/(Lanes a, Lanes b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
  }
  // a where a < b, else b: NaN in a never wins.
  friend Lanes lesser(Lanes a, Lanes b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
  }
};

// Eight lanes from `first` on, each 2^kBits times; they never cross the middle.
template <int kBits>
__m256 repeat(Lanes from, int first) {
  const __m256i lane = _mm256_srli_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), kBits);
  const __m256i index = _mm256_add_epi32(lane, _mm256_set1_epi32(first % 8));
  return _mm256_permutevar8x32_ps(first < 8 ? from.low : from.high, index);
}

// Lanes (16 j + i) >> kBits of 16 for i = 0..15.
template <int kBits>
Lanes spread(Lanes from, int j) {
  return {repeat<kBits>(from, (16 * j) >> kBits), repeat<kBits>(from, (16 * j + 8) >> kBits)};
}

}  // namespace
}  // namespace vq

#include "trellis_tier.hpp"

namespace vq {

const SweepOps sweep_ops_avx2 = {viterbi, round_to_grid, subtract};

}  // namespace vq
