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
  std::uint32_t below(Lanes limit) const {
    return _mm512_cmp_ps_mask(value, limit.value, _CMP_LT_OQ);
  }
  std::uint32_t at_most(Lanes limit) const {
    return _mm512_cmp_ps_mask(value, limit.value, _CMP_LE_OQ);
  }
  friend Lanes lesser(Lanes a, Lanes b) { return {_mm512_min_ps(a.value, b.value)}; }
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

}  // namespace
}  // namespace vq
