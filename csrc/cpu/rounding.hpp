// Rounding floats to integers without instructions of any tier: for |x| < 2^22 the bits of
// x + kRoundMagic, less kRoundMagicBits, are x rounded half to even.
#pragma once

#include <cstdint>

namespace vq {

constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23
constexpr std::int32_t kRoundMagicBits = 0x4b400000;

}  // namespace vq
