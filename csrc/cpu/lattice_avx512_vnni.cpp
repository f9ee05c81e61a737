// AVX-512 tier of the lattice search: 16 codes are one register, comparisons give their mask.
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
  // a where a < b, else b: NaN in a never wins.
  friend Lanes lesser(Lanes a, Lanes b) { return {_mm512_min_ps(a.value, b.value)}; }
};

}  // namespace
}  // namespace vq

#include "lattice_tier.hpp"

namespace vq {

const LatticeOps lattice_ops_avx512_vnni = {distances, scan_finds, scan, mix, evaluate};

}  // namespace vq
