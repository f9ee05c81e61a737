// binary16 to binary32 and back without instructions of any tier. Internal linkage on purpose.
#pragma once

#include <cstdint>
#include <cstring>

namespace vq {

static inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t magnitude = half & 0x7fffu;
  std::uint32_t bits;
  float value;
  if (magnitude >= 0x7c00u) {
    bits = 0x7f800000u | (magnitude << 13);  // infinity or NaN
  } else if (magnitude >= 0x0400u) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {
    value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24, exact
    std::memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The same for finite values, without a branch: loops over it become vector code in every tier.
static inline float finite_half_to_float(std::uint16_t half) {
  std::uint32_t bits = (half & 0x7fffu) << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  value *= 5.192296858534828e33f;  // 2^112, the difference of the exponents' offsets; exact
  std::memcpy(&bits, &value, sizeof bits);
  bits |= (half & 0x8000u) << 16;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest even; finite values beyond the range become infinity.
static inline std::uint16_t float_to_half(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits >= 0x47800000u) {  // 65536 and above, infinity, NaN
    return static_cast<std::uint16_t>(sign | (bits > 0x7f800000u ? 0x7e00u : 0x7c00u));
  }
  if (bits < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, rounded by the adder
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<std::uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((bits - 0x38000000u) >> 13));
}

}  // namespace vq
