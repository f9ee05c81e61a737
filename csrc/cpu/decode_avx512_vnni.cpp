// AVX-512 tier of the decode step: 16 floats are one register, halves convert in one instruction.
// Compiled with the flags of avx512_vnni; only reached after the run-time check in dispatch.cpp.
#include <immintrin.h>

#include "decode_kernels.hpp"

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

#define VQ_DECODE_QUERIES 4
#include "decode_tier.hpp"

namespace vq {

const DecodeOps decode_ops_avx512_vnni = {
    rms_norm, silu_multiply, add, attend, store_key, store_value, rotate, read_all};

}  // namespace vq
