// A support and its weights in float32, over a few candidate codes; then Newton steps that make
// them exact. Part of scq_solve_tier.hpp.
//
// Principal pivoting: on the basic codes B, [mu; p_B] = K^-1 [1; b_B] with K = [0 1'; 1 H_BB],
// H = D D' + lam I and D the codes less the first candidate, so that little cancels. Row r of the
// table belongs to mu (r = 0) or to a basic code; its lane j is what the row's unknown gains by p_j
// if code j is open, by j's multiplier if j is basic. Entering and leaving are rank-one updates of
// the rows. Only basic rows are kept: an open code's row is made when it enters.
#pragma once

#include <cmath>

#include "scq_solve_exact.hpp"

namespace vq {
namespace {

// Of a gradient's scale: float32 takes smaller violations for rounding.
constexpr double kGuessTolerance = 1e-6;
constexpr float kGuessDependent = 1e-6f;
// Of a gradient's scale, within the support: what counts as solved.
constexpr double kRefined = 1e-14;
constexpr int kMaxRefinements = 8;
// Pivots beyond one per candidate before a guess gives up.
constexpr std::int32_t kGuessPatience = 16;

// One number per candidate.
template <int kVectors>
struct Row {
  Lanes part[kVectors];

  static Row all(float x) {
    Row row;
    for (Lanes &lanes : row.part) lanes = Lanes::all(x);
    return row;
  }
  static Row load(const float *p) {
    Row row;
    for (int v = 0; v < kVectors; ++v) row.part[v] = Lanes::load(p + v * kScqLanes);
    return row;
  }
  void store(float *p) const {
    for (int v = 0; v < kVectors; ++v) part[v].store(p + v * kScqLanes);
  }
  friend Row operator+(Row a, const Row &b) {
    for (int v = 0; v < kVectors; ++v) a.part[v] = a.part[v] + b.part[v];
    return a;
  }
  friend Row operator-(Row a, const Row &b) {
    for (int v = 0; v < kVectors; ++v) a.part[v] = a.part[v] - b.part[v];
    return a;
  }
  friend Row operator*(Row a, const Row &b) {
    for (int v = 0; v < kVectors; ++v) a.part[v] = a.part[v] * b.part[v];
    return a;
  }
  friend Row operator*(Row a, float b) {
    const Lanes wide = Lanes::all(b);
    for (int v = 0; v < kVectors; ++v) a.part[v] = a.part[v] * wide;
    return a;
  }
  float lowest() const {
    Lanes low = part[0];
    for (int v = 1; v < kVectors; ++v) low = lesser(low, part[v]);
    return least(low);
  }
  // One bit per candidate.
  std::uint64_t at_most(float limit) const {
    std::uint64_t mask = 0;
    for (int v = 0; v < kVectors; ++v) {
      mask |= std::uint64_t{part[v].at_most(Lanes::all(limit))} << (v * kScqLanes);
    }
    return mask;
  }
};

template <int kVectors>
class Guess {
 public:
  static constexpr std::int32_t kWidth = kVectors * kScqLanes;
  using Wide = Row<kVectors>;

  // Only the first candidate is basic, with weight 1.
  Guess(const ScqCodebook &book, const Latent &s, float *table)
      : features_(book.given->num_features),
        lam_(static_cast<float>(book.diagonal)),
        tolerance_(static_cast<float>(kGuessTolerance * s.scale)),
        table_(table),
        rows_(s.rows) {
    fill_table(book, s);
    const float *origin = code(book, s.candidates[0]);
    float offset[VQ_SCQ_MAX_FEATURES];
    for (std::int32_t f = 0; f < features_; ++f) {
      offset[f] = static_cast<float>(s.z[f]) - origin[f];
    }
    const auto bonus = static_cast<float>(book.bonus);
    const float pull = (s.candidates[0] == s.nearest ? bonus : 0.0f) - lam_;
    (Wide::all(pull) - products(offset, 1)).store(value_);
    Wide::all(0.0f).store(p_);
    Wide::all(1.0f).store(open_);
    Wide::all(0.0f).store(bar_);
    Wide::all(lam_).store(row(0));
    Wide::all(-1.0f).store(row(1));
    for (std::int32_t c = 0; c < kWidth; ++c) {
      bar_[c] = c < s.num_candidates ? 0.0f : kFloatInfinity;
      value_[c] -= c < s.num_candidates && s.candidates[c] == s.nearest ? bonus : 0.0f;
    }
    row(0)[0] = 1.0f;
    row(1)[0] = 0.0f;
    size_ = 0;
    make_basic(0, 1.0f);
    p_[0] = 1.0f;
  }

