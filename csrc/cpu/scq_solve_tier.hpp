// The SCQ solver of one tier, written once over `Lanes` (16 floats) and `Doubles` (8), which
// the including source file includes before, with `least`, `pack` and `transpose4`. Internal linkage
// keeps tiers apart. No FMA, and every sum has a fixed order, so all tiers agree bit for bit.
//
// Per latent, in rounds of one scan over all codes each: a support is guessed in float32 over the
// codes that lie lowest (scq_solve_guess.hpp); once the scan finds no better code, float64 makes the
// weights exact and certifies them. What float32 cannot settle goes on with a primal active set in
// float64 (scq_solve_exact.hpp), as scq/solver/exact.py.
#pragma once

#include "scq_solve_gradient.hpp"
#include "scq_solve_guess.hpp"

namespace vq {
namespace {

// Guesses per latent before the exact active set takes over.
constexpr std::int32_t kGuessRounds = 8;
// New candidates without which a guess is not worth its scan.
constexpr std::int32_t kLeastNews = 8;
// A residual that float64 moved by more than this share is scanned again.
constexpr double kLargeSlack = 1e-3;

// ---- The start ----

// Distinct codes to start from, with equal weights: the given ones, or the nearest.
void choose_start(const ScqCodebook &book, Latent &s) {
  const vq_scq_problem &given = *book.given;
  s.size = 0;
  for (std::int32_t i = 0; given.initial != nullptr && i < given.initial_width; ++i) {
    const std::int64_t code = given.initial[s.row * given.initial_width + i];
    const bool known = std::find(s.ids, s.ids + s.size, code) != s.ids + s.size;
    if (code >= 0 && !known && s.size < book.capacity) {
      s.ids[s.size++] = static_cast<std::int32_t>(code);
    }
  }
  if (s.size == 0) {
    s.ids[s.size++] = s.nearest;
  }
  std::fill(s.p, s.p + s.size, 1.0 / s.size);
}

// On with the exact active set, from the support as it is.
void become_exact(const ScqCodebook &book, Latent &s) {
  s.mode = Mode::kExact;
  s.num_candidates = 0;
  const std::int32_t count = s.size;
  std::int32_t codes[kScqMaxSupport];
  std::copy(s.ids, s.ids + count, codes);
  start_support(book, s);
  bool independent = true;
  for (std::int32_t i = 0; i < count && independent; ++i) {
    independent = begin_with(book, s, codes[i]);
  }
  if (!independent || !keep_positive(book, s)) {
    start_support(book, s);
    begin_with(book, s, s.nearest);
    s.p[0] = 1.0;
  }
}

// The support first, then the codes that lie lowest. Values of the support are infinite.
void choose_members(const ScqCodebook &book, Latent &s, const float *values,
                    const Lowest &lowest) {
  const bool first = s.rounds == 0 && s.size == 1;
  const std::int32_t wanted = first ? kScqLanes : round_up(s.size + kScqLanes, kScqLanes);
  s.width = wanted < kScqGuess ? wanted : kScqGuess;
  std::copy(s.ids, s.ids + s.size, s.candidates);
  s.num_candidates = s.size + lowest_codes(book, lowest, values, s.width - s.size,
                                           s.candidates + s.size);
}

// To better codes than the support's: by a guess, or by the exact active set if guesses lead on
// to nothing.
void take_in(const ScqCodebook &book, Latent &s, float *table, const float *values,
             const Lowest &lowest) {
  if (s.rounds < kGuessRounds && s.size + kLeastNews <= kScqGuess) {
    choose_members(book, s, values, lowest);
    const Guessed outcome = guess(book, s, table);
    if (outcome == Guessed::kOutOfIterations) {
      s.status = Status::kUnsolved;
    }
    if (outcome != Guessed::kStuck) {
      return;
    }
  }
  become_exact(book, s);
  choose_candidates(book, s, values, lowest);
}

void begin(const ScqCodebook &book, Latent &s, float *table, float *values) {
  const Lowest lowest = rank_values(book, book.half_norms, values);
  s.nearest = exact_nearest(book, values, lowest.best, s.z, s.entering);
  load_row(book, book.given->codebook, s.nearest, s.entering);
  s.reference = dot(s.entering, s.z, book.features);
  const double norm = std::sqrt(dot(s.z, s.z, book.features));
  s.scale = book.reach * (norm + book.reach) + book.lam;
  s.threshold = book.given->tolerance * s.scale;
  s.threshold = s.threshold > 0.0 ? s.threshold : 1e-300;
  s.mode = Mode::kGuessing;
  s.rounds = 0;
  s.iterations = 1;
  s.status = Status::kUnsolved;
  if (norm < 1e30) {  // beyond, float32 cannot hold what the latent needs
    s.status = Status::kRunning;
    choose_start(book, s);
    for (std::int32_t i = 0; i < s.size; ++i) {
      values[s.ids[i]] = kFloatInfinity;
    }
    take_in(book, s, table, values, lowest);
  }
}

// ---- The certificate ----

struct Certificate {
  double lowest;           // the smallest gradient over all codes, as far as it lies below mu
  std::int32_t violator;   // a code that lies under mu by more than the threshold, or -1
};

// Looks at every code that could lie under mu, given what float32 may have rounded away.
Certificate certify(const ScqCodebook &book, Latent &s, const float *values,
                    const Lowest &lowest, double level) {
  Certificate out{kInfinity, -1};
  for (std::int32_t i = 0; i < s.size; ++i) {
    const double *code = s.codes + std::int64_t{s.slots[i]} * book.features;
    double gradient = book.lam * s.p[i] - dot(code, s.r, book.features);
    gradient -= s.ids[i] == s.nearest ? book.bonus : 0.0;
    out.lowest = gradient < out.lowest ? gradient : out.lowest;
  }
  const double error = scan_error(book);
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
  std::int32_t codes[kScqCandidates + kScqLanes];
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

// What a scan of all codes says about a latent.
struct Scanned {
  float *values;  // of codes outside the support their gradient over |r|, of the others infinite
  Lowest lowest;
  double nearest;  // the nearest code's value, its bonus counted
};

// Scores into values. The nearest code does not count among the lowest: float64 looks at it.
Scanned read_scores(const ScqCodebook &book, const Latent &s, float *values) {
  for (std::int32_t i = 0; i < s.size; ++i) {
    values[s.ids[i]] = -kFloatInfinity;
  }
  const float score = values[s.nearest];
  values[s.nearest] = -kFloatInfinity;
  Scanned out{values, rank_values(book, book.no_norms, values), kInfinity};
  if (score > -kFloatInfinity) {
    const double bonus = book.bonus / s.length;
    out.nearest = -static_cast<double>(score) - (bonus < 1e30 ? bonus : 1e30);
    values[s.nearest] = static_cast<float>(out.nearest);
  }
  return out;
}

// Some code lies under mu, by more than float32's rounding.
bool is_violated(const Latent &s, const Scanned &scanned) {
  const double level = (s.mu - 2.0 * kGuessTolerance * s.scale) / s.length;
  return scanned.lowest.best < level || scanned.nearest < level;
}

// Makes the guessed weights exact. How far the residual moved, over its length, or -1 if it failed.
double settle(const ScqCodebook &book, Latent &s) {
  const double length = s.length;
  double rough[VQ_SCQ_MAX_FEATURES];
  std::copy(s.r, s.r + book.features, rough);
  if (!refine(book, s)) {
    return -1.0;
  }
  for (std::int32_t f = 0; f < book.features; ++f) {
    rough[f] -= s.r[f];
  }
  s.mode = Mode::kSettled;
  return std::sqrt(dot(rough, rough, book.features)) / length;
}

// A scan's verdict: solved, or on with better codes.
void review(const ScqCodebook &book, Latent &s, float *table, float *scores) {
  const Scanned scanned = read_scores(book, s, scores);
  const double length = s.length;  // of the residual that was scanned
  double slack = 0.0;
  if (s.mode == Mode::kGuessing) {
    if (is_violated(s, scanned)) {
      take_in(book, s, table, scores, scanned.lowest);
      return;
    }
    slack = settle(book, s);
    if (slack > kLargeSlack) {
      return;
    }
  }
  if (slack >= 0.0) {
    const Certificate found =
        certify(book, s, scores, scanned.lowest, s.mu / length + 1.01 * slack);
    if (found.violator < 0) {
      s.residual = s.mu > found.lowest ? s.mu - found.lowest : 0.0;
      s.status = Status::kSolved;
      return;
    }
    if (s.mode == Mode::kSettled) {
      become_exact(book, s);
    }
    s.status = begin_with(book, s, found.violator) ? Status::kRunning : Status::kUnsolved;
  } else {
    become_exact(book, s);
  }
  choose_candidates(book, s, scores, scanned.lowest);
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

// ---- Memory of a block ----

// What a block shares, behind the latents' floats.
struct BlockSpace {
  float *queries;  // [kScqBlock][num_features]
  float *scores;   // [kScqBlock][padded]
  float *table;    // [num_features][kScqGuess], of the guess at work
};

BlockSpace place_block(const ScqCodebook &book, const ScqWorkspace &workspace) {
  const std::int64_t features = book.given->num_features;
  BlockSpace out{};
  out.queries = workspace.floats + kScqBlock * (kScqGuessRows + (features + 1) * kScqCandidates);
  out.scores = out.queries + kScqBlock * features;
  out.table = out.scores + kScqBlock * book.padded;
  return out;
}

// ---- Entry points ----

// Scores of the latents themselves.
void scan_latents(const ScqCodebook &book, Latent *latents, std::int32_t count,
                  const BlockSpace &space) {
  const std::int64_t features = book.given->num_features;
  for (std::int32_t i = 0; i < count; ++i) {
    load_row(book, book.given->latents, latents[i].row, latents[i].z);
    for (std::int64_t f = 0; f < features; ++f) {
      space.queries[i * features + f] = static_cast<float>(latents[i].z[f]);
    }
  }
  scan(book, space.queries, count, space.scores);
}

// Up to the next scan: the residual of what is known.
void prepare(const ScqCodebook &book, Latent &s) {
  switch (s.mode) {
    case Mode::kGuessing:
      return find_rough_residual(book, s);
    case Mode::kSettled:
      return;
    case Mode::kExact:
      return descend(book, s);
  }
}

void solve_block(const ScqCodebook &book, const vq_scq_solution &out, Latent *latents,
                 std::int32_t count, const BlockSpace &space) {
  const std::int64_t features = book.given->num_features;
  scan_latents(book, latents, count, space);
  for (std::int32_t i = 0; i < count; ++i) {
    begin(book, latents[i], space.table, space.scores + std::int64_t{i} * book.padded);
  }
  for (;;) {
    Latent *active[kScqBlock];
    std::int32_t num_active = 0;
    for (std::int32_t i = 0; i < count; ++i) {
      Latent &s = latents[i];
      if (s.status == Status::kRunning) {
        prepare(book, s);
      }
      if (s.status == Status::kRunning) {
        unit_residual(book, s, space.queries + num_active * features);
        active[num_active++] = &s;
      }
    }
    if (num_active == 0) {
      break;
    }
    scan(book, space.queries, num_active, space.scores);
    for (std::int32_t i = 0; i < num_active; ++i) {
      review(book, *active[i], space.table, space.scores + std::int64_t{i} * book.padded);
    }
  }
  for (std::int32_t i = 0; i < count; ++i) {
    write(book, latents[i], out);
  }
}

// Calls work(latents, count, space) for blocks of rows.
template <typename Work>
void each_block(const ScqCodebook &book, const ScqWorkspace &workspace, std::int64_t begin_row,
                std::int64_t end_row, Work work) {
  Latent latents[kScqBlock];
  for (std::int32_t i = 0; i < kScqBlock; ++i) {
    latents[i] = place(book, workspace, i);
  }
  const BlockSpace space = place_block(book, workspace);
  for (std::int64_t row = begin_row; row < end_row; row += kScqBlock) {
    const std::int64_t left = end_row - row;
    const auto count = static_cast<std::int32_t>(left < kScqBlock ? left : kScqBlock);
    for (std::int32_t i = 0; i < count; ++i) {
      latents[i].row = row + i;
    }
    work(latents, count, space);
  }
}

void solve_range(const ScqCodebook &book, const vq_scq_solution &out, const ScqWorkspace &workspace,
                 std::int64_t begin_row, std::int64_t end_row) {
  each_block(book, workspace, begin_row, end_row,
             [&](Latent *latents, std::int32_t count, const BlockSpace &space) {
               solve_block(book, out, latents, count, space);
             });
}

void nearest_range(const ScqCodebook &book, const ScqWorkspace &workspace, std::int64_t *indices,
                   std::int64_t begin_row, std::int64_t end_row) {
  const auto work = [&](Latent *latents, std::int32_t count, const BlockSpace &space) {
    scan_latents(book, latents, count, space);
    for (std::int32_t i = 0; i < count; ++i) {
      const Latent &s = latents[i];
      float *values = space.scores + std::int64_t{i} * book.padded;
      const Lowest lowest = rank_values(book, book.half_norms, values);
      indices[s.row] = exact_nearest(book, values, lowest.best, s.z, s.entering);
    }
  };
  each_block(book, workspace, begin_row, end_row, work);
}

}  // namespace
}  // namespace vq
