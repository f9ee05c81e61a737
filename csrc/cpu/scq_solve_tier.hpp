// The SCQ solver of one tier, written once over `Lanes` (16 floats) and `Doubles` (8), which
// the including source file includes before. Internal linkage keeps tiers apart. No FMA, and every
// sum has a fixed order, so all tiers agree bit for bit.
//
// Per latent a primal active set, as scq/solver/exact.py. The inverse Cholesky factor M of
// A = C_S C_S^T + max(lam, ridge) I + 1 1^T is kept and updated: a code enters by one more row, and
// leaves by plane rotations of the rows after it. With y = M b and w = M 1, which take part in both,
// the optimum on the support is q = M^T (y - nu w): no triangular solve, hence no chain of
// dependent steps. (1 1^T is a constant on the simplex and makes supports definite without lam.)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "scq_solve_kernels.hpp"

namespace vq {
namespace {

constexpr double kInfinity = __builtin_inf();
constexpr float kFloatInfinity = __builtin_inff();
constexpr double kHalfUlp = 1.0 / (1 << 24);  // of float32
// A new pivot below this is a dependent code (A has diagonal 1 to 2).
constexpr double kDependent = 1e-10;
// Of the 32 lane minima of a scan, the one that bounds what is kept: about 40 codes pass.
constexpr int kKeepRank = 12;

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

std::int32_t round_up(std::int32_t n) {
  return (n + kScqWide - 1) / kScqWide * kScqWide;
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
  float best;  // the smallest value
  float keep;  // a bound under which there are about 40 codes
};

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
  float minima[2 * kScqLanes];
  even.store(minima);
  odd.store(minima + kScqLanes);
  // The smallest minimum that at least kKeepRank of them do not exceed, and the least of all.
  Lowest out{kFloatInfinity, kFloatInfinity};
  for (const float value : minima) {
    const Lanes bound = Lanes::all(value);
    const int rank = __builtin_popcount(even.at_most(bound) | (odd.at_most(bound) << 16));
    out.keep = rank >= kKeepRank && value < out.keep ? value : out.keep;
    out.best = value < out.best ? value : out.best;
  }
  return out;
}

// Codes with values <= limit, in order, at most `most` of them; how many there are in `out`.
std::int32_t codes_under(const ScqCodebook &book, const float *values, float limit,
                         std::int32_t most, std::int32_t *out) {
  const Lanes bound = Lanes::all(limit);
  std::int32_t count = 0;
  for (std::int32_t k = 0; k < book.padded; k += kScqLanes) {
    std::uint32_t hits = Lanes::load(values + k).at_most(bound);
    while (hits != 0) {
      const auto lane = static_cast<std::int32_t>(__builtin_ctz(hits));
      hits &= hits - 1;
      if (k + lane >= book.given->num_codes) {
        return count;
      }
      if (count == most) {
        return count;
      }
      out[count++] = k + lane;
    }
  }
  return count;
}

// ---- One latent ----

enum class Status { kRunning, kSolved, kUnsolved };

struct Latent {
  std::int64_t row;
  Status status;
  std::int32_t size;
  std::int32_t iterations;
  std::int32_t nearest;
  std::int32_t num_candidates;
  std::int32_t nearest_candidate;  // its place among the candidates, or -1
  double reference;                // c_j.z, taken off b: a common part only moves nu
  double threshold;
  double residual;
  double length;  // |r|
  double mu;
  double *z, *x, *r, *entering;  // [features]
  double *codes;                 // [capacity][features], by slot
  double *m, *mt;                // [capacity][capacity]: M and its transpose
  double *p, *q, *y, *w, *a, *l, *t;
  std::int32_t *ids, *slots, *candidates;
  float *table;    // [num_features][kScqCandidates], the candidates' codes, transposed
  float *penalty;  // [kScqCandidates] +inf for codes in the support and in the padding
};

void start_support(const ScqCodebook &book, Latent &s) {
  s.size = 0;
  for (std::int32_t i = 0; i < book.capacity; ++i) {
    s.slots[i] = i;
  }
}

void mark_candidate(Latent &s, std::int32_t code, float penalty) {
  for (std::int32_t c = 0; c < s.num_candidates; ++c) {
    if (s.candidates[c] == code) {
      s.penalty[c] = penalty;
      return;
    }
  }
}

// The code in s.entering joins with weight 0; false if there is no room or it depends on the others.
bool append(const ScqCodebook &book, Latent &s, std::int32_t code, double least_pivot) {
  const std::int32_t n = s.size;
  const std::int64_t ld = book.capacity;
  if (n == book.capacity) {
    return false;
  }
  for (std::int32_t i = 0; i < n; ++i) {
    const double *code = s.codes + std::int64_t{s.slots[i]} * book.features;
    s.a[i] = dot(code, s.entering, book.features) + 1.0;
  }
  if (n % kScqWide == 0) {
    for (double *v : {s.p, s.q, s.y, s.w, s.a, s.l, s.t}) {
      clear8(v + n);
    }
    for (std::int32_t i = 0; i < n; ++i) {
      clear8(s.m + i * ld + n);
      clear8(s.mt + i * ld + n);
    }
  }
  double pivot = dot(s.entering, s.entering, book.features) + 1.0 + book.diagonal;
  const std::int32_t width = round_up(n);
  for (std::int32_t b = 0; b < width; b += kScqWide) {
    fold(s.mt + b, ld, s.a, 0, n < b + kScqWide ? n : b + kScqWide).store(s.l + b);
  }
  pivot -= dot(s.l, s.l, width);
  if (!(pivot >= least_pivot)) {
    if (least_pivot > 0.0) {
      return false;
    }
    pivot = book.diagonal;
  }
  const double inverse = 1.0 / std::sqrt(pivot);
  double b_new = dot(s.entering, s.z, book.features) - s.reference;
  b_new += code == s.nearest ? book.bonus : 0.0;
  const double y_new = (b_new - dot(s.l, s.y, width)) * inverse;
  const double w_new = (1.0 - dot(s.l, s.w, width)) * inverse;
  double *row = s.m + n * ld;
  const Doubles minus = Doubles::all(-inverse);
  for (std::int32_t b = 0; b < width; b += kScqWide) {
    (fold(s.m + b, ld, s.l, b, n) * minus).store(row + b);
  }
  const std::int32_t grown = round_up(n + 1);
  for (std::int32_t b = width; b < grown; b += kScqWide) {
    clear8(row + b);
  }
  for (std::int32_t b = 0; b < grown; b += kScqWide) {
    clear8(s.mt + n * ld + b);
  }
  row[n] = inverse;
  for (std::int32_t j = 0; j <= n; ++j) {
    s.mt[j * ld + n] = row[j];
  }
  s.y[n] = y_new;
  s.w[n] = w_new;
  s.p[n] = 0.0;
  s.ids[n] = code;
  double *stored = s.codes + std::int64_t{s.slots[n]} * book.features;
  for (std::int32_t f = 0; f < book.features; f += kScqWide) {
    Doubles::load(s.entering + f).store(stored + f);
  }
  s.size = n + 1;
  mark_candidate(s, code, kFloatInfinity);
  return true;
}

// Row k of M and its successor become orthogonal combinations; the first loses column `column`.
void rotate(Latent &s, std::int64_t ld, std::int32_t k, std::int32_t column, std::int32_t width) {
  double *upper = s.m + k * ld;
  double *lower = upper + ld;
  const double x = upper[column];
  const double v = lower[column];
  const double inverse = 1.0 / std::sqrt(x * x + v * v);
  const double cosine = v * inverse;
  const double sine = x * inverse;
  const Doubles c = Doubles::all(cosine);
  const Doubles d = Doubles::all(sine);
  for (std::int32_t b = 0; b < width; b += kScqWide) {
    const Doubles first = Doubles::load(upper + b);
    const Doubles second = Doubles::load(lower + b);
    (c * first - d * second).store(upper + b);
    (d * first + c * second).store(lower + b);
  }
  // Not a difference: GCC 12 makes one FMA of cosine * first - sine * second next to the sum below,
  // -ffp-contract=off or not, and the tiers would part.
  const double minus_sine = -sine;
  for (double *vector : {s.y, s.w}) {
    const double first = vector[k];
    const double second = vector[k + 1];
    vector[k] = cosine * first + minus_sine * second;
    vector[k + 1] = sine * first + cosine * second;
  }
}

void remove(const ScqCodebook &book, Latent &s, std::int32_t at) {
  const std::int64_t ld = book.capacity;
  const std::int32_t n = s.size;
  const std::int32_t width = round_up(n);
  for (std::int32_t k = at; k + 1 < n; ++k) {
    rotate(s, ld, k, at, width);
  }
  for (std::int32_t k = at; k + 1 < n; ++k) {
    double *row = s.m + k * ld;
    std::memmove(row + at, row + at + 1, static_cast<std::size_t>(n - 1 - at) * sizeof(double));
    row[n - 1] = 0.0;
    for (std::int32_t j = 0; j <= k; ++j) {
      s.mt[j * ld + k] = row[j];
    }
  }
  for (std::int32_t j = 0; j < n; ++j) {
    s.mt[j * ld + n - 1] = 0.0;
  }
  mark_candidate(s, s.ids[at], 0.0f);
  const std::int32_t slot = s.slots[at];
  for (std::int32_t k = at; k + 1 < n; ++k) {
    s.ids[k] = s.ids[k + 1];
    s.slots[k] = s.slots[k + 1];
    s.p[k] = s.p[k + 1];
  }
  s.slots[n - 1] = slot;
  for (double *vector : {s.p, s.q, s.y, s.w}) {
    vector[n - 1] = 0.0;
  }
  s.size = n - 1;
}

// q: the optimum on the support under sum 1, without p >= 0.
void find_target(const ScqCodebook &book, Latent &s) {
  const std::int64_t ld = book.capacity;
  const std::int32_t width = round_up(s.size);
  const double nu = (dot(s.w, s.y, width) - 1.0) / dot(s.w, s.w, width);
  const Doubles factor = Doubles::all(nu);
  for (std::int32_t b = 0; b < width; b += kScqWide) {
    (Doubles::load(s.y + b) - factor * Doubles::load(s.w + b)).store(s.t + b);
  }
  for (std::int32_t b = 0; b < width; b += kScqWide) {
    fold(s.m + b, ld, s.t, b, s.size).store(s.q + b);
  }
}

// p = q if q > 0; else as far towards q as p stays >= 0, dropping what reaches 0. True if p = q.
bool move(const ScqCodebook &book, Latent &s) {
  double step = kInfinity;
  for (std::int32_t i = 0; i < s.size; ++i) {
    if (!(s.q[i] > 0.0)) {
      const double gap = s.p[i] - s.q[i];
      const double room = s.p[i] / (gap > 1e-300 ? gap : 1e-300);
      step = room < step ? room : step;
    }
  }
  if (step == kInfinity) {
    for (std::int32_t i = 0; i < s.size; ++i) {
      s.p[i] = s.q[i];
    }
    return true;
  }
  for (std::int32_t i = s.size - 1; i >= 0; --i) {
    const double gap = s.p[i] - s.q[i];
    const bool drop = !(s.q[i] > 0.0) && !(s.p[i] / (gap > 1e-300 ? gap : 1e-300) > step);
    const double moved = s.p[i] + step * (s.q[i] - s.p[i]);
    s.p[i] = moved > 0.0 ? moved : 0.0;
    if (drop) {
      remove(book, s, i);
    }
  }
  return false;
}

// x = C^T p, r = z - x, |r| and mu = p.g.
void find_residual(const ScqCodebook &book, Latent &s) {
  double pull = 0.0;
  for (std::int32_t i = 0; i < s.size; ++i) {
    pull += book.lam * s.p[i] * s.p[i];
    pull -= s.ids[i] == s.nearest ? book.bonus * s.p[i] : 0.0;
  }
  for (std::int32_t f = 0; f < book.features; f += kScqWide) {
    Doubles even = Doubles::all(0.0);
    Doubles odd = even;
    std::int32_t i = 0;
    for (; i + 1 < s.size; i += 2) {
      const double *first = s.codes + std::int64_t{s.slots[i]} * book.features + f;
      const double *second = s.codes + std::int64_t{s.slots[i + 1]} * book.features + f;
      even = even + Doubles::all(s.p[i]) * Doubles::load(first);
      odd = odd + Doubles::all(s.p[i + 1]) * Doubles::load(second);
    }
    if (i < s.size) {
      const double *last = s.codes + std::int64_t{s.slots[i]} * book.features + f;
      even = even + Doubles::all(s.p[i]) * Doubles::load(last);
    }
    const Doubles point = even + odd;
    point.store(s.x + f);
    (Doubles::load(s.z + f) - point).store(s.r + f);
  }
  const double length = std::sqrt(dot(s.r, s.r, book.features));
  s.length = length > 1e-300 ? length : 1e-300;
  s.mu = pull - dot(s.x, s.r, book.features);
}

void unit_residual(const ScqCodebook &book, const Latent &s, float *out) {
  const double inverse = 1.0 / s.length;
  for (std::int32_t f = 0; f < book.given->num_features; ++f) {
    out[f] = static_cast<float>(s.r[f] * inverse);
  }
}

double outside_gradient(const ScqCodebook &book, const Latent &s, std::int32_t code) {
  return -dot(s.entering, s.r, book.features) - (code == s.nearest ? book.bonus : 0.0);
}

// The candidate that lies lowest, by float32; -1 if all are in the support.
std::int32_t lowest_candidate(const ScqCodebook &book, const Latent &s) {
  constexpr int kVectors = kScqCandidates / kScqLanes;
  float direction[VQ_SCQ_MAX_FEATURES];
  unit_residual(book, s, direction);
  Lanes sums[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    sums[v] = Lanes::load(s.penalty + v * kScqLanes);
  }
  for (std::int32_t f = 0; f < book.given->num_features; ++f) {
    const Lanes value = Lanes::all(direction[f]);
    const float *row = s.table + std::int64_t{f} * kScqCandidates;
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = sums[v] - value * Lanes::load(row + v * kScqLanes);
    }
  }
  float values[kScqCandidates];
  for (int v = 0; v < kVectors; ++v) {
    sums[v].store(values + v * kScqLanes);
  }
  if (s.nearest_candidate >= 0) {
    const double bonus = book.bonus / s.length;
    values[s.nearest_candidate] -= static_cast<float>(bonus < 1e30 ? bonus : 1e30);
  }
  Lanes lowest = Lanes::load(values);
  for (int v = 1; v < kVectors; ++v) {
    lowest = lesser(lowest, Lanes::load(values + v * kScqLanes));
  }
  float lanes[kScqLanes];
  lowest.store(lanes);
  float least = lanes[0];
  for (const float lane : lanes) {
    least = lane < least ? lane : least;
  }
  if (!(least < kFloatInfinity)) {
    return -1;
  }
  const Lanes bound = Lanes::all(least);
  int v = 0;
  std::uint32_t hits = 0;
  while ((hits = Lanes::load(values + v * kScqLanes).at_most(bound)) == 0) {
    ++v;
  }
  return s.candidates[v * kScqLanes + __builtin_ctz(hits)];
}

