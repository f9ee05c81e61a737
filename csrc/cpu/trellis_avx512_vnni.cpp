// AVX-512 tier of the weight encoders: 16 states are one register, comparisons give their mask.
// Compiled with the flags of CMakeLists.txt; only reached after the run-time check in dispatch.cpp.
#include "lanes_avx512.hpp"

namespace vq {
namespace {

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
