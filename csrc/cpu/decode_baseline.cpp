// Baseline tier of the decode step: plain C++ that any compiler vectorises as far as it can.
#include <cstdint>
#include <cstring>

#include "decode_kernels.hpp"

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
    std::memcpy(out.value, p, sizeof out.value);
    return out;
  }
  void store(float *p) const { std::memcpy(p, value, sizeof value); }
  static Floats min(const Floats &a, const Floats &b) {
    Floats out;
    for (int i = 0; i < 16; ++i) out.value[i] = a.value[i] < b.value[i] ? a.value[i] : b.value[i];
    return out;
  }
  static Floats max(const Floats &a, const Floats &b) {
    Floats out;
    for (int i = 0; i < 16; ++i) out.value[i] = a.value[i] > b.value[i] ? a.value[i] : b.value[i];
    return out;
  }
  // p * 2^n, where n is the integer in the low mantissa bits of `shifted`.
  static Floats scale_by_power(const Floats &p, const Floats &shifted) {
    Floats out;
    for (int i = 0; i < 16; ++i) {
      std::uint32_t bits, power;
      std::memcpy(&bits, &p.value[i], sizeof bits);
      std::memcpy(&power, &shifted.value[i], sizeof power);
      bits += power << 23;
      std::memcpy(&out.value[i], &bits, sizeof bits);
    }
    return out;
  }
  // Sums and differences of lanes `half` apart: the sum goes to the lower lane of a pair.
  template <int half>
  Floats butterfly() const {
    Floats out;
    for (int i = 0; i < 16; i += 2 * half) {
      for (int j = i; j < i + half; ++j) {
        out.value[j] = value[j] + value[j + half];
        out.value[j + half] = value[j] - value[j + half];
      }
    }
    return out;
  }
#define VQ_LANEWISE(op)                                                          \
  friend Floats operator op(const Floats &a, const Floats &b) {                  \
    Floats out;                                                                  \
    for (int i = 0; i < 16; ++i) out.value[i] = a.value[i] op b.value[i];        \
    return out;                                                                  \
  }
  VQ_LANEWISE(+)
  VQ_LANEWISE(-)
  VQ_LANEWISE(*)
  VQ_LANEWISE(/)
#undef VQ_LANEWISE
};

// Exact, denormals included: exponent and mantissa move into place, 2^112 mends the bias.
void widen(const std::uint8_t *p, Floats &out) {
  for (int i = 0; i < 16; ++i) {
    std::uint16_t half;
    std::memcpy(&half, p + 2 * i, sizeof half);
    const std::uint32_t bits = (half & 0x7fffu) << 13;
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude *= 0x1p112f;
    out.value[i] = (half & 0x8000u) != 0 ? -magnitude : magnitude;
  }
}

template <KvFormat format>
struct Codes;

template <>
struct Codes<KvFormat::kHalf> {
  static constexpr int kPairBytes = 64;
  static void load(const std::uint8_t *p, Floats &a, Floats &b) {
    widen(p, a);
    widen(p + 32, b);
  }
};

template <>
struct Codes<KvFormat::kInt8> {
  static constexpr int kPairBytes = 32;
  static void load(const std::uint8_t *p, Floats &a, Floats &b) {
    for (int i = 0; i < 16; ++i) {
      a.value[i] = static_cast<float>(static_cast<std::int8_t>(p[i]));
      b.value[i] = static_cast<float>(static_cast<std::int8_t>(p[16 + i]));
    }
  }
};

template <>
struct Codes<KvFormat::kInt4> {
  static constexpr int kPairBytes = 16;
  static void load(const std::uint8_t *p, Floats &a, Floats &b) {
    for (int i = 0; i < 16; ++i) {
      a.value[i] = static_cast<float>(p[i] & 15);
      b.value[i] = static_cast<float>(p[i] >> 4);
    }
  }
};

}  // namespace
}  // namespace vq

#define VQ_DECODE_QUERIES 2
#include "decode_tier.hpp"

namespace vq {

const DecodeOps decode_ops_baseline = {
    rms_norm, silu_multiply, add, attend, store_key, store_value, rotate, nullptr, read_all};

}  // namespace vq
