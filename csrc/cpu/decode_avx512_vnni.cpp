// AVX-512 tier of the decode step: 16 floats are one register, halves convert in one instruction.
// Compiled with the flags of avx512_vnni; only reached after the run-time check in dispatch.cpp.
#include <immintrin.h>

#include "decode_kernels.hpp"
#include "rounding.hpp"

namespace vq {
namespace {

struct Floats {
  __m512 value;

  static Floats all(float x) { return {_mm512_set1_ps(x)}; }
  static Floats load(const float *p) { return {_mm512_loadu_ps(p)}; }
  void store(float *p) const { _mm512_storeu_ps(p, value); }
  static Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.value, b.value)}; }
  static Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.value, b.value)}; }
  // p * 2^n, where n is the integer in the low mantissa bits of `shifted`.
  static Floats scale_by_power(Floats p, Floats shifted) {
    const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted.value), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.value), power))};
  }
  // Sums and differences of lanes `half` apart: the sum goes to the lower lane of a pair.
  template <int half>
  Floats butterfly() const {
    __m512 other;
    if constexpr (half <= 2) {
      other = _mm512_permute_ps(value, half == 1 ? 0xb1 : 0x4e);
    } else {
      other = _mm512_shuffle_f32x4(value, value, half == 4 ? 0xb1 : 0x4e);
    }
    constexpr __mmask16 kUpper =
        half == 1 ? 0xaaaa : half == 2 ? 0xcccc : half == 4 ? 0xf0f0 : 0xff00;
    return {_mm512_mask_sub_ps(_mm512_add_ps(value, other), kUpper, other, value)};
  }
  friend Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.value, b.value)}; }
  friend Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.value, b.value)}; }
  friend Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.value, b.value)}; }
  friend Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.value, b.value)}; }
};

template <KvFormat format>
struct Codes;

template <>
struct Codes<KvFormat::kHalf> {
  static constexpr int kPairBytes = 64;
  static void load(const std::uint8_t *p, Floats &a, Floats &b) {
    const auto *halves = reinterpret_cast<const __m256i *>(p);
    a.value = _mm512_cvtph_ps(_mm256_loadu_si256(halves));
    b.value = _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1));
  }
};

template <>
struct Codes<KvFormat::kInt8> {
  static constexpr int kPairBytes = 32;
  static void load(const std::uint8_t *p, Floats &a, Floats &b) {
    const auto *codes = reinterpret_cast<const __m128i *>(p);
    a.value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes)));
    b.value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes + 1)));
  }
};

template <>
struct Codes<KvFormat::kInt4> {
  static constexpr int kPairBytes = 16;
  static void load(const std::uint8_t *p, Floats &a, Floats &b) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    const __m512i wide = _mm512_cvtepu8_epi32(bytes);
    a.value = _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)));
    b.value = _mm512_cvtepi32_ps(_mm512_srli_epi32(wide, 4));
  }
};

}  // namespace
}  // namespace vq

namespace vq {
namespace {

constexpr int kGroupVectors = kActivationGroup / 16;
constexpr float kSmallestMax = 1e-30f;  // below this, 127 / amax would overflow
constexpr std::int32_t kInfinityBits = 0x7f800000;

void load_group(const float *x, std::int32_t count, __m512 *values) {
  for (int i = 0; i < kGroupVectors; ++i) {
    const std::int32_t left = count - 16 * i;
    const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0);
    values[i] = _mm512_maskz_loadu_ps(mask, x + 16 * i);
  }
}

// max |x| as float bits, which order like the floats; NaN stands above infinity.
std::int32_t max_abs_bits(const __m512 *values) {
  __m512i highest = _mm512_setzero_si512();
  for (int i = 0; i < kGroupVectors; ++i) {
    const __m512i bits = _mm512_castps_si512(values[i]);
    highest = _mm512_max_epi32(highest, _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)));
  }
  return _mm512_reduce_max_epi32(highest);
}

__m512i round_codes(__m512 values, __m512 inverse) {
  const __m512 magic = _mm512_set1_ps(kRoundMagic);
  const __m512 shifted = _mm512_add_ps(_mm512_mul_ps(values, inverse), magic);
  return _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_castps_si512(magic));
}

bool quantize(const float *x, std::int32_t count, const ActivationBuffers &row) {
  std::int32_t *prefix = row.prefix;
  prefix[0] = 0;
  for (std::int32_t column = 0; column < count; column += kActivationGroup) {
    __m512 values[kGroupVectors];
    load_group(x + column, count - column, values);
    const std::int32_t bits = max_abs_bits(values);
    if (bits >= kInfinityBits) return false;
    const float amax = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
    const bool is_zero = amax < kSmallestMax;
    row.scales[column / kActivationGroup] = is_zero ? 0.0f : amax / 127.0f;
    const __m512 inverse = _mm512_set1_ps(is_zero ? 0.0f : 127.0f / amax);
    for (int i = 0; i < kGroupVectors; i += 2, ++prefix) {
      const __m512i a = round_codes(values[i], inverse);
      const __m512i b = round_codes(values[i + 1], inverse);
      auto *q = reinterpret_cast<__m128i *>(row.q + column + 16 * i);
      _mm_storeu_si128(q, _mm512_cvtepi32_epi8(a));
      _mm_storeu_si128(q + 1, _mm512_cvtepi32_epi8(b));
      prefix[1] = prefix[0] + _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
    }
  }
  return true;
}

}  // namespace
}  // namespace vq

#define VQ_DECODE_QUERIES 4
#include "decode_tier.hpp"

namespace vq {

const DecodeOps decode_ops_avx512_vnni = {
    rms_norm, silu_multiply, add, attend, store_key, store_value, rotate, quantize, read_all};

}  // namespace vq
