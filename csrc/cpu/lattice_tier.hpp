// The loops of one tier, written once over `Lanes` (16 floats), which the including source file
// defines before. Everything has internal linkage, so no tier can leak into another. No FMA: each
// operation rounds on its own and the order of additions is fixed, so all tiers agree bit for bit.
#pragma once

#include "lattice_kernels.hpp"

namespace vq {
namespace {

// Four blocks at a time hide the latency of the additions.
template <int kBlocks>
void distance_blocks(const float *z, const float *transposed, std::int32_t features,
                     std::int32_t padded, float *out) {
  Lanes sums[kBlocks];
  for (int b = 0; b < kBlocks; ++b) {
    sums[b] = Lanes::all(0.0f);
  }
  for (std::int32_t f = 0; f < features; ++f) {
    const Lanes value = Lanes::all(z[f]);
    const float *row = transposed + static_cast<std::int64_t>(f) * padded;
    for (int b = 0; b < kBlocks; ++b) {
      const Lanes difference = value - Lanes::load(row + b * kLanes);
      sums[b] = sums[b] + difference * difference;
    }
  }
  for (int b = 0; b < kBlocks; ++b) {
    sums[b].store(out + b * kLanes);
  }
}

void distances(const float *z, const float *transposed, std::int32_t features, std::int32_t padded,
               float *out) {
  std::int32_t j = 0;
  for (; j + 4 * kLanes <= padded; j += 4 * kLanes) {
    distance_blocks<4>(z, transposed + j, features, padded, out + j);
  }
  for (; j < padded; j += kLanes) {
    distance_blocks<1>(z, transposed + j, features, padded, out + j);
  }
}

template <int kWeights>
void scan_weights(ScanJob &job, ScanHandler handler, void *context) {
  Lanes keep[kWeights];
  Lanes limit[kWeights];
  for (int w = 0; w < kWeights; ++w) {
    keep[w] = Lanes::all(job.keep[w]);
    limit[w] = Lanes::all(job.limit[w]);
  }
  for (std::int32_t j = 0; j < job.padded; j += kLanes) {
    const Lanes distance = Lanes::load(job.distances + j);
    const Lanes separation = Lanes::load(job.separation + j);
    std::uint32_t hits[kWeights];
    std::uint32_t any = 0;
    for (int w = 0; w < kWeights; ++w) {
      hits[w] = (distance - keep[w] * separation).below(limit[w]);
      any |= hits[w];
    }
    if (any == 0) {
      continue;
    }
    for (int w = 0; w < kWeights; ++w) {
      if (hits[w] != 0) {
        handler(context, job, w, j, hits[w]);
      }
    }
    for (int w = 0; w < kWeights; ++w) {
      limit[w] = Lanes::all(job.limit[w]);
    }
  }
}

void scan(ScanJob &job, ScanHandler handler, void *context) {
  switch (job.num_weights) {
    case 1:
      return scan_weights<1>(job, handler, context);
    case 2:
      return scan_weights<2>(job, handler, context);
    case 3:
      return scan_weights<3>(job, handler, context);
    case 4:
      return scan_weights<4>(job, handler, context);
    case 5:
      return scan_weights<5>(job, handler, context);
    case 6:
      return scan_weights<6>(job, handler, context);
    case 7:
      return scan_weights<7>(job, handler, context);
    default:
      return scan_weights<8>(job, handler, context);
  }
}

void mix(const float *const *rows, const float *weights, std::int32_t num_rows, float offset,
         std::int32_t padded, float *out) {
  for (std::int32_t j = 0; j < padded; j += kLanes) {
    Lanes sum = Lanes::load(rows[0] + j) * Lanes::all(weights[0]);
    for (std::int32_t r = 1; r < num_rows; ++r) {
      sum = sum + Lanes::load(rows[r] + j) * Lanes::all(weights[r]);
    }
    (sum + Lanes::all(offset)).store(out + j);
  }
}

void evaluate(const EvaluateJob &job, EvaluateHandler handler, void *context) {
  float limit = job.limit;
  alignas(64) float errors[kLanes];
  for (std::int32_t c = 0; c < job.padded; c += kLanes) {
    Lanes sum = Lanes::load(job.coefficients + c) * Lanes::all(job.values[0]);
    for (std::int32_t term = 1; term < job.num_terms; ++term) {
      const float *row = job.coefficients + static_cast<std::int64_t>(term) * job.padded + c;
      sum = sum + Lanes::load(row) * Lanes::all(job.values[term]);
    }
    const std::uint32_t hits = sum.below(Lanes::all(limit));
    if (hits != 0) {
      sum.store(errors);
      limit = handler(context, c, hits, errors);
    }
  }
}

}  // namespace
}  // namespace vq