  // The first `count` candidates join with these weights.
  void load_support(std::int32_t count, const double *weights) {
    for (std::int32_t lane = 1; lane < count; ++lane) {
      enter(lane);
    }
    for (std::int32_t r = 0; r < size_; ++r) {
      p_[lanes_[r]] = static_cast<float>(weights[lanes_[r]]);
    }
  }

  // To the optimum over the candidates; false if that takes more than `most` pivots.
  bool improve(std::int32_t most) {
    for (;;) {
      if (!step()) {
        if (pivots_ > most) {
          return false;
        }
        continue;
      }
      const Wide price = Wide::load(value_) + Wide::load(bar_);
      const float lowest = price.lowest();
      if (!(lowest < -tolerance_)) {
        return true;
      }
      if (++pivots_ > most) {
        return false;
      }
      enter(__builtin_ctzll(price.at_most(lowest)));
    }
  }

  std::int32_t size() const { return size_; }
  std::int32_t pivots() const { return pivots_; }
  std::int32_t lane(std::int32_t at) const { return lanes_[at]; }
  float weight(std::int32_t at) const { return p_[lanes_[at]]; }

 private:
  static const float *code(const ScqCodebook &book, std::int32_t number) {
    return book.rows + std::int64_t{number} * book.given->num_features;
  }

  float *row(std::int32_t r) { return rows_ + r * kWidth; }

  // Candidates less the first, by feature; columns without a candidate are 0.
  void fill_table(const ScqCodebook &book, const Latent &s) {
    const float *origin = code(book, s.candidates[0]);
    const float *codes[kWidth];
    for (std::int32_t c = 0; c < kWidth; ++c) {
      codes[c] = c < s.num_candidates ? code(book, s.candidates[c]) : origin;
    }
    std::int32_t f = 0;
    for (; f + 4 <= features_; f += 4) {
      for (std::int32_t c = 0; c < kWidth; c += kScqLanes) {
        Lanes columns[4];
        transpose4(codes + c, f, columns);
        for (std::int32_t i = 0; i < 4; ++i) {
          (columns[i] - Lanes::all(origin[f + i])).store(table_ + (f + i) * kWidth + c);
        }
      }
    }
    for (; f < features_; ++f) {
      for (std::int32_t c = 0; c < kWidth; ++c) {
        table_[f * kWidth + c] = codes[c][f] - origin[f];
      }
    }
  }

  // Inner products of every candidate with a vector.
  Wide products(const float *vector, std::int32_t stride) const {
    Wide even = Wide::all(0.0f);
    Wide odd = even;
    std::int32_t f = 0;
    for (; f + 1 < features_; f += 2) {
      even = even + Wide::load(table_ + f * kWidth) * vector[f * stride];
      odd = odd + Wide::load(table_ + (f + 1) * kWidth) * vector[(f + 1) * stride];
    }
    if (f < features_) {
      even = even + Wide::load(table_ + f * kWidth) * vector[f * stride];
    }
    return even + odd;
  }

  void make_basic(std::int32_t lane, float target) {
    lanes_[size_++] = lane;
    value_[lane] = target;
    open_[lane] = 0.0f;
    bar_[lane] = kFloatInfinity;
    p_[lane] = 0.0f;
  }

  void make_open(std::int32_t at, float gradient) {
    const std::int32_t lane = lanes_[at];
    lanes_[at] = lanes_[--size_];
    value_[lane] = gradient;
    open_[lane] = 1.0f;
    bar_[lane] = 0.0f;
  }

