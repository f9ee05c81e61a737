// 16 floats or 8 doubles as one AVX-512 register, see lanes_baseline.hpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace vq {
namespace {

struct Lanes {
  __m512 value;

  static Lanes all(float x) { return {_mm512_set1_ps(x)}; }
  static Lanes load(const float *p) { return {_mm512_loadu_ps(p)}; }
  void store(float *p) const { _mm512_storeu_ps(p, value); }
  void store_words(std::uint16_t *p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p),
                        _mm512_cvtusepi32_epi16(_mm512_cvttps_epi32(value)));
  }
  std::uint32_t below(Lanes limit) const {
    return _mm512_cmp_ps_mask(value, limit.value, _CMP_LT_OQ);
  }
  std::uint32_t at_most(Lanes limit) const {
    return _mm512_cmp_ps_mask(value, limit.value, _CMP_LE_OQ);
  }
  friend Lanes lesser(Lanes a, Lanes b) { return {_mm512_min_ps(a.value, b.value)}; }
  friend Lanes greater(Lanes a, Lanes b) { return {_mm512_max_ps(a.value, b.value)}; }
  friend Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.value, b.value)}; }
  friend Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.value, b.value)}; }
  friend Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.value, b.value)}; }
  friend Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.value, b.value)}; }
};

struct Doubles {
  __m512d value;

  static Doubles all(double x) { return {_mm512_set1_pd(x)}; }
  static Doubles load(const double *p) { return {_mm512_loadu_pd(p)}; }
  void store(double *p) const { _mm512_storeu_pd(p, value); }
  friend Doubles operator+(Doubles a, Doubles b) { return {_mm512_add_pd(a.value, b.value)}; }
  friend Doubles operator-(Doubles a, Doubles b) { return {_mm512_sub_pd(a.value, b.value)}; }
  friend Doubles operator*(Doubles a, Doubles b) { return {_mm512_mul_pd(a.value, b.value)}; }
};

struct Words {
  __m512i value;

  static Words all(std::uint16_t x) { return {_mm512_set1_epi16(static_cast<short>(x))}; }
  static Words load(const std::uint16_t *p) { return {_mm512_loadu_si512(p)}; }
  friend Words greater(Words a, Words b) { return {_mm512_max_epu16(a.value, b.value)}; }
  friend Words minus(Words a, Words b) { return {_mm512_subs_epu16(a.value, b.value)}; }
  friend bool any_reaches(Words a, Words floor) {
    return _mm512_cmpge_epu16_mask(a.value, floor.value) != 0;
  }
};

}  // namespace
}  // namespace vq
