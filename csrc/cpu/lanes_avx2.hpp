// 16 floats or 8 doubles as two AVX2 registers, see lanes_baseline.hpp.
#pragma once

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
  void store_words(std::uint16_t *p) const {
    const __m256i packed = _mm256_packus_epi32(_mm256_cvttps_epi32(low), _mm256_cvttps_epi32(high));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm256_permute4x64_epi64(packed, 0xd8));
  }
  std::uint32_t below(Lanes limit) const { return mask<_CMP_LT_OQ>(limit); }
  std::uint32_t at_most(Lanes limit) const { return mask<_CMP_LE_OQ>(limit); }
  friend Lanes lesser(Lanes a, Lanes b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
  }
  friend Lanes greater(Lanes a, Lanes b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
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

 private:
  template <int kPredicate>
  std::uint32_t mask(Lanes limit) const {
    const int first = _mm256_movemask_ps(_mm256_cmp_ps(low, limit.low, kPredicate));
    const int second = _mm256_movemask_ps(_mm256_cmp_ps(high, limit.high, kPredicate));
    return static_cast<std::uint32_t>(first | (second << 8));
  }
};

struct Doubles {
  __m256d low;
  __m256d high;

  static Doubles all(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
  static Doubles load(const double *p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
  void store(double *p) const {
    _mm256_storeu_pd(p, low);
    _mm256_storeu_pd(p + 4, high);
  }
  friend Doubles operator+(Doubles a, Doubles b) {
    return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)};
  }
  friend Doubles operator-(Doubles a, Doubles b) {
    return {_mm256_sub_pd(a.low, b.low), _mm256_sub_pd(a.high, b.high)};
  }
  friend Doubles operator*(Doubles a, Doubles b) {
    return {_mm256_mul_pd(a.low, b.low), _mm256_mul_pd(a.high, b.high)};
  }
};

struct Words {
  __m256i low;
  __m256i high;

  static Words all(std::uint16_t x) {
    const __m256i value = _mm256_set1_epi16(static_cast<short>(x));
    return {value, value};
  }
  static Words load(const std::uint16_t *p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + 16))};
  }
  friend Words greater(Words a, Words b) {
    return {_mm256_max_epu16(a.low, b.low), _mm256_max_epu16(a.high, b.high)};
  }
  friend Words minus(Words a, Words b) {
    return {_mm256_subs_epu16(a.low, b.low), _mm256_subs_epu16(a.high, b.high)};
  }
  friend bool any_reaches(Words a, Words floor) {
    const Words most = greater(a, floor);
    const __m256i either = _mm256_or_si256(_mm256_cmpeq_epi16(most.low, a.low),
                                           _mm256_cmpeq_epi16(most.high, a.high));
    return _mm256_testz_si256(either, either) == 0;
  }
};

}  // namespace
}  // namespace vq
