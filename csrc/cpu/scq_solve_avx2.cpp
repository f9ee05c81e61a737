// AVX2 tier of the SCQ solver: 16 floats or 8 doubles are two registers.
// Compiled with -mavx2; only reached after the run-time check in dispatch.cpp.
#include <immintrin.h>

#include <cstdint>

namespace vq {
namespace {

struct Floats {
  __m256 low;
  __m256 high;

  static Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Floats load(const float *p) {
    return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  }
  void store(float *p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }
  static Floats min(Floats a, Floats b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
  }
  std::uint32_t at_most(Floats limit) const {
    const int first = _mm256_movemask_ps(_mm256_cmp_ps(low, limit.low, _CMP_LE_OQ));
    const int second = _mm256_movemask_ps(_mm256_cmp_ps(high, limit.high, _CMP_LE_OQ));
    return static_cast<std::uint32_t>(first | (second << 8));
  }
  friend Floats operator+(Floats a, Floats b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  friend Floats operator-(Floats a, Floats b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
  }
  friend Floats operator*(Floats a, Floats b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
  }
};

struct Doubles {
  __m256d low;
  __m256d high;

  static Doubles all(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
  static Doubles load(const double *p) {
    return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)};
  }
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

}  // namespace
}  // namespace vq

// Four rows of 16 codes: eight registers of sums, of the sixteen there are.
#define VQ_SCQ_TILE_ROWS 4
#define VQ_SCQ_TILE_PANELS 1
#include "scq_solve_tier.hpp"

namespace vq {

const ScqOps scq_ops_avx2 = {solve_range, differentiate_range, scatter_all, nearest_range};

}  // namespace vq