  // Open lanes' values gain `change`, basic ones' lose it.
  void shift_values(const Wide &change) {
    const Wide sign = Wide::load(open_) * 2.0f - Wide::all(1.0f);
    (Wide::load(value_) + change * sign).store(value_);
  }

  // Every row but `skip` gains its entry at `lane` times `direction`; the entry itself is scaled.
  void eliminate(std::int32_t skip, std::int32_t lane, const Wide &direction, float scale) {
    for (std::int32_t r = 0; r <= size_; ++r) {
      if (r != skip) {
        const float entry = row(r)[lane];
        (Wide::load(row(r)) + direction * entry).store(row(r));
        row(r)[lane] = entry * scale;
      }
    }
  }

  // A code becomes basic with weight 0, unless it depends on those that are.
  void enter(std::int32_t lane) {
    float own[kWidth];
    products(table_ + lane, kWidth).store(own);
    own[lane] += lam_;
    Wide direction = Wide::load(own) * Wide::load(open_) + Wide::load(row(0));
    for (std::int32_t r = 1; r <= size_; ++r) {
      direction = direction + Wide::load(row(r)) * own[lanes_[r - 1]];
    }
    direction.store(own);
    if (!(own[lane] > kGuessDependent)) {
      bar_[lane] = kFloatInfinity;
      return;
    }
    const float inverse = 1.0f / own[lane];
    const float target = -value_[lane] * inverse;
    shift_values(direction * target);
    direction = direction * -inverse;
    eliminate(-1, lane, direction, inverse);
    direction.store(row(size_ + 1));
    row(size_ + 1)[lane] = inverse;
    make_basic(lane, target);
  }

  // The code of row r becomes open.
  void leave(std::int32_t r) {
    const std::int32_t lane = lanes_[r - 1];
    const Wide own = Wide::load(row(r));
    const float inverse = 1.0f / row(r)[lane];
    const float gradient = -value_[lane] * inverse;
    shift_values(own * -gradient);
    eliminate(r, lane, own * -inverse, inverse);
    Wide::load(row(size_)).store(row(r));
    make_open(r - 1, gradient);
  }

  // Steps to the target as far as p >= 0 allows, and drops what reached 0. True if nothing did.
  bool step() {
    const Wide p = Wide::load(p_);
    const std::uint64_t blocking =
        Wide::load(value_).at_most(0.0f) & Wide::load(open_).at_most(0.0f);
    float rooms[kWidth];
    float length = 1.0f;
    for (std::uint64_t left = blocking; left != 0; left &= left - 1) {
      const int lane = __builtin_ctzll(left);
      const float gap = p_[lane] - value_[lane];
      rooms[lane] = gap > 0.0f && p_[lane] > 0.0f ? p_[lane] / gap : 0.0f;
      length = rooms[lane] < length ? rooms[lane] : length;
    }
    // Open lanes too: nothing reads them.
    (p + (Wide::load(value_) - p) * length).store(p_);
    for (std::int32_t r = size_; r >= 1 && blocking != 0; --r) {
      const std::int32_t lane = lanes_[r - 1];
      if ((blocking >> lane & 1) != 0 && rooms[lane] <= length && size_ > 1) {
        leave(r);
        ++pivots_;
      }
    }
    return blocking == 0;
  }

