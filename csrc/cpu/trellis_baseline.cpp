// Baseline tier of the weight encoders: plain C++ that any compiler vectorises as far as it can.
#include <cstdint>

namespace vq {
namespace {

struct Lanes {
  float value[16];

  static Lanes all(float x) {
    Lanes lanes;
    for (float &lane : lanes.value) lane = x;
    return lanes;
  }
  static Lanes load(const float *p) {
    Lanes lanes;
    for (int i = 0; i < 16; ++i) lanes.value[i] = p[i];
    return lanes;
  }
  void store(float *p) const {
    for (int i = 0; i < 16; ++i) p[i] = value[i];
  }
  std::uint32_t below(const Lanes &limit) const {
    std::uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) mask |= static_cast<std::uint32_t>(value[i] < limit.value[i]) << i;
    return mask;
  }
  friend Lanes operator+(const Lanes &a, const Lanes &b) {
    Lanes lanes;
    for (int i = 0; i < 16; ++i) lanes.value[i] = a.value[i] + b.value[i];
    return lanes;
  }
  friend Lanes operator-(const Lanes &a, const Lanes &b) {
    Lanes lanes;
    for (int i = 0; i < 16; ++i) lanes.value[i] = a.value[i] - b.value[i];
    return lanes;
  }
  friend Lanes operator*(const Lanes &a, const Lanes &b) {
    Lanes lanes;
    for (int i = 0; i < 16; ++i) lanes.value[i] = a.value[i] * b.value[i];
    return lanes;
  }
  friend Lanes operator/(const Lanes &a, const Lanes &b) {
    Lanes lanes;
    for (int i = 0; i < 16; ++i) lanes.value[i] = a.value[i] / b.value[i];
    return lanes;
  }
  // a where a < b, else b: NaN in a never wins.
  friend Lanes lesser(const Lanes &a, const Lanes &b) {
    Lanes lanes;
    for (int i = 0; i < 16; ++i) lanes.value[i] = a.value[i] < b.value[i] ? a.value[i] : b.value[i];
    return lanes;
  }
};

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
