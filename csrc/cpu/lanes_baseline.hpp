// 16 floats or 8 doubles as one value: plain C++ that any compiler vectorises as far as it can.
// Internal linkage: every tier has types of its own with the same operations, bit for bit.
#pragma once

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
  // Masks of the lanes under a limit; NaN is under none.
  std::uint32_t below(const Lanes &limit) const {
    std::uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) mask |= static_cast<std::uint32_t>(value[i] < limit.value[i]) << i;
    return mask;
  }
  std::uint32_t at_most(const Lanes &limit) const {
    std::uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) mask |= static_cast<std::uint32_t>(value[i] <= limit.value[i]) << i;
    return mask;
  }
  // a where a < b, else b: NaN in a never wins.
  friend Lanes lesser(const Lanes &a, const Lanes &b) {
    Lanes lanes;
    for (int i = 0; i < 16; ++i) lanes.value[i] = a.value[i] < b.value[i] ? a.value[i] : b.value[i];
    return lanes;
  }
#define VQ_LANEWISE(Type, count, op)                                         \
  friend Type operator op(const Type &a, const Type &b) {                    \
    Type out;                                                                \
    for (int i = 0; i < count; ++i) out.value[i] = a.value[i] op b.value[i]; \
    return out;                                                              \
  }
  VQ_LANEWISE(Lanes, 16, +)
  VQ_LANEWISE(Lanes, 16, -)
  VQ_LANEWISE(Lanes, 16, *)
  VQ_LANEWISE(Lanes, 16, /)
};

struct Doubles {
  double value[8];

  static Doubles all(double x) {
    Doubles out;
    for (double &lane : out.value) lane = x;
    return out;
  }
  static Doubles load(const double *p) {
    Doubles out;
    for (int i = 0; i < 8; ++i) out.value[i] = p[i];
    return out;
  }
  void store(double *p) const {
    for (int i = 0; i < 8; ++i) p[i] = value[i];
  }
  VQ_LANEWISE(Doubles, 8, +)
  VQ_LANEWISE(Doubles, 8, -)
  VQ_LANEWISE(Doubles, 8, *)
};
#undef VQ_LANEWISE

}  // namespace
}  // namespace vq
