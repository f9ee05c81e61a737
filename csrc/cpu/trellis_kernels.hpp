// What the ISA tiers of the weight encoders share: declarations only, see matrix_kernels.hpp for why.
#pragma once

#include <cstdint>

namespace vq {

constexpr std::int32_t kSweepLanes = 16;

// The best path through a trellis for one column. States are bit-reversed, so that the successors
// of a state are neighbours and its predecessors lie 2^(state_bits - bits) apart.
struct ViterbiJob {
  const float *targets;  // [num_rows]
  const float *scales;   // [num_rows]
  const float *levels;   // [2^state_bits]
  float *costs;          // [2][2^state_bits] scratch
  std::uint16_t *winners;  // [num_rows][winners_per_row] scratch
  std::uint16_t *path;     // [num_rows] out: states
  std::int32_t num_rows;
  std::int32_t bits;
  std::int32_t state_bits;
  std::uint16_t start;  // state before the first row

  std::int64_t num_states() const { return std::int64_t{1} << state_bits; }
  std::int64_t num_successors() const { return std::int64_t{1} << bits; }
  // One bit per comparison: num_successors - 1 of them for every 2^bits states.
  std::int64_t winners_per_row() const {
    return (num_states() >> bits) / kSweepLanes * (num_successors() - 1);
  }
};

// One column on a uniform grid: code = nearest of 0..max_code to target / scale + zero.
struct GridJob {
  const float *targets;
  const float *scales;
  const std::uint8_t *zeros;
  float *values;  // out: what the codes mean
  std::uint8_t *codes;
  std::int32_t num_rows;
  float max_code;
};

struct SweepOps {
  void (*viterbi)(const ViterbiJob &job);
  void (*round_to_grid)(const GridJob &job);
  // y -= factor * x
  void (*subtract)(float factor, const float *x, float *y, std::int32_t count);
};

extern const SweepOps sweep_ops_baseline;
extern const SweepOps sweep_ops_avx2;
extern const SweepOps sweep_ops_avx512_vnni;

}  // namespace vq
