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

Range range(const float *values, std::int32_t padded) {
  Lanes least = Lanes::load(values);
  Lanes most = least;
  for (std::int32_t j = kLanes; j < padded; j += kLanes) {
    least = lesser(Lanes::load(values + j), least);
    most = greater(Lanes::load(values + j), most);
  }
  alignas(64) float low[kLanes];
  alignas(64) float high[kLanes];
  least.store(low);
  most.store(high);
  Range found{low[0], high[0]};
  for (std::int32_t lane = 1; lane < kLanes; ++lane) {
    found.least = low[lane] < found.least ? low[lane] : found.least;
    found.most = high[lane] > found.most ? high[lane] : found.most;
  }
  return found;
}

std::int32_t at_most(const float *values, std::int32_t padded, float limit, std::int32_t *out) {
  std::int32_t count = 0;
  for (std::int32_t j = 0; j < padded; j += kLanes) {
    std::uint32_t lanes = Lanes::load(values + j).at_most(Lanes::all(limit));
    for (; lanes != 0; lanes &= lanes - 1) {
      out[count++] = j + __builtin_ctz(lanes);
    }
  }
  return count;
}

void to_words(const float *values, std::int32_t padded, float origin, float scale,
              std::uint16_t *out) {
  const Lanes most = Lanes::all(65535.0f);
  for (std::int32_t j = 0; j < padded; j += kLanes) {
    const Lanes scaled = (Lanes::load(values + j) - Lanes::all(origin)) * Lanes::all(scale);
    greater(lesser(scaled, most), Lanes::all(0.0f)).store_words(out + j);
  }
}

// The greatest differences of kBlocks blocks of words.
template <int kWeights, int kBlocks>
void widen(const ScreenJob &job, const std::uint16_t *separations, std::int32_t first,
           Words *most) {
  Words separation[kBlocks];
  for (int b = 0; b < kBlocks; ++b) {
    separation[b] = Words::load(separations + first + b * kWords);
  }
  for (int w = 0; w < kWeights; ++w) {
    const std::uint16_t *caps = job.caps + static_cast<std::int64_t>(w) * job.stride + first;
    Words rest = minus(separation[0], Words::load(caps));
    for (int b = 1; b < kBlocks; ++b) {
      rest = greater(rest, minus(separation[b], Words::load(caps + b * kWords)));
    }
    most[w] = greater(most[w], rest);
  }
}

template <int kWeights>
bool passes(const ScreenJob &job, const ScreenRow &row) {
  constexpr int kBlocks = 8;
  Words most[kWeights];
  for (int w = 0; w < kWeights; ++w) {
    most[w] = Words::all(0);
  }
  std::int32_t j = 0;
  for (; j + kBlocks * kWords <= job.stride; j += kBlocks * kWords) {
    widen<kWeights, kBlocks>(job, row.separations, j, most);
  }
  for (; j < job.stride; j += kWords) {
    widen<kWeights, 1>(job, row.separations, j, most);
  }
  bool found = false;
  for (int w = 0; w < kWeights; ++w) {
    const std::int64_t at = static_cast<std::int64_t>(w) * job.stride + row.code;
    found |= any_reaches(most[w], Words::all(job.floors[at]));
  }
  return found;
}

bool passes_any(const ScreenJob &job, const ScreenRow &row) {
  switch (row.num_weights) {
    case 1:
      return passes<1>(job, row);
    case 2:
      return passes<2>(job, row);
    case 3:
      return passes<3>(job, row);
    case 4:
      return passes<4>(job, row);
    case 5:
      return passes<5>(job, row);
    case 6:
      return passes<6>(job, row);
    case 7:
      return passes<7>(job, row);
    default:
      return passes<8>(job, row);
  }
}

void screen(const ScreenJob &job, const ScreenRow *rows, std::int32_t count,
            std::uint8_t *passed) {
  for (std::int32_t r = 0; r < count; ++r) {
    passed[r] = static_cast<std::uint8_t>(passes_any(job, rows[r]));
  }
}

}  // namespace
}  // namespace vq
