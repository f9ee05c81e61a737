// What the ISA tiers of the lattice search share: declarations only, see matrix_kernels.hpp for why.
#pragma once

#include <cstdint>

namespace vq {

constexpr std::int32_t kLanes = 16;       // codes per block in every tier
constexpr std::int32_t kWords = 32;       // 16-bit words per block in every tier
constexpr std::int32_t kMaxWeights = 8;   // numerators 1..n/2 of the code that a scan adds
constexpr std::int32_t kMaxTerms = 10;    // 4 distances and 6 distances between 4 codes

// Adds one code to a point x of error kept: with numerator first_keep + w of n left to x, code j
// makes the error kept[w] + add[w] * rest, where rest = |z - c_j|^2 - (first_keep + w) *
// separation[j] and kept[w] is x's error times its weight.
struct ScanJob {
  const float *distances;   // [padded] |z - c_j|^2, +inf in the padding
  const float *separation;  // [padded] |x - c_j|^2 / n, -inf where j must not be added
  std::int32_t padded;
  std::int32_t num_weights;  // 1..kMaxWeights
  float first_keep;
  float kept[kMaxWeights];
  float add[kMaxWeights];
  float limit;
};

// Called for the lanes of 16 neighbouring codes or compositions whose errors are under the limit;
// errors holds all 16. Returns the limit for the blocks to come.
using BlockHandler = float (*)(void *context, std::int32_t first, std::int32_t weight,
                               std::uint32_t lanes, const float *errors);

// Every composition c of one support: error = sum over terms of coefficients[term][c] *
// values[term], added in the order of the terms.
struct EvaluateJob {
  const float *coefficients;  // [num_terms][padded]
  std::int32_t padded;
  std::int32_t num_terms;
  float values[kMaxTerms];
  float limit;
};

// Which rows of separations can hold a pair under the limit, in whole quanta.
struct ScreenJob {
  const std::uint16_t *caps;    // [weights][stride] distances over the weight kept, rounded down
  const std::uint16_t *floors;  // [weights][stride] by heavier code
  std::int32_t stride;          // a multiple of kWords
};

struct ScreenRow {
  const std::uint16_t *separations;  // [stride], rounded up
  std::int32_t code;                 // the heavier one, whose row it is
  std::int32_t num_weights;          // 1..kMaxWeights
};

struct Range {
  float least;
  float most;
};

struct LatticeOps {
  // out[j] = |z - c_j|^2 over the transposed codebook [features][padded], features added in order.
  void (*distances)(const float *z, const float *transposed, std::int32_t features,
                    std::int32_t padded, float *out);
  // Whether any error is under job.limit.
  bool (*scan_finds)(const ScanJob &job);
  // Hands over every block with such errors.
  void (*scan)(const ScanJob &job, BlockHandler handler, void *context);
  // out[j] = sum over r of weights[r] * rows[r][j], in order, plus offset.
  void (*mix)(const float *const *rows, const float *weights, std::int32_t num_rows, float offset,
              std::int32_t padded, float *out);
  void (*evaluate)(const EvaluateJob &job, BlockHandler handler, void *context);
  // Least and greatest of values[0..padded).
  Range (*range)(const float *values, std::int32_t padded);
  // Writes the j with values[j] <= limit in ascending order; returns how many. out has room for all.
  std::int32_t (*at_most)(const float *values, std::int32_t padded, float limit, std::int32_t *out);
  // out[j] = (values[j] - origin) * scale without its fraction, within 0..65535.
  void (*to_words)(const float *values, std::int32_t padded, float origin, float scale,
                   std::uint16_t *out);
  // passed[r]: separations[j] - caps[w][j], at least 0, reaches floors[w][code] for some j and w.
  void (*screen)(const ScreenJob &job, const ScreenRow *rows, std::int32_t count,
                 std::uint8_t *passed);
};

extern const LatticeOps lattice_ops_baseline;
extern const LatticeOps lattice_ops_avx2;
extern const LatticeOps lattice_ops_avx512_vnni;

}  // namespace vq
