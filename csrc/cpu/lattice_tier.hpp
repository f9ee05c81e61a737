// The loops of one tier, written once over `Lanes` (16 floats), which the including source file
// includes before. Everything has internal linkage, so no tier can leak into another. No FMA: each
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

// Least rest per weight over kBlocks blocks; weights follow each other by one subtraction.
template <int kWeights, int kBlocks>
void lower(const ScanJob &job, std::int32_t first, Lanes keep, Lanes (*least)[kWeights]) {
  for (int b = 0; b < kBlocks; ++b) {
    const std::int32_t j = first + b * kLanes;
    const Lanes separation = Lanes::load(job.separation + j);
    Lanes rest = Lanes::load(job.distances + j) - keep * separation;
    least[b][0] = lesser(rest, least[b][0]);
    for (int w = 1; w < kWeights; ++w) {
      rest = rest - separation;
      least[b][w] = lesser(rest, least[b][w]);
    }
  }
}

// Errors grow with `rest`, so per weight only its minimum counts. Few weights take several blocks
// at a time to hide latencies.
template <int kWeights>
bool finds(const ScanJob &job) {
  constexpr int kBlocks = kWeights == 1 ? 4 : kWeights == 2 ? 2 : 1;
  const Lanes keep = Lanes::all(job.first_keep);
  Lanes least[kBlocks][kWeights];
  for (int b = 0; b < kBlocks; ++b) {
    for (int w = 0; w < kWeights; ++w) {
      least[b][w] = Lanes::all(__builtin_inff());
    }
  }
  std::int32_t j = 0;
  for (; j + kBlocks * kLanes <= job.padded; j += kBlocks * kLanes) {
    lower<kWeights, kBlocks>(job, j, keep, least);
  }
  for (; j < job.padded; j += kLanes) {
    lower<kWeights, 1>(job, j, keep, least);
  }
  for (int b = 1; b < kBlocks; ++b) {
    for (int w = 0; w < kWeights; ++w) {
      least[0][w] = lesser(least[b][w], least[0][w]);
    }
  }
  Lanes error = Lanes::all(job.kept[0]) + Lanes::all(job.add[0]) * least[0][0];
  for (int w = 1; w < kWeights; ++w) {
    error = lesser(Lanes::all(job.kept[w]) + Lanes::all(job.add[w]) * least[0][w], error);
  }
  return error.below(Lanes::all(job.limit)) != 0;
}

bool scan_finds(const ScanJob &job) {
  switch (job.num_weights) {
    case 1:
      return finds<1>(job);
    case 2:
      return finds<2>(job);
    case 3:
      return finds<3>(job);
    case 4:
      return finds<4>(job);
    case 5:
      return finds<5>(job);
    case 6:
      return finds<6>(job);
    case 7:
      return finds<7>(job);
    default:
      return finds<8>(job);
  }
}

void scan(const ScanJob &job, BlockHandler handler, void *context) {
  float limit = job.limit;
  alignas(64) float errors[kLanes];
  for (std::int32_t j = 0; j < job.padded; j += kLanes) {
    const Lanes separation = Lanes::load(job.separation + j);
    Lanes rest = Lanes::load(job.distances + j) - Lanes::all(job.first_keep) * separation;
    for (std::int32_t w = 0; w < job.num_weights; ++w) {
      const Lanes error = Lanes::all(job.kept[w]) + Lanes::all(job.add[w]) * rest;
      const std::uint32_t lanes = error.below(Lanes::all(limit));
      if (lanes != 0) {
        error.store(errors);
        limit = handler(context, j, w, lanes, errors);
      }
      rest = rest - separation;
    }
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

void evaluate(const EvaluateJob &job, BlockHandler handler, void *context) {
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
      limit = handler(context, c, 0, hits, errors);
    }
  }
}

}  // namespace
}  // namespace vq
