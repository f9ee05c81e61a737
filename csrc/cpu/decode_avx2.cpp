// AVX2 tier of the decode step: 16 floats are two registers. Halves are widened by integer
// operations, so that the tier needs no F16C.
// Compiled with -mavx2; only reached after the run-time check in dispatch.cpp.
#include <immintrin.h>

#include "decode_kernels.hpp"

namespace vq {
namespace {

struct Floats {
  __m256 low;
  __m256 high;

  static Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static Floats load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  void store(float *p) const {
    _mm256_storeu_ps(p, low);
    _mm256_storeu_ps(p + 8, high);
  }
  static Floats min(Floats a, Floats b) {
    return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)};
  }
  static Floats max(Floats a, Floats b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
  }
  // p * 2^n, where n is the integer in the low mantissa bits of `shifted`.
  static Floats scale_by_power(Floats p, Floats shifted) {
    return {half_scale(p.low, shifted.low), half_scale(p.high, shifted.high)};
  }
  static __m256 half_scale(__m256 p, __m256 shifted) {
    const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
  }
  // Sums and differences of lanes `half` apart: the sum goes to the lower lane of a pair.
  template <int half>
  Floats butterfly() const {
    if constexpr (half == 8) {
      return {_mm256_add_ps(low, high), _mm256_sub_ps(low, high)};
    } else {
      return {half_butterfly<half>(low), half_butterfly<half>(high)};
    }
  }
  template <int half>
  static __m256 half_butterfly(__m256 x) {
    __m256 other;
    if constexpr (half == 4) {
      other = _mm256_permute2f128_ps(x, x, 1);
    } else {
      other = _mm256_permute_ps(x, half == 1 ? 0xb1 : 0x4e);
    }
    constexpr int kUpper = half == 1 ? 0xaa : half == 2 ? 0xcc : 0xf0;
    return _mm256_blend_ps(_mm256_add_ps(x, other), _mm256_sub_ps(other, x), kUpper);
  }
  friend Floats operator+(Floats a, Floats b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  friend Floats operator-(Floats a, Floats b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
  }
  friend Floats operator*(Floats a, Floats b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
  }
  friend Floats operator/(Floats a, Floats b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
  }
};

// Exact, denormals included: exponent and mantissa move into place, 2^112 mends the bias.
__m256 widen(const std::uint8_t *p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
  const __m256i bits = _mm256_cvtepu16_epi32(raw);
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x8000)), 16);
  const __m256i rest = _mm256_slli_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fff)), 13);
  const __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(rest), _mm256_set1_ps(0x1p112f));
  return _mm256_or_ps(value, _mm256_castsi256_ps(sign));
}

__m256 from_bytes(__m128i bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

Floats from_codes(__m128i codes) {
  return {from_bytes(codes), from_bytes(_mm_srli_si128(codes, 8))};
}

template <KvFormat format>
struct Codes;

template <>
struct Codes<KvFormat::kHalf> {
  static constexpr int kPairBytes = 64;
  static void load(const std::uint8_t *p, Floats &a, Floats &b) {
    a = {widen(p), widen(p + 16)};
    b = {widen(p + 32), widen(p + 48)};
  }
};

template <>
struct Codes<KvFormat::kInt8> {
  static constexpr int kPairBytes = 32;
  static void load(const std::uint8_t *p, Floats &a, Floats &b) {
    const auto *codes = reinterpret_cast<const __m128i *>(p);
    a = from_codes(_mm_loadu_si128(codes));
    b = from_codes(_mm_loadu_si128(codes + 1));
  }
};

template <>
struct Codes<KvFormat::kInt4> {
  static constexpr int kPairBytes = 16;
  static void load(const std::uint8_t *p, Floats &a, Floats &b) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    const __m128i mask = _mm_set1_epi8(15);
    a = from_codes(_mm_and_si128(bytes, mask));
    b = from_codes(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask));
  }
};

}  // namespace
}  // namespace vq

#define VQ_DECODE_QUERIES 2
#include "decode_tier.hpp"

namespace vq {

const DecodeOps decode_ops_avx2 = {
    rms_norm, silu_multiply, add, attend, store_key, store_value, rotate, nullptr, read_all};

}  // namespace vq
