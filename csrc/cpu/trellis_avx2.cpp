// AVX2 tier of the weight encoders: 16 states are two registers.
// Compiled with -mavx2; only reached after the run-time check in dispatch.cpp.
#include "lanes_avx2.hpp"

namespace vq {
namespace {

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
