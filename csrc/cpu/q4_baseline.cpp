// Portable tier: no intrinsics, no target flags; compiles on any architecture.
// Written in 8-lane loops of 16-bit products that compilers turn into SSE2 or NEON code.
#include <algorithm>
#include <cstring>

#include "q4_kernels.hpp"

namespace vq {
namespace {

constexpr int kLanes = 8;
constexpr int kStrips = VQ_Q4_CHUNK_BYTES / kLanes;

// Adds one chunk to the 64 running 16-bit sums (4 per output).
void add_chunk(const std::uint8_t *w, const std::int8_t *q, std::int16_t *sums) {
  std::int16_t q_low[kLanes];
  std::int16_t q_high[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    q_low[lane] = q[lane & 3];
    q_high[lane] = q[4 + (lane & 3)];
  }
  for (int strip = 0; strip < kStrips; ++strip) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const std::uint8_t byte = w[strip * kLanes + lane];
      const auto low = static_cast<std::int16_t>(byte & 15);
      const auto high = static_cast<std::int16_t>(byte >> 4);
      sums[strip * kLanes + lane] = static_cast<std::int16_t>(
          sums[strip * kLanes + lane] + low * q_low[lane] + high * q_high[lane]);
    }
  }
}

// Exact sums of q * code over num_chunks chunks, for the 16 outputs of a panel.
void dot_group(const std::uint8_t *w, const std::int8_t *q, std::int32_t num_chunks,
               std::int32_t *acc) {
  std::fill_n(acc, VQ_Q4_PANEL, 0);
  for (std::int32_t start = 0; start < num_chunks; start += kChunksPerFlushSingle) {
    const std::int32_t end = std::min(num_chunks, start + kChunksPerFlushSingle);
    std::int16_t sums[VQ_Q4_CHUNK_BYTES] = {};
    for (std::int32_t chunk = start; chunk < end; ++chunk) {
      add_chunk(w + std::int64_t{chunk} * VQ_Q4_CHUNK_BYTES, q + chunk * VQ_Q4_CHUNK, sums);
    }
    for (int r = 0; r < VQ_Q4_PANEL; ++r) {
      acc[r] += sums[4 * r] + sums[4 * r + 1] + sums[4 * r + 2] + sums[4 * r + 3];
    }
  }
}

void panel_row(const Q4Job &job, std::int32_t panel, std::int32_t row, float *out) {
  const vq_q4_matrix &m = *job.matrix;
  const std::int32_t chunks = m.in_features / VQ_Q4_CHUNK;
  const std::int32_t chunks_per_group = m.group_size / VQ_Q4_CHUNK;
  const std::uint8_t *w = m.codes + std::int64_t{panel} * chunks * VQ_Q4_CHUNK_BYTES;
  const std::int8_t *q = job.q + std::int64_t{row} * m.in_features;
  std::fill_n(out, VQ_Q4_PANEL, 0.0f);
  for (std::int32_t g = 0; g < job.num_groups; ++g) {
    const std::int32_t first = g * chunks_per_group;
    std::int32_t acc[VQ_Q4_PANEL];
    dot_group(w + std::int64_t{first} * VQ_Q4_CHUNK_BYTES, q + first * VQ_Q4_CHUNK,
              std::min(chunks_per_group, chunks - first), acc);
    const std::int64_t at = (std::int64_t{panel} * job.num_groups + g) * VQ_Q4_PANEL;
    const std::int64_t activation = std::int64_t{row} * job.num_groups + g;
    for (int r = 0; r < VQ_Q4_PANEL; ++r) {
      const int zero = m.zeros != nullptr ? m.zeros[at + r] : int{VQ_Q4_SYMMETRIC_ZERO};
      const float scale = m.scales[at + r] * job.x_scales[activation];
      out[r] += static_cast<float>(acc[r] - zero * job.sums[activation]) * scale;
    }
  }
}

}  // namespace

void q4_panels_baseline(const Q4Job &job, std::int32_t panel_begin, std::int32_t panel_end) {
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
