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
  // Without fractions; values lie in 0..65535.
  void store_words(std::uint16_t *p) const {
    for (int i = 0; i < 16; ++i) {
      p[i] = static_cast<std::uint16_t>(static_cast<std::int32_t>(value[i]));
    }
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
  // a where a > b, else b.
  friend Lanes greater(const Lanes &a, const Lanes &b) {
    Lanes lanes;
    for (int i = 0; i < 16; ++i) lanes.value[i] = a.value[i] > b.value[i] ? a.value[i] : b.value[i];
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

// 32 unsigned 16-bit words.
struct Words {
  std::uint16_t value[32];

  static Words all(std::uint16_t x) {
    Words words;
    for (std::uint16_t &word : words.value) word = x;
    return words;
  }
  static Words load(const std::uint16_t *p) {
    Words words;
    for (int i = 0; i < 32; ++i) words.value[i] = p[i];
    return words;
  }
  friend Words greater(const Words &a, const Words &b) {
    Words words;
    for (int i = 0; i < 32; ++i) words.value[i] = a.value[i] > b.value[i] ? a.value[i] : b.value[i];
    return words;
  }
  // a - b, 0 where b is greater.
  friend Words minus(const Words &a, const Words &b) {
    Words words;
    for (int i = 0; i < 32; ++i) {
      const std::uint16_t most = a.value[i] > b.value[i] ? a.value[i] : b.value[i];
      words.value[i] = static_cast<std::uint16_t>(most - b.value[i]);
    }
    return words;
  }
  friend bool any_reaches(const Words &a, const Words &floor) {
    std::uint16_t reaches = 0;
    for (int i = 0; i < 32; ++i) {
      reaches = static_cast<std::uint16_t>(reaches | (a.value[i] >= floor.value[i]));
    }
    return reaches != 0;
  }
};

}  // namespace
}  // namespace vq
