// What the tiers of the SCQ solver share below the solver: small vectors, the float32 scan of all
// codes, and what its values say. Part of scq_solve_tier.hpp, which see.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "scq_solve_kernels.hpp"

namespace vq {
namespace {

constexpr double kInfinity = __builtin_inf();
constexpr float kFloatInfinity = __builtin_inff();
constexpr float kLargestFloat = 3.4e38f;
constexpr double kHalfUlp = 1.0 / (1 << 24);  // of float32

// ---- Small vectors ----

double sum8(const double *v) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

double dot(const double *a, const double *b, std::int32_t count) {
  Doubles sum = Doubles::all(0.0);
  for (std::int32_t i = 0; i < count; i += kScqWide) {
    sum = sum + Doubles::load(a + i) * Doubles::load(b + i);
  }
  double lanes[kScqWide];
  sum.store(lanes);
  return sum8(lanes);
}

// One vector of sum_j coefficients[j] rows[j * stride], first <= j < end.
Doubles fold(const double *rows, std::int64_t stride, const double *coefficients,
             std::int32_t first, std::int32_t end) {
  Doubles even = Doubles::all(0.0);
  Doubles odd = Doubles::all(0.0);
  std::int32_t j = first;
  for (; j + 1 < end; j += 2) {
    even = even + Doubles::all(coefficients[j]) * Doubles::load(rows + j * stride);
    odd = odd + Doubles::all(coefficients[j + 1]) * Doubles::load(rows + (j + 1) * stride);
  }
  if (j < end) {
    even = even + Doubles::all(coefficients[j]) * Doubles::load(rows + j * stride);
  }
  return even + odd;
}

std::int32_t round_up(std::int32_t n, std::int32_t step = kScqWide) {
  return (n + step - 1) / step * step;
}

void clear8(double *v) {
  Doubles::all(0.0).store(v);
}

// ---- The codebook ----

template <typename Value>
void centre_row(const ScqCodebook &book, const Value *row, double *__restrict out) {
  const std::int32_t count = book.given->num_features;
  const double *centre = book.centre;
  const double unit = book.inverse_radius;
  for (std::int32_t f = 0; f < count; ++f) {
    out[f] = (static_cast<double>(row[f]) - centre[f]) * unit;
  }
  for (std::int32_t f = count; f < book.features; ++f) {
    out[f] = 0.0;
  }
}

// A code or a latent in solver units, zero-padded.
void load_row(const ScqCodebook &book, const void *array, std::int64_t row, double *out) {
  const std::int64_t at = row * book.given->num_features;
  if (book.given->is_double != 0) {
    centre_row(book, static_cast<const double *>(array) + at, out);
  } else {
    centre_row(book, static_cast<const float *>(array) + at, out);
  }
}

// ---- The scan: scores[row][code] = query . code, float32, features in order ----

template <int kRows, int kPanels>
void scan_tile(const float *queries, const float *panels, std::int32_t features,
               std::int64_t padded, float *scores) {
  Lanes sums[kRows][kPanels];
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      sums[r][p] = Lanes::all(0.0f);
    }
  }
  for (std::int32_t f = 0; f < features; ++f) {
    Lanes codes[kPanels];
    for (int p = 0; p < kPanels; ++p) {
      codes[p] = Lanes::load(panels + (std::int64_t{p} * features + f) * kScqLanes);
    }
    for (int r = 0; r < kRows; ++r) {
      const Lanes value = Lanes::all(queries[std::int64_t{r} * features + f]);
      for (int p = 0; p < kPanels; ++p) {
        sums[r][p] = sums[r][p] + value * codes[p];
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int p = 0; p < kPanels; ++p) {
      sums[r][p].store(scores + r * padded + p * kScqLanes);
    }
  }
}

template <int kRows>
void scan_rows(const float *queries, const float *panels, std::int32_t num_panels,
               std::int32_t features, std::int64_t padded, float *scores) {
  const std::int64_t panel_size = std::int64_t{features} * kScqLanes;
  std::int32_t p = 0;
  for (; p + VQ_SCQ_TILE_PANELS <= num_panels; p += VQ_SCQ_TILE_PANELS) {
    scan_tile<kRows, VQ_SCQ_TILE_PANELS>(queries, panels + p * panel_size, features, padded,
                                         scores + std::int64_t{p} * kScqLanes);
  }
  for (; p < num_panels; ++p) {
    scan_tile<kRows, 1>(queries, panels + p * panel_size, features, padded,
                        scores + std::int64_t{p} * kScqLanes);
  }
}

// Codes in pieces that stay in the cache while all queries pass over them.
void scan(const ScqCodebook &book, const float *queries, std::int32_t count, float *scores) {
  constexpr std::int64_t kPieceFloats = 1 << 16;
  const std::int32_t features = book.given->num_features;
  const std::int64_t panel_size = std::int64_t{features} * kScqLanes;
  const std::int32_t num_panels = book.padded / kScqLanes;
  const auto fit = static_cast<std::int32_t>(kPieceFloats / panel_size);
  const std::int32_t piece = fit < 2 ? 2 : fit & ~1;
  for (std::int32_t p = 0; p < num_panels; p += piece) {
    const std::int32_t here = num_panels - p < piece ? num_panels - p : piece;
    const float *panels = book.panels + p * panel_size;
    float *out = scores + std::int64_t{p} * kScqLanes;
    std::int32_t r = 0;
    for (; r + VQ_SCQ_TILE_ROWS <= count; r += VQ_SCQ_TILE_ROWS) {
      scan_rows<VQ_SCQ_TILE_ROWS>(queries + std::int64_t{r} * features, panels, here, features,
                                  book.padded, out + std::int64_t{r} * book.padded);
    }
    for (; r < count; ++r) {
      scan_rows<1>(queries + std::int64_t{r} * features, panels, here, features, book.padded,
                   out + std::int64_t{r} * book.padded);
    }
  }
}

// ---- What a scan says ----

struct Lowest {
  float best;    // the smallest value
  Lanes minima;  // lane by lane
};

// A bound under which there are about `count` codes: some rank of the lanes' minima.
float bound_for(const Lowest &lowest, std::int32_t count) {
  // 16 (1 - (15/16)^count), the lanes that `count` codes fall into, by count / 4.
  constexpr int kRanks[] = {3, 5, 8, 10, 11, 12, 13, 14, 14, 15, 15, 15, 15, 16};
  constexpr int kLast = sizeof(kRanks) / sizeof(kRanks[0]) - 1;
  const int least_rank = kRanks[count / 4 < kLast ? count / 4 : kLast];
  float minima[kScqLanes];
  lowest.minima.store(minima);
  float out = kFloatInfinity;
  for (const float value : minima) {
    const int rank = __builtin_popcount(lowest.minima.at_most(Lanes::all(value)));
    out = rank >= least_rank && value < out ? value : out;
  }
  return out;
}

// values = offsets - scores in place; offsets are +inf in the padding.
Lowest rank_values(const ScqCodebook &book, const float *offsets, float *scores) {
  Lanes even = Lanes::all(kFloatInfinity);
  Lanes odd = even;
  std::int32_t k = 0;
  for (; k + 2 * kScqLanes <= book.padded; k += 2 * kScqLanes) {
    const Lanes a = Lanes::load(offsets + k) - Lanes::load(scores + k);
    const Lanes b = Lanes::load(offsets + k + kScqLanes) - Lanes::load(scores + k + kScqLanes);
    a.store(scores + k);
    b.store(scores + k + kScqLanes);
    even = lesser(even, a);
    odd = lesser(odd, b);
  }
  if (k < book.padded) {
    const Lanes a = Lanes::load(offsets + k) - Lanes::load(scores + k);
    a.store(scores + k);
    even = lesser(even, a);
  }
  const Lanes minima = lesser(even, odd);
  return {least(minima), minima};
}

// Codes with finite values <= limit, in order, at most `most` of them; how many there are in `out`,
// which has room for 16 more.
std::int32_t codes_under(const ScqCodebook &book, const float *values, float limit,
                         std::int32_t most, std::int32_t *out) {
  const Lanes bound = lesser(Lanes::all(limit), Lanes::all(kLargestFloat));
  std::int32_t count = 0;
  for (std::int32_t k = 0; k < book.padded && count < most; k += kScqLanes) {
    const std::uint32_t hits = Lanes::load(values + k).at_most(bound);
    pack(hits, k, out + count);
    count += __builtin_popcount(hits);
  }
  return count < most ? count : most;
}

// Takes the dearest of `size` codes out; costs are negative values, with room for 16 more.
void drop_dearest(std::int32_t size, float *costs, std::int32_t *codes) {
  for (std::int32_t i = size; i % kScqLanes != 0; ++i) {
    costs[i] = kFloatInfinity;
  }
  Lanes low = Lanes::load(costs);
  for (std::int32_t i = kScqLanes; i < size; i += kScqLanes) {
    low = lesser(low, Lanes::load(costs + i));
  }
  const Lanes worst = Lanes::all(least(low));
  std::int32_t i = 0;
  std::uint32_t hits = 0;
  while ((hits = Lanes::load(costs + i).at_most(worst)) == 0) {
    i += kScqLanes;
  }
  i += __builtin_ctz(hits);
  costs[i] = costs[size - 1];
  codes[i] = codes[size - 1];
}

// The codes that lie lowest, about `count` and no more; how many there are in `out`.
std::int32_t lowest_codes(const ScqCodebook &book, const Lowest &lowest, const float *values,
                          std::int32_t count, std::int32_t *out) {
  constexpr std::int32_t kMost = 128;
  std::int32_t codes[kMost + kScqLanes];
  float costs[kMost + kScqLanes];
  std::int32_t size = codes_under(book, values, bound_for(lowest, count), kMost, codes);
  for (std::int32_t i = 0; i < size; ++i) {
    costs[i] = -values[codes[i]];
  }
  for (; size > count; --size) {
    drop_dearest(size, costs, codes);
  }
  std::copy(codes, codes + size, out);
  return size;
}

// Bound on the rounding of one score of vectors of length <= 1, and of forming both.
double scan_error(const ScqCodebook &book) {
  return (book.given->num_features + 6) * kHalfUlp;
}

// The nearest code from distance values |c|^2 / 2 - z.c, exact: all that come close are compared in
// float64. `row` is scratch for one code.
std::int32_t exact_nearest(const ScqCodebook &book, const float *values, float best,
                           const double *z, double *row) {
  const double error = scan_error(book) * (std::sqrt(dot(z, z, book.features)) + 1.0);
  const auto limit = static_cast<float>(best + 2.5 * error);
  std::int32_t codes[kScqCandidates + kScqLanes];
  std::int32_t count = codes_under(book, values, limit, kScqCandidates, codes);
  if (count == 1) {
    return codes[0];
  }
  const bool all = count == kScqCandidates;  // and perhaps more: go through every code
  count = all ? book.given->num_codes : count;
  double lowest = kInfinity;
  std::int32_t nearest = 0;
  for (std::int32_t i = 0; i < count; ++i) {
    const std::int32_t code = all ? i : codes[i];
    load_row(book, book.given->codebook, code, row);
    const double value = 0.5 * dot(row, row, book.features) - dot(row, z, book.features);
    if (value < lowest) {
      lowest = value;
      nearest = code;
    }
  }
  return nearest;
}

}  // namespace
}  // namespace vq
