// Activations to int8. One implementation for all tiers, so that they agree bit for bit by
// construction; its loops vectorize without target flags and cost a few percent of a small layer.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vqkernels.h"

namespace {

constexpr float kSmallestMax = 1e-30f;  // below this, 127 / amax would overflow
constexpr std::uint32_t kInfinityBits = 0x7f800000u;
constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even
constexpr std::int32_t kRoundMagicBits = 0x4b400000;

// max |x| as float bits. Ordered like the floats, except that NaN compares above infinity, which is
// how bad input is found without a branch per value.
std::uint32_t max_abs_bits(const float *x, std::int32_t count) {
  std::int32_t max_bits = 0;
  for (std::int32_t k = 0; k < count; ++k) {
    std::int32_t bits;
    std::memcpy(&bits, x + k, sizeof bits);
    bits &= 0x7fffffff;
    max_bits = bits > max_bits ? bits : max_bits;
  }
  return static_cast<std::uint32_t>(max_bits);
}

std::int32_t quantize_group(const float *x, std::int32_t count, float inverse, std::int8_t *q) {
  std::int32_t sum = 0;
  for (std::int32_t k = 0; k < count; ++k) {
    const float shifted = x[k] * inverse + kRoundMagic;
    std::int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    const std::int32_t value = bits - kRoundMagicBits;
    q[k] = static_cast<std::int8_t>(value);
    sum += value;
  }
  return sum;
}

}  // namespace

std::int32_t vq_q8_quantize(const float *x, std::int32_t num_values, std::int32_t group_size,
                            std::int8_t *q, float *scales, std::int32_t *sums) {
  if (x == nullptr || q == nullptr || scales == nullptr || sums == nullptr) {
    return VQ_ERR_NULL;
  }
  if (num_values < 1 || num_values > VQ_MAX_FEATURES || group_size < 1 ||
      group_size > VQ_Q4_MAX_GROUP) {
    return VQ_ERR_SHAPE;
  }
  for (std::int32_t start = 0, g = 0; start < num_values; start += group_size, ++g) {
    const std::int32_t count = std::min(group_size, num_values - start);
    const std::uint32_t bits = max_abs_bits(x + start, count);
    if (bits >= kInfinityBits) {
      return VQ_ERR_NONFINITE;
    }
    float amax;
    std::memcpy(&amax, &bits, sizeof amax);
    const bool is_zero = amax < kSmallestMax;
    scales[g] = is_zero ? 0.0f : amax / 127.0f;
    sums[g] = quantize_group(x + start, count, is_zero ? 0.0f : 127.0f / amax, q + start);
  }
  return VQ_OK;
}
