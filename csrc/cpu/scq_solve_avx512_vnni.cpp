// AVX-512 tier of the SCQ solver: 16 floats or 8 doubles are one register.
// Compiled with the flags of avx512_vnni; only reached after the run-time check in dispatch.cpp.
#include <immintrin.h>

#include <cstdint>

namespace vq {
namespace {

struct Floats {
  __m512 value;

  static Floats all(float x) { return {_mm512_set1_ps(x)}; }
  static Floats load(const float *p) { return {_mm512_loadu_ps(p)}; }
  void store(float *p) const { _mm512_storeu_ps(p, value); }
  static Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.value, b.value)}; }
  std::uint32_t at_most(Floats limit) const {
    return _mm512_cmp_ps_mask(value, limit.value, _CMP_LE_OQ);
  }
  friend Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.value, b.value)}; }
  friend Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.value, b.value)}; }
  friend Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.value, b.value)}; }
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

#define VQ_SCQ_TILE_ROWS 6
#define VQ_SCQ_TILE_PANELS 2
#include "scq_solve_tier.hpp"

namespace vq {

const ScqOps scq_ops_avx512_vnni = {solve_range, differentiate_range, scatter_all, nearest_range};

}  // namespace vq
