// Baseline tier of the SCQ solver: plain C++ that any compiler vectorises as far as it can.
#include <cstdint>

namespace vq {
namespace {

struct Floats {
  float value[16];

  static Floats all(float x) {
    Floats out;
    for (float &lane : out.value) lane = x;
    return out;
  }
  static Floats load(const float *p) {
    Floats out;
    for (int i = 0; i < 16; ++i) out.value[i] = p[i];
    return out;
  }
  void store(float *p) const {
    for (int i = 0; i < 16; ++i) p[i] = value[i];
  }
  static Floats min(const Floats &a, const Floats &b) {
    Floats out;
    for (int i = 0; i < 16; ++i) out.value[i] = a.value[i] < b.value[i] ? a.value[i] : b.value[i];
    return out;
  }
  std::uint32_t at_most(const Floats &limit) const {
    std::uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) mask |= static_cast<std::uint32_t>(value[i] <= limit.value[i]) << i;
    return mask;
  }
#define VQ_LANEWISE(Type, count, op)                                              \
  friend Type operator op(const Type &a, const Type &b) {                         \
    Type out;                                                                     \
    for (int i = 0; i < count; ++i) out.value[i] = a.value[i] op b.value[i];      \
    return out;                                                                   \
  }
  VQ_LANEWISE(Floats, 16, +)
  VQ_LANEWISE(Floats, 16, -)
  VQ_LANEWISE(Floats, 16, *)
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

#define VQ_SCQ_TILE_ROWS 2
#define VQ_SCQ_TILE_PANELS 1
#include "scq_solve_tier.hpp"

namespace vq {

const ScqOps scq_ops_baseline = {solve_range, differentiate_range, scatter_all, nearest_range};

}  // namespace vq
