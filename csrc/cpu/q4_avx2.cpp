// AVX2 tier: a chunk is two 256-bit registers (outputs 0..7 and 8..15); maddubs multiplies unsigned
// codes by signed activations into 16-bit pair sums, widened before they can overflow.
// Compiled with -mavx2; only reached after the run-time check in dispatch.cpp.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "q4_kernels.hpp"

namespace vq {
namespace {

constexpr int kHalf = 8;              // outputs per 256-bit register
constexpr int kPrefetchBytes = 4096;  // as measured for the AVX-512 tier

struct Halves {
  __m256i low;
  __m256i high;
};

__m256i broadcast4(const std::int8_t *q) {
  std::int32_t word;
  std::memcpy(&word, q, sizeof word);
  return _mm256_set1_epi32(word);
}

__m256i pair_sums(const std::uint8_t *w, __m256i q_low, __m256i q_high) {
  const __m256i mask = _mm256_set1_epi8(15);
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w));
  const __m256i low = _mm256_and_si256(bytes, mask);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
  return _mm256_add_epi16(_mm256_maddubs_epi16(low, q_low), _mm256_maddubs_epi16(high, q_high));
}

Halves dot_group(const std::uint8_t *w, const std::int8_t *q, std::int32_t num_chunks) {
  const __m256i ones = _mm256_set1_epi16(1);
  Halves acc{_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (std::int32_t start = 0; start < num_chunks; start += kChunksPerFlushPair) {
    const std::int32_t end = std::min(num_chunks, start + kChunksPerFlushPair);
    __m256i low = _mm256_setzero_si256();
    __m256i high = _mm256_setzero_si256();
    for (std::int32_t chunk = start; chunk < end; ++chunk) {
      const __m256i q_low = broadcast4(q);
      const __m256i q_high = broadcast4(q + 4);
      _mm_prefetch(reinterpret_cast<const char *>(w + kPrefetchBytes), _MM_HINT_T0);
      low = _mm256_add_epi16(low, pair_sums(w, q_low, q_high));
      high = _mm256_add_epi16(high, pair_sums(w + 32, q_low, q_high));
      q += VQ_Q4_CHUNK;
      w += VQ_Q4_CHUNK_BYTES;
    }
    acc.low = _mm256_add_epi32(acc.low, _mm256_madd_epi16(low, ones));
    acc.high = _mm256_add_epi32(acc.high, _mm256_madd_epi16(high, ones));
  }
  return acc;
}

__m256i zero_term(const std::uint8_t *zeros, std::int32_t sum) {
  if (zeros == nullptr) {
    return _mm256_set1_epi32(VQ_Q4_SYMMETRIC_ZERO * sum);
  }
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(zeros));
  return _mm256_mullo_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(sum));
}

// Multiply and add stay two roundings, as in every tier: an FMA here would change the result.
__m256 add_scaled(__m256 out, __m256i acc, const float *scales, float x_scale) {
  const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(scales), _mm256_set1_ps(x_scale));
  return _mm256_add_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(acc), scale));
}

void panel_row(const Q4Job &job, std::int32_t panel, std::int32_t row, float *result) {
  const vq_q4_matrix &m = *job.matrix;
  const std::int32_t chunks = m.in_features / VQ_Q4_CHUNK;
  const std::int32_t chunks_per_group = m.group_size / VQ_Q4_CHUNK;
  const std::uint8_t *w = m.codes + std::int64_t{panel} * chunks * VQ_Q4_CHUNK_BYTES;
  const std::int8_t *q = job.q + std::int64_t{row} * m.in_features;
  __m256 out_low = _mm256_setzero_ps();
  __m256 out_high = _mm256_setzero_ps();
  for (std::int32_t g = 0; g < job.num_groups; ++g) {
    const std::int32_t first = g * chunks_per_group;
    const Halves acc =
        dot_group(w + std::int64_t{first} * VQ_Q4_CHUNK_BYTES, q + first * VQ_Q4_CHUNK,
                  std::min(chunks_per_group, chunks - first));
    const std::int64_t at = (std::int64_t{panel} * job.num_groups + g) * VQ_Q4_PANEL;
    const std::int64_t activation = std::int64_t{row} * job.num_groups + g;
    const std::uint8_t *zeros = m.zeros != nullptr ? m.zeros + at : nullptr;
    const std::uint8_t *zeros_high = zeros != nullptr ? zeros + kHalf : nullptr;
    const std::int32_t sum = job.sums[activation];
    const float x_scale = job.x_scales[activation];
    out_low = add_scaled(out_low, _mm256_sub_epi32(acc.low, zero_term(zeros, sum)), m.scales + at,
                         x_scale);
    out_high = add_scaled(out_high, _mm256_sub_epi32(acc.high, zero_term(zeros_high, sum)),
                          m.scales + at + kHalf, x_scale);
  }
  _mm256_storeu_ps(result, out_low);
  _mm256_storeu_ps(result + kHalf, out_high);
}

}  // namespace

void q4_panels_avx2(const Q4Job &job, std::int32_t panel_begin, std::int32_t panel_end) {
  const std::int32_t num_outputs = job.matrix->out_features;
  for (std::int32_t panel = panel_begin; panel < panel_end; ++panel) {
    const std::int32_t first = panel * VQ_Q4_PANEL;
    const std::int32_t count = std::min<std::int32_t>(VQ_Q4_PANEL, num_outputs - first);
    for (std::int32_t row = 0; row < job.batch; ++row) {
      float out[VQ_Q4_PANEL];
      panel_row(job, panel, row, out);
      std::memcpy(job.y + std::int64_t{row} * num_outputs + first, out, count * sizeof(float));
    }
  }
}

}  // namespace vq