  std::int32_t features_;
  std::int32_t size_ = 0;  // basic codes
  std::int32_t pivots_ = 0;
  float lam_;
  float tolerance_;
  float *table_;  // [num_features][kWidth]
  float *rows_;   // [kWidth + 1][kWidth]
  std::int32_t lanes_[kWidth];  // of the basic codes, by row - 1
  float value_[kWidth];         // open: gradient less mu; basic: the weight that is the target
  float p_[kWidth];             // of basic codes
  float open_[kWidth];          // 1 open, 0 basic
  float bar_[kWidth];           // 0, or infinity where nothing may enter
};

enum class Guessed { kDone, kStuck, kOutOfIterations };

// From the support and weights in `s` to better ones over its candidates.
template <int kVectors>
Guessed guess_with(const ScqCodebook &book, Latent &s, float *table) {
  constexpr std::int32_t kWidth = Guess<kVectors>::kWidth;
  Guess<kVectors> guess(book, s, table);
  guess.load_support(s.size, s.p);
  const std::int32_t most = book.given->max_iterations - s.iterations;
  const std::int32_t patience = kWidth + kGuessPatience;
  const bool done = guess.improve(most < patience ? most : patience);
  s.iterations += guess.pivots();
  if (!done) {
    return guess.pivots() > most ? Guessed::kOutOfIterations : Guessed::kStuck;
  }
  double sum = 0.0;
  for (std::int32_t i = 0; i < guess.size(); ++i) {
    sum += static_cast<double>(guess.weight(i));
  }
  const bool fits = guess.size() <= book.capacity;
  if (!fits || !(sum > 0.9 && sum < 1.1) || (guess.pivots() == 0 && s.rounds > 0)) {
    return Guessed::kStuck;
  }
  ++s.rounds;
  s.size = guess.size();
  for (std::int32_t i = 0; i < s.size; ++i) {
    s.lanes[i] = guess.lane(i);
    s.ids[i] = s.candidates[guess.lane(i)];
    s.p[i] = static_cast<double>(guess.weight(i)) / sum;
  }
  return Guessed::kDone;
}

Guessed guess(const ScqCodebook &book, Latent &s, float *table) {
  switch (s.width / kScqLanes) {
    case 1:
      return guess_with<1>(book, s, table);
    case 2:
      return guess_with<2>(book, s, table);
    case 3:
      return guess_with<3>(book, s, table);
    default:
      return guess_with<4>(book, s, table);
  }
}

// The gradients less mu of the support's codes into s.q; the largest size.
double find_multipliers(const ScqCodebook &book, Latent &s) {
  double worst = 0.0;
  for (std::int32_t i = 0; i < s.size; ++i) {
    const double *code = s.codes + std::int64_t{s.slots[i]} * book.features;
    double gradient = book.lam * s.p[i] - dot(code, s.r, book.features);
    gradient -= s.ids[i] == s.nearest ? book.bonus : 0.0;
    s.q[i] = gradient - s.mu;
    worst = std::fabs(s.q[i]) > worst ? std::fabs(s.q[i]) : worst;
  }
  return worst;
}

// p -= K^-1 s.q with the guess's float32 inverse; false if a weight is then not positive.
bool correct(Latent &s, double worst) {
  float changes[kScqGuess];
  for (std::int32_t b = 0; b < s.width; b += kScqLanes) {
    Lanes change = Lanes::all(0.0f);
    for (std::int32_t i = 0; i < s.size; ++i) {
      const Lanes factor = Lanes::all(static_cast<float>(s.q[i] / worst));
      change = change + factor * Lanes::load(s.rows + (i + 1) * s.width + b);
    }
    change.store(changes + b);
  }
  double sum = 0.0;
  bool positive = true;
  for (std::int32_t i = 0; i < s.size; ++i) {
    s.p[i] -= worst * static_cast<double>(changes[s.lanes[i]]);
    sum += s.p[i];
    positive = positive && s.p[i] > 0.0;
  }
  const double inverse = 1.0 / sum;
  for (std::int32_t i = 0; i < s.size; ++i) {
    s.p[i] *= inverse;
  }
  return positive;
}

// Until float64 holds the optimum on the guessed support; false if it does not come to that.
bool refine(const ScqCodebook &book, Latent &s) {
  for (std::int32_t i = 0; i < s.size; ++i) {
    s.slots[i] = i;
    load_row(book, book.given->codebook, s.ids[i], s.codes + std::int64_t{i} * book.features);
  }
  for (int i = 0; i < kMaxRefinements; ++i) {
    find_residual(book, s);
    const double worst = find_multipliers(book, s);
    if (worst <= kRefined * s.scale) {
      return true;
    }
    if (!correct(s, worst)) {
      return false;
    }
  }
  return false;
}

}  // namespace
}  // namespace vq
