// What the ISA tiers share: the job description and one entry point per tier.
// Declarations and constants only: an inline function here would be compiled once per tier, and the
// linker could keep the AVX-512 copy for everybody.
#pragma once

#include <cstdint>

#include "vqkernels.h"

namespace vq {

// One GEMV over already quantized activations. Row b of q is in_features values apart, row b of
// x_scales and sums is num_groups apart.
struct Q4Job {
  const vq_q4_matrix *matrix;
  const std::int8_t *q;
  const float *x_scales;
  const std::int32_t *sums;
  float *y;
  std::int32_t batch;
  std::int32_t num_groups;
};

// Computes the outputs of panels [panel_begin, panel_end) for every batch row.
using Q4PanelsFn = void (*)(const Q4Job &job, std::int32_t panel_begin, std::int32_t panel_end);

void q4_panels_baseline(const Q4Job &job, std::int32_t panel_begin, std::int32_t panel_end);
void q4_panels_avx2(const Q4Job &job, std::int32_t panel_begin, std::int32_t panel_end);
void q4_panels_avx512_vnni(const Q4Job &job, std::int32_t panel_begin, std::int32_t panel_end);

// Chunks whose 16-bit partial sums cannot overflow: a chunk adds two products of at most
// 15 * 127 to each 16-bit lane (four for a pair lane of maddubs).
constexpr std::int32_t kChunksPerFlushSingle = 8;  // 8 * 2 * 1905 = 30480
constexpr std::int32_t kChunksPerFlushPair = 4;    // 4 * 4 * 1905 = 30480

}  // namespace vq
