// What the ISA tiers of the lattice search share: declarations only, see q4_kernels.hpp for why.
#pragma once

#include <cstdint>

namespace vq {

constexpr std::int32_t kLanes = 16;       // codes per block in every tier
constexpr std::int32_t kMaxWeights = 8;   // numerators 1..n/2 of the code that a scan adds
constexpr std::int32_t kMaxTerms = 10;    // 4 distances and 6 distances between 4 codes

// Adds one code to a point x: for every code j and weight w, d_j - keep_w |x - c_j|^2 is the error
// of keep_w x + (1 - keep_w) c_j, less keep_w |z - x|^2, over 1 - keep_w.
struct ScanJob {
  const float *distances;  // [padded] |z - c_j|^2, +inf in the padding
  const float *separation; // [padded] |x - c_j|^2, -inf where j must not be added
  std::int32_t padded;
  std::int32_t num_weights;  // 1..kMaxWeights
  float keep[kMaxWeights];
  float limit[kMaxWeights];  // the handler lowers these as better states are found
};

// Called for lanes of a 16-code block that fell under limit[weight] as it was when the block began.
using ScanHandler = void (*)(void *context, ScanJob &job, std::int32_t weight,
                             std::int32_t first_code, std::uint32_t lanes);

// Called likewise for 16 compositions; errors holds all 16.
using EvaluateHandler = float (*)(void *context, std::int32_t first, std::uint32_t lanes,
                                  const float *errors);

// Every composition c of one support: error = sum over terms of coefficients[term][c] *
// values[term], added in the order of the terms.
struct EvaluateJob {
  const float *coefficients;  // [num_terms][padded]
  std::int32_t padded;
  std::int32_t num_terms;
  float values[kMaxTerms];
  float limit;
};

struct LatticeOps {
  // out[j] = |z - c_j|^2 over the transposed codebook [features][padded], features added in order.
  void (*distances)(const float *z, const float *transposed, std::int32_t features,
                    std::int32_t padded, float *out);
  void (*scan)(ScanJob &job, ScanHandler handler, void *context);
  // out[j] = sum over r of weights[r] * rows[r][j], in order, plus offset.
  void (*mix)(const float *const *rows, const float *weights, std::int32_t num_rows, float offset,
              std::int32_t padded, float *out);
  void (*evaluate)(const EvaluateJob &job, EvaluateHandler handler, void *context);
};

extern const LatticeOps lattice_ops_baseline;
extern const LatticeOps lattice_ops_avx2;
extern const LatticeOps lattice_ops_avx512_vnni;

}  // namespace vq
