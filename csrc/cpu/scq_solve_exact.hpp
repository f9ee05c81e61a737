// One latent, and the exact active set over its support in float64. Part of scq_solve_tier.hpp.
//
// The inverse Cholesky factor M of A = C_S C_S^T + max(lam, ridge) I + 1 1^T is kept and updated: a
// code enters by one more row, and leaves by plane rotations of the rows after it. With y = M b and
// w = M 1, which take part in both, the optimum on the support is q = M^T (y - nu w): no triangular
// solve, hence no chain of dependent steps. (1 1^T is a constant on the simplex and makes supports
// definite without lam.)
#pragma once

#include <cmath>
#include <cstring>
#include <initializer_list>

#include "scq_solve_scan.hpp"

namespace vq {
namespace {

// A new pivot below this is a dependent code (A has diagonal 1 to 2).
constexpr double kDependent = 1e-10;

enum class Status { kRunning, kSolved, kUnsolved };
// Guessing in float32, a guess made exact in float64, or the exact active set.
enum class Mode { kGuessing, kSettled, kExact };

struct Latent {
  std::int64_t row;
  Status status;
  Mode mode;
  std::int32_t rounds;
  std::int32_t width;  // lanes of the guess
  std::int32_t size;
  std::int32_t iterations;
  std::int32_t nearest;
  std::int32_t num_candidates;
  std::int32_t nearest_candidate;  // its place among the candidates, or -1
  double reference;                // c_j.z, taken off b: a common part only moves nu
  double scale;                    // of gradients
  double threshold;
  double residual;
  double length;  // |r|
  double mu;
  double *z, *x, *r, *entering;  // [features]
  double *codes;                 // [capacity][features], by slot
  double *m, *mt;                // [capacity][capacity]: M and its transpose
  double *p, *q, *y, *w, *a, *l, *t;
  std::int32_t *ids, *slots;
  std::int32_t candidates[kScqGuess + kScqLanes];
  std::int32_t lanes[kScqGuess];  // of the support, in the guess
  float *rows;     // of the guess, [kScqGuess + 1][kScqGuess] at most
  float *table;    // [num_features][kScqCandidates], the candidates' codes, transposed
  float *penalty;  // [kScqCandidates] +inf for codes in the support and in the padding
};

// One of a thread's latents.
Latent place(const ScqCodebook &book, const ScqWorkspace &workspace, std::int32_t number) {
  const std::int64_t cap = book.capacity;
  const std::int64_t wide = book.features;
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
  const std::int64_t features = book.given->num_features;
  s.rows = workspace.floats + number * (kScqGuessRows + (features + 1) * kScqCandidates);
  s.table = s.rows + kScqGuessRows;
  s.penalty = s.table + features * kScqCandidates;
  s.ids = workspace.integers + number * 2 * cap;
  s.slots = s.ids + cap;
  return s;
}

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

// r = z - x, |r| and mu = p.g, from p and x.
void find_length(const ScqCodebook &book, Latent &s) {
  double pull = 0.0;
  for (std::int32_t i = 0; i < s.size; ++i) {
    pull += book.lam * s.p[i] * s.p[i];
    pull -= s.ids[i] == s.nearest ? book.bonus * s.p[i] : 0.0;
  }
  for (std::int32_t f = 0; f < book.features; f += kScqWide) {
    (Doubles::load(s.z + f) - Doubles::load(s.x + f)).store(s.r + f);
  }
  const double length = std::sqrt(dot(s.r, s.r, book.features));
  s.length = length > 1e-300 ? length : 1e-300;
  s.mu = pull - dot(s.x, s.r, book.features);
}

// x = C^T p in float32, and what follows from it.
void find_rough_residual(const ScqCodebook &book, Latent &s) {
  const std::int32_t features = book.given->num_features;
  float x[VQ_SCQ_MAX_FEATURES];
  for (std::int32_t f = 0; f < features; ++f) {
    x[f] = 0.0f;
  }
  for (std::int32_t i = 0; i < s.size; ++i) {
    const float *row = book.rows + std::int64_t{s.ids[i]} * features;
    const auto p = static_cast<float>(s.p[i]);
    for (std::int32_t f = 0; f < features; ++f) {
      x[f] += p * row[f];
    }
  }
  for (std::int32_t f = 0; f < features; ++f) {
    s.x[f] = static_cast<double>(x[f]);
  }
  for (std::int32_t f = features; f < book.features; ++f) {
    s.x[f] = 0.0;
  }
  find_length(book, s);
}

// x = C^T p, and what follows from it.
void find_residual(const ScqCodebook &book, Latent &s) {
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
    (even + odd).store(s.x + f);
  }
  find_length(book, s);
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

void choose_candidates(const ScqCodebook &book, Latent &s, const float *values,
                       const Lowest &lowest) {
  const std::int32_t features = book.given->num_features;
  s.num_candidates = lowest_codes(book, lowest, values, kScqCandidates, s.candidates);
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

// Loads a code with weight 0, unless it is there; false if it depends on the others.
bool begin_with(const ScqCodebook &book, Latent &s, std::int32_t code) {
  for (std::int32_t i = 0; i < s.size; ++i) {
    if (s.ids[i] == code) {
      return true;
    }
  }
  load_row(book, book.given->codebook, code, s.entering);
  return append(book, s, code, kDependent);
}

// Solves for the support and drops what is not positive, until nothing is; false if all go.
bool keep_positive(const ScqCodebook &book, Latent &s) {
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

}  // namespace
}  // namespace vq
