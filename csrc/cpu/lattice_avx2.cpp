// AVX2 tier of the lattice search: 16 codes are two registers.
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
  // a where a < b, else b: NaN in a never wins.
  friend Lanes lesser(Lanes a, Lanes b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
  }
};

}  // namespace
}  // namespace vq

#include "lattice_tier.hpp"

namespace vq {

const LatticeOps lattice_ops_avx2 = {distances, scan_finds, scan, mix, evaluate};

}  // namespace vq
