// AVX-512 VNNI tier: a chunk is one 512-bit register, vpdpbusd adds four products per output.
// Compiled with the flags of CMakeLists.txt; only reached after the run-time check in dispatch.cpp.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "q4_kernels.hpp"

namespace vq {
namespace {

// Cold 49152x576, 1 thread on Zen 5: 508 us without prefetch, 435 at 2 KiB, 413 at 4 KiB; more than
// 6 KiB gains nothing on small layers. Weights in cache do not notice.
constexpr int kPrefetchBytes = 4096;

__m512i broadcast4(const std::int8_t *q) {
  std::int32_t word;
  std::memcpy(&word, q, sizeof word);
  return _mm512_set1_epi32(word);
}

// Separate low and high accumulators hide the latency of vpdpbusd; integer sums are exact in any
// order.
__m512i dot_group(const std::uint8_t *w, const std::int8_t *q, std::int32_t num_chunks) {
  const __m512i mask = _mm512_set1_epi8(15);
  __m512i acc_low = _mm512_setzero_si512();
  __m512i acc_high = _mm512_setzero_si512();
  for (std::int32_t chunk = 0; chunk < num_chunks; ++chunk) {
    _mm_prefetch(reinterpret_cast<const char *>(w + kPrefetchBytes), _MM_HINT_T0);
    const __m512i bytes = _mm512_loadu_si512(w);
    const __m512i low = _mm512_and_si512(bytes, mask);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
    acc_low = _mm512_dpbusd_epi32(acc_low, low, broadcast4(q));
    acc_high = _mm512_dpbusd_epi32(acc_high, high, broadcast4(q + 4));
    q += VQ_Q4_CHUNK;
    w += VQ_Q4_CHUNK_BYTES;
  }
  return _mm512_add_epi32(acc_low, acc_high);
}

__m512i zero_term(const std::uint8_t *zeros, std::int32_t sum) {
  if (zeros == nullptr) {
    return _mm512_set1_epi32(VQ_Q4_SYMMETRIC_ZERO * sum);
  }
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(zeros));
  return _mm512_mullo_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(sum));
}

__m512 panel_row(const Q4Job &job, std::int32_t panel, std::int32_t row) {
  const vq_q4_matrix &m = *job.matrix;
  const std::int32_t chunks = m.in_features / VQ_Q4_CHUNK;
  const std::int32_t chunks_per_group = m.group_size / VQ_Q4_CHUNK;
  const std::uint8_t *w = m.codes + std::int64_t{panel} * chunks * VQ_Q4_CHUNK_BYTES;
  const std::int8_t *q = job.q + std::int64_t{row} * m.in_features;
  __m512 out = _mm512_setzero_ps();
  for (std::int32_t g = 0; g < job.num_groups; ++g) {
    const std::int32_t first = g * chunks_per_group;
    const __m512i acc =
        dot_group(w + std::int64_t{first} * VQ_Q4_CHUNK_BYTES, q + first * VQ_Q4_CHUNK,
                  std::min(chunks_per_group, chunks - first));
    const std::int64_t at = (std::int64_t{panel} * job.num_groups + g) * VQ_Q4_PANEL;
    const std::int64_t activation = std::int64_t{row} * job.num_groups + g;
    const std::uint8_t *zeros = m.zeros != nullptr ? m.zeros + at : nullptr;
    const __m512i exact = _mm512_sub_epi32(acc, zero_term(zeros, job.sums[activation]));
    const __m512 scale =
        _mm512_mul_ps(_mm512_loadu_ps(m.scales + at), _mm512_set1_ps(job.x_scales[activation]));
    // Two roundings, as in every tier: an FMA here would change the result.
    out = _mm512_add_ps(out, _mm512_mul_ps(_mm512_cvtepi32_ps(exact), scale));
  }
  return out;
}

}  // namespace

void q4_panels_avx512_vnni(const Q4Job &job, std::int32_t panel_begin, std::int32_t panel_end) {
  const std::int32_t num_outputs = job.matrix->out_features;
  for (std::int32_t panel = panel_begin; panel < panel_end; ++panel) {
    const std::int32_t first = panel * VQ_Q4_PANEL;
    const std::int32_t count = std::min<std::int32_t>(VQ_Q4_PANEL, num_outputs - first);
    const auto mask = static_cast<__mmask16>((1u << count) - 1u);
    for (std::int32_t row = 0; row < job.batch; ++row) {
      float *y = job.y + std::int64_t{row} * num_outputs + first;
      _mm512_mask_storeu_ps(y, mask, panel_row(job, panel, row));
    }
  }
}

}  // namespace vq
