// What the ISA tiers of the SCQ solver share: declarations only, see matrix_kernels.hpp for why.
#pragma once

#include <cstdint>

#include "vqkernels.h"

namespace vq {

constexpr std::int32_t kScqLanes = 16;       // codes per panel of the float32 scan
constexpr std::int32_t kScqWide = 8;         // doubles per vector of the small systems
constexpr std::int32_t kScqCandidates = 32;  // codes that the exact active set keeps in view
constexpr std::int32_t kScqGuess = 64;       // codes that a guess takes in, at most
constexpr std::int32_t kScqGuessRows = (kScqGuess + 1) * kScqGuess;
constexpr std::int32_t kScqMaxSupport = 320;  // larger ones are left to the caller
constexpr std::int32_t kScqBlock = 24;       // latents scanned together

// One codebook in solver units: codes c = (given - centre) * inverse_radius, so that |c| <= 1.
struct ScqCodebook {
  const vq_scq_problem *given;
  const double *centre;     // [num_features]
  const float *panels;      // [padded / kScqLanes][num_features][kScqLanes]
  const float *rows;        // [num_codes][num_features], the same numbers
  const float *half_norms;  // [padded] |c|^2 / 2, +inf in the padding
  const float *no_norms;    // [padded] 0, +inf in the padding
  double radius;  // a power of two, so that the change of units is exact
  double inverse_radius;
  double lam;    // of these units: lam / radius^2
  double bonus;  // lam, or 0 for the ridge objective
  double reach;  // the largest |c|, in (1/2, 1]
  double diagonal;  // lam, or the ridge that keeps supports definite when lam is less
  std::int32_t padded;
  std::int32_t capacity;  // largest support, a multiple of kScqWide
  std::int32_t features;  // num_features up to a multiple of kScqWide
};

// Numbers that one thread works in, see Workspace in scq_solve.cpp.
struct ScqWorkspace {
  double *doubles;
  float *floats;
  std::int32_t *integers;
};

struct ScqOps {
  // Latents [begin, end).
  void (*solve)(const ScqCodebook &codebook, const vq_scq_solution &solution,
                const ScqWorkspace &workspace, std::int64_t begin, std::int64_t end);
  // Latents [begin, end): v into `multipliers` [N][max_support], dL/dz into grad_latents.
  void (*differentiate)(const ScqCodebook &codebook, const vq_scq_gradient &gradient,
                        const ScqWorkspace &workspace, double *multipliers, std::int64_t begin,
                        std::int64_t end);
  // Adds the share of every latent to grad_codebook, in order.
  void (*scatter)(const ScqCodebook &codebook, const vq_scq_gradient &gradient,
                  const ScqWorkspace &workspace, const double *multipliers);
  void (*nearest)(const ScqCodebook &codebook, const ScqWorkspace &workspace, std::int64_t *indices,
                  std::int64_t begin, std::int64_t end);
};

extern const ScqOps scq_ops_baseline;
extern const ScqOps scq_ops_avx2;
extern const ScqOps scq_ops_avx512_vnni;

}  // namespace vq