// To the optimum over support and candidates.
void descend(const ScqCodebook &book, Latent &s) {
  while (s.iterations < book.given->max_iterations) {
    ++s.iterations;
    find_target(book, s);
    if (!move(book, s)) {
      continue;
    }
    find_residual(book, s);
    const std::int32_t code = lowest_candidate(book, s);
    if (code < 0) {
      return;
    }
    load_row(book, book.given->codebook, code, s.entering);
    if (!(outside_gradient(book, s, code) < s.mu - s.threshold)) {
      return;
    }
    if (!append(book, s, code, kDependent)) {
      break;
    }
  }
  s.status = Status::kUnsolved;
}

void choose_candidates(const ScqCodebook &book, Latent &s, const float *values, float limit) {
  const std::int32_t features = book.given->num_features;
  s.num_candidates = codes_under(book, values, limit, kScqCandidates, s.candidates);
  s.nearest_candidate = -1;
  for (std::int32_t c = 0; c < kScqCandidates; ++c) {
    s.penalty[c] = c < s.num_candidates ? 0.0f : kFloatInfinity;
  }
  for (std::int32_t c = 0; c < s.num_candidates; ++c) {
    const float *row = book.rows + std::int64_t{s.candidates[c]} * features;
    s.nearest_candidate = s.candidates[c] == s.nearest ? c : s.nearest_candidate;
    for (std::int32_t f = 0; f < features; ++f) {
      s.table[std::int64_t{f} * kScqCandidates + c] = row[f];
    }
  }
  for (std::int32_t i = 0; i < s.size; ++i) {
    mark_candidate(s, s.ids[i], kFloatInfinity);
  }
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
  std::int32_t codes[kScqCandidates];
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

bool begin_with(const ScqCodebook &book, Latent &s, std::int32_t code) {
  for (std::int32_t i = 0; i < s.size; ++i) {
    if (s.ids[i] == code) {
      return true;
    }
  }
  load_row(book, book.given->codebook, code, s.entering);
  return append(book, s, code, kDependent);
}

// The given codes that keep a positive weight when solved together; false if that is no start.
bool begin_with_initial(const ScqCodebook &book, Latent &s) {
  const vq_scq_problem &given = *book.given;
  for (std::int32_t i = 0; i < given.initial_width; ++i) {
    const std::int64_t code = given.initial[s.row * given.initial_width + i];
    if (code >= 0 && !begin_with(book, s, static_cast<std::int32_t>(code))) {
      return false;
    }
  }
  while (s.size > 0) {
    find_target(book, s);
    const std::int32_t before = s.size;
    for (std::int32_t i = s.size - 1; i >= 0; --i) {
      s.p[i] = s.q[i];
      if (!(s.q[i] > 0.0)) {
        remove(book, s, i);
      }
    }
    if (s.size == before) {
      return true;
    }
  }
  return false;
}

void begin(const ScqCodebook &book, Latent &s, float *values) {
  const Lowest lowest = rank_values(book, book.half_norms, values);
  s.nearest = exact_nearest(book, values, lowest.best, s.z, s.entering);
  load_row(book, book.given->codebook, s.nearest, s.entering);
  s.reference = dot(s.entering, s.z, book.features);
  const double norm = std::sqrt(dot(s.z, s.z, book.features));
  s.threshold = book.given->tolerance * (book.reach * (norm + book.reach) + book.lam);
  s.threshold = s.threshold > 0.0 ? s.threshold : 1e-300;
  s.iterations = 0;
  s.num_candidates = 0;
  start_support(book, s);
  if (book.given->initial == nullptr || !begin_with_initial(book, s)) {
    start_support(book, s);
    begin_with(book, s, s.nearest);
    s.p[0] = 1.0;
  }
  choose_candidates(book, s, values, lowest.keep);
  // float32 cannot hold what such a latent needs.
  s.status = norm < 1e30 ? Status::kRunning : Status::kUnsolved;
}

struct Certificate {
  double lowest;           // the smallest gradient over all codes, as far as it lies below mu
  std::int32_t violator;   // a code that lies under mu by more than the threshold, or -1
};

// Looks at every code that could lie under mu, given what float32 may have rounded away.
Certificate certify(const ScqCodebook &book, Latent &s, const float *values, Lowest lowest) {
  Certificate out{kInfinity, -1};
  for (std::int32_t i = 0; i < s.size; ++i) {
    const double *code = s.codes + std::int64_t{s.slots[i]} * book.features;
    double gradient = book.lam * s.p[i] - dot(code, s.r, book.features);
    gradient -= s.ids[i] == s.nearest ? book.bonus : 0.0;
    out.lowest = gradient < out.lowest ? gradient : out.lowest;
  }
  const double error = scan_error(book);
  const double level = s.mu / s.length;
  double least = s.mu - s.threshold;
  const auto consider = [&](std::int32_t code) {
    for (std::int32_t i = 0; i < s.size; ++i) {
      if (s.ids[i] == code) {
        return;
      }
    }
    load_row(book, book.given->codebook, code, s.entering);
    const double gradient = outside_gradient(book, s, code);
    out.lowest = gradient < out.lowest ? gradient : out.lowest;
    if (gradient < least) {
      least = gradient;
      out.violator = code;
    }
  };
  consider(s.nearest);
  if (!(lowest.best <= level + 1.5 * error)) {
    return out;
  }
  std::int32_t codes[kScqCandidates];
  // The best comes first: enough, if it is a violator. Else everything in doubt is looked at.
  std::int32_t count = codes_under(book, values, lowest.best, 1, codes);
  for (std::int32_t i = 0; i < count; ++i) {
    consider(codes[i]);
  }
  if (out.violator >= 0) {
    return out;
  }
  const auto limit = static_cast<float>(level + 1.5 * error);
  count = codes_under(book, values, limit, kScqCandidates, codes);
  const bool all = count == kScqCandidates;  // and perhaps more: go through every code
  count = all ? book.given->num_codes : count;
  for (std::int32_t i = 0; i < count; ++i) {
    consider(all ? i : codes[i]);
  }
  return out;
}

// A full scan's verdict: solved, or on with its violator and new candidates.
void review(const ScqCodebook &book, Latent &s, float *values) {
  for (std::int32_t i = 0; i < s.size; ++i) {
    values[s.ids[i]] = -kFloatInfinity;  // scores: values are their negatives
  }
  const float nearest_score = values[s.nearest];
  values[s.nearest] = -kFloatInfinity;  // priced in float64 by itself
  const Lowest lowest = rank_values(book, book.no_norms, values);
  const Certificate found = certify(book, s, values, lowest);
  if (found.violator < 0) {
    s.residual = s.mu > found.lowest ? s.mu - found.lowest : 0.0;
    s.status = Status::kSolved;
    return;
  }
  if (nearest_score > -kFloatInfinity) {
    values[s.nearest] = lowest.best;  // not in the support: a candidate again
  }
  load_row(book, book.given->codebook, found.violator, s.entering);
  if (!append(book, s, found.violator, kDependent)) {
    s.status = Status::kUnsolved;
    return;
  }
  choose_candidates(book, s, values, lowest.keep);
}

void write(const ScqCodebook &book, const Latent &s, const vq_scq_solution &out) {
  const std::int64_t at = s.row * out.max_support;
  const bool solved = s.status == Status::kSolved && s.size <= out.max_support;
  const std::int32_t size = solved ? s.size : 0;
  for (std::int32_t i = 0; i < out.max_support; ++i) {
    out.indices[at + i] = i < size ? s.ids[i] : 0;
    out.weights[at + i] = i < size ? s.p[i] : 0.0;
  }
  out.sizes[s.row] = size;
  out.nearest[s.row] = s.nearest;
  out.iterations[s.row] = s.iterations;
  out.kkt_residual[s.row] = solved ? s.residual * book.radius * book.radius : 0.0;
  out.unsolved[s.row] = solved ? 0 : 1;
  const std::int64_t features = book.given->num_features;
  for (std::int64_t f = 0; f < features; ++f) {
    out.quantized[s.row * features + f] = solved ? s.x[f] * book.radius + book.centre[f] : 0.0;
  }
}

// ---- Memory ----

Latent place(const ScqCodebook &book, const ScqWorkspace &workspace, std::int32_t number) {
  const std::int64_t cap = book.capacity;
  const std::int64_t wide = book.features;
  const std::int64_t features = book.given->num_features;
  Latent s{};
  double *d = workspace.doubles + number * (cap * wide + 2 * cap * cap + 7 * cap + 4 * wide);
  const auto take = [&d](std::int64_t count) {
    double *here = d;
    d += count;
    return here;
  };
  s.codes = take(cap * wide);
  s.m = take(cap * cap);
  s.mt = take(cap * cap);
  for (double **vector : {&s.p, &s.q, &s.y, &s.w, &s.a, &s.l, &s.t}) {
    *vector = take(cap);
  }
  for (double **vector : {&s.z, &s.x, &s.r, &s.entering}) {
    *vector = take(wide);
  }
  s.table = workspace.floats + number * (features + 1) * kScqCandidates;
  s.penalty = s.table + features * kScqCandidates;
  s.ids = workspace.integers + number * (2 * cap + kScqCandidates);
  s.slots = s.ids + cap;
  s.candidates = s.slots + cap;
  return s;
}

// The block's queries and scores lie behind the latents' floats.
float *place_queries(const ScqCodebook &book, const ScqWorkspace &workspace) {
  const std::int64_t features = book.given->num_features;
  return workspace.floats + kScqBlock * (features + 1) * kScqCandidates;
}

// ---- Entry points ----

void solve_block(const ScqCodebook &book, const vq_scq_solution &out, Latent *latents,
                 std::int32_t count, float *queries) {
  const std::int64_t features = book.given->num_features;
  float *scores = queries + kScqBlock * features;
  for (std::int32_t i = 0; i < count; ++i) {
    load_row(book, book.given->latents, latents[i].row, latents[i].z);
    for (std::int64_t f = 0; f < features; ++f) {
      queries[i * features + f] = static_cast<float>(latents[i].z[f]);
    }
  }
  scan(book, queries, count, scores);
  std::int32_t active[kScqBlock];
  std::int32_t num_active = 0;
  for (std::int32_t i = 0; i < count; ++i) {
    begin(book, latents[i], scores + std::int64_t{i} * book.padded);
    active[num_active++] = i;
  }
  while (num_active > 0) {
    std::int32_t num_left = 0;
    for (std::int32_t i = 0; i < num_active; ++i) {
      Latent &s = latents[active[i]];
      if (s.status == Status::kRunning) {
        descend(book, s);
      }
      if (s.status == Status::kRunning) {
        unit_residual(book, s, queries + num_left * features);
        active[num_left++] = active[i];
      }
    }
    scan(book, queries, num_left, scores);
    num_active = 0;
    for (std::int32_t i = 0; i < num_left; ++i) {
      Latent &s = latents[active[i]];
      review(book, s, scores + std::int64_t{i} * book.padded);
      if (s.status == Status::kRunning) {
        active[num_active++] = active[i];
      }
    }
  }
  for (std::int32_t i = 0; i < count; ++i) {
    write(book, latents[i], out);
  }
}

void solve_range(const ScqCodebook &book, const vq_scq_solution &out, const ScqWorkspace &workspace,
                 std::int64_t begin_row, std::int64_t end_row) {
  Latent latents[kScqBlock];
  for (std::int32_t i = 0; i < kScqBlock; ++i) {
    latents[i] = place(book, workspace, i);
  }
  for (std::int64_t row = begin_row; row < end_row; row += kScqBlock) {
    const std::int64_t left = end_row - row;
    const auto count = static_cast<std::int32_t>(left < kScqBlock ? left : kScqBlock);
    for (std::int32_t i = 0; i < count; ++i) {
      latents[i].row = row + i;
    }
    solve_block(book, out, latents, count, place_queries(book, workspace));
  }
}

// Loads a given support into `s` and makes its factor.
void load_support(const ScqCodebook &book, const vq_scq_gradient &given, std::int64_t row,
                  Latent &s) {
  const std::int64_t at = row * given.max_support;
  s.nearest = -1;
  s.num_candidates = 0;
  s.reference = 0.0;
  load_row(book, book.given->latents, row, s.z);
  start_support(book, s);
  for (std::int64_t i = 0; i < given.sizes[row]; ++i) {
    const auto code = static_cast<std::int32_t>(given.indices[at + i]);
    load_row(book, book.given->codebook, code, s.entering);
    append(book, s, code, 0.0);
    s.p[i] = given.weights[at + i];
  }
}

void differentiate_range(const ScqCodebook &book, const vq_scq_gradient &given,
                         const ScqWorkspace &workspace, double *multipliers,
                         std::int64_t begin_row, std::int64_t end_row) {
  Latent s = place(book, workspace, 0);
  const std::int64_t features = book.given->num_features;
  const std::int64_t ld = book.capacity;
  for (std::int32_t f = 0; f < book.features; ++f) {
    s.x[f] = 0.0;
  }
  for (std::int64_t row = begin_row; row < end_row; ++row) {
    load_support(book, given, row, s);
    const std::int64_t at = row * given.max_support;
    const std::int32_t width = round_up(s.size);
    for (std::int64_t f = 0; given.grad_quantized != nullptr && f < features; ++f) {
      s.x[f] = given.grad_quantized[row * features + f] * book.radius;
    }
    // a = g = dL/dp + C_S u; constants over the support vanish under M, so centred codes will do.
    for (std::int32_t i = 0; i < width; ++i) {
      const double *code = s.codes + std::int64_t{s.slots[i < s.size ? i : 0]} * book.features;
      s.a[i] = i < s.size ? dot(code, s.x, book.features) : 0.0;
      s.a[i] += given.grad_weights != nullptr && i < s.size ? given.grad_weights[at + i] : 0.0;
    }
    for (std::int32_t b = 0; b < width; b += kScqWide) {
      fold(s.mt + b, ld, s.a, 0, s.size < b + kScqWide ? s.size : b + kScqWide).store(s.t + b);
    }
    const double share = dot(s.w, s.t, width) / dot(s.w, s.w, width);
    const double unit = 1.0 / (book.radius * book.radius);
    for (std::int32_t i = 0; i < width; ++i) {
      s.t[i] = (s.t[i] - share * s.w[i]) * unit;
    }
    for (std::int32_t b = 0; b < width; b += kScqWide) {
      fold(s.m + b, ld, s.t, b, s.size).store(s.p + b);
    }
    for (std::int32_t i = 0; i < given.max_support; ++i) {
      multipliers[at + i] = i < s.size ? s.p[i] : 0.0;
    }
    double *grad = given.grad_latents + row * features;
    for (std::int64_t f = 0; f < features; ++f) {
      grad[f] = 0.0;
    }
    for (std::int32_t i = 0; i < s.size; ++i) {
      const double *code = s.codes + std::int64_t{s.slots[i]} * book.features;
      const double v = s.p[i] * book.radius;
      for (std::int64_t f = 0; f < features; ++f) {
        grad[f] += v * code[f];
      }
    }
  }
}

// dL/dc_k = v_k r + p_k (u - dL/dz), latents and slots in order.
void scatter_all(const ScqCodebook &book, const vq_scq_gradient &given,
                 const ScqWorkspace &workspace, const double *multipliers) {
  Latent s = place(book, workspace, 0);
  const std::int64_t features = book.given->num_features;
  for (std::int64_t row = 0; row < book.given->num_latents; ++row) {
    const std::int64_t at = row * given.max_support;
    load_row(book, book.given->latents, row, s.r);
    for (std::int64_t i = 0; i < given.sizes[row]; ++i) {
      load_row(book, book.given->codebook, given.indices[at + i], s.entering);
      const double p = given.weights[at + i];
      for (std::int64_t f = 0; f < features; ++f) {
        s.r[f] -= p * s.entering[f];
      }
    }
    for (std::int64_t f = 0; f < features; ++f) {
      const std::int64_t here = row * features + f;
      const double u = given.grad_quantized != nullptr ? given.grad_quantized[here] : 0.0;
      s.x[f] = u - given.grad_latents[here];
      s.r[f] *= book.radius;
    }
    for (std::int64_t i = 0; i < given.sizes[row]; ++i) {
      double *grad = given.grad_codebook + given.indices[at + i] * features;
      const double v = multipliers[at + i];
      const double p = given.weights[at + i];
      for (std::int64_t f = 0; f < features; ++f) {
        grad[f] += v * s.r[f] + p * s.x[f];
      }
    }
  }
}

void nearest_range(const ScqCodebook &book, const ScqWorkspace &workspace, std::int64_t *indices,
                   std::int64_t begin_row, std::int64_t end_row) {
  Latent latents[kScqBlock];
  for (std::int32_t i = 0; i < kScqBlock; ++i) {
    latents[i] = place(book, workspace, i);
  }
  const std::int64_t features = book.given->num_features;
  float *queries = place_queries(book, workspace);
  float *scores = queries + kScqBlock * features;
  for (std::int64_t row = begin_row; row < end_row; row += kScqBlock) {
    const std::int64_t left = end_row - row;
    const auto count = static_cast<std::int32_t>(left < kScqBlock ? left : kScqBlock);
    for (std::int32_t i = 0; i < count; ++i) {
      load_row(book, book.given->latents, row + i, latents[i].z);
      for (std::int64_t f = 0; f < features; ++f) {
        queries[i * features + f] = static_cast<float>(latents[i].z[f]);
      }
    }
    scan(book, queries, count, scores);
    for (std::int32_t i = 0; i < count; ++i) {
      float *values = scores + std::int64_t{i} * book.padded;
      const Lowest lowest = rank_values(book, book.half_norms, values);
      indices[row + i] =
          exact_nearest(book, values, lowest.best, latents[i].z, latents[i].entering);
    }
  }
}

}  // namespace
}  // namespace vq
