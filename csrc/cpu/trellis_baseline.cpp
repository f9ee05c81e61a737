// Baseline tier of the weight encoders: plain C++ that any compiler vectorises as far as it can.
#include "lanes_baseline.hpp"

namespace vq {
namespace {

// Lanes (16 j + i) >> kBits of 16 for i = 0..15.
template <int kBits>
Lanes spread(const Lanes &from, int j) {
  Lanes lanes;
  for (int i = 0; i < 16; ++i) lanes.value[i] = from.value[(16 * j + i) >> kBits];
  return lanes;
}

}  // namespace
}  // namespace vq

#include "trellis_tier.hpp"

namespace vq {

const SweepOps sweep_ops_baseline = {viterbi, round_to_grid, subtract};

}  // namespace vq
