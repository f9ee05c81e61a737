// The SCQ entry points: argument checks, the codebook in solver units, memory and threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.hpp"
#include "pool.hpp"
#include "vqkernels.h"

namespace {

// Beyond Caratheodory's features + 1: what lam > 0 adds.
constexpr std::int32_t kSpareSupport = 32;
constexpr double kRidge = 1e-11;

std::int32_t round_up(std::int32_t n, std::int32_t step) {
  return (n + step - 1) / step * step;
}

std::int32_t check_problem(const vq_scq_problem *problem, const vq_pool *pool) {
  if (problem == nullptr || problem->latents == nullptr || problem->codebook == nullptr) {
    return VQ_ERR_NULL;
  }
  const bool in_range = problem->num_latents >= 1 && problem->num_codes >= 1 &&
                        problem->num_codes <= VQ_SCQ_MAX_CODES && problem->num_features >= 1 &&
                        problem->num_features <= VQ_SCQ_MAX_FEATURES && problem->initial_width >= 0;
  const bool is_known = (problem->objective == VQ_SCQ_NEAREST || problem->objective == VQ_SCQ_RIDGE) &&
                        (problem->is_double == 0 || problem->is_double == 1) &&
                        problem->max_iterations >= 1;
  if (!in_range || !is_known) {
    return VQ_ERR_SHAPE;
  }
  if (!(problem->lam >= 0.0) || !std::isfinite(problem->lam) || !(problem->tolerance > 0.0)) {
    return VQ_ERR_NONFINITE;
  }
  return pool != nullptr && !pool->owned_by_this_process() ? VQ_ERR_FORKED : VQ_OK;
}

bool initial_is_known(const vq_scq_problem &problem) {
  const std::int64_t count = problem.num_latents * problem.initial_width;
  return problem.initial == nullptr ||
         std::all_of(problem.initial, problem.initial + count,
                     [&](std::int64_t code) { return code < problem.num_codes; });
}

// The arrays behind a vq::ScqCodebook.
class Codebook {
 public:
  Codebook(const vq_scq_problem &given, std::int32_t capacity) {
    view_.given = &given;
    view_.padded = round_up(given.num_codes, vq::kScqLanes);
    view_.features = round_up(given.num_features, vq::kScqWide);
    view_.capacity = round_up(std::max(capacity, 1), vq::kScqWide);
    find_units();
    pack();
    view_.centre = centre_.data();
    view_.panels = panels_.data();
    view_.rows = rows_.data();
    view_.half_norms = half_norms_.data();
    view_.no_norms = no_norms_.data();
  }

  const vq::ScqCodebook &view() const { return view_; }

 private:
  double value(std::int64_t code, std::int32_t f) const {
    const std::int64_t at = code * view_.given->num_features + f;
    return view_.given->is_double != 0
               ? static_cast<const double *>(view_.given->codebook)[at]
               : static_cast<double>(static_cast<const float *>(view_.given->codebook)[at]);
  }

  void find_units() {
    const std::int32_t features = view_.given->num_features;
    const std::int32_t codes = view_.given->num_codes;
    centre_.assign(static_cast<std::size_t>(features), 0.0);
    for (std::int32_t k = 0; k < codes; ++k) {
      for (std::int32_t f = 0; f < features; ++f) {
        centre_[f] += value(k, f);
      }
    }
    for (double &mean : centre_) {
      mean /= codes;
    }
    double largest = 0.0;
    for (std::int32_t k = 0; k < codes; ++k) {
      double norm = 0.0;
      for (std::int32_t f = 0; f < features; ++f) {
        const double x = value(k, f) - centre_[f];
        norm += x * x;
      }
      largest = std::max(largest, norm);
    }
    const double norm = std::sqrt(largest);
    view_.radius = norm > 0.0 ? std::exp2(std::ceil(std::log2(norm))) : 1.0;
    view_.inverse_radius = 1.0 / view_.radius;
    view_.reach = norm * view_.inverse_radius;
    view_.lam = view_.given->lam * view_.inverse_radius * view_.inverse_radius;
    view_.bonus = view_.given->objective == VQ_SCQ_NEAREST ? view_.lam : 0.0;
    view_.diagonal = std::max(view_.lam, kRidge * view_.reach * view_.reach);
  }

  void pack() {
    const std::int32_t features = view_.given->num_features;
    const std::int32_t codes = view_.given->num_codes;
    const auto padded = static_cast<std::size_t>(view_.padded);
    panels_.assign(padded * features, 0.0f);
    rows_.resize(static_cast<std::size_t>(codes) * features);
    half_norms_.assign(padded, std::numeric_limits<float>::infinity());
    no_norms_.assign(padded, std::numeric_limits<float>::infinity());
    for (std::int32_t k = 0; k < codes; ++k) {
      float *panel = panels_.data() + std::int64_t{k / vq::kScqLanes} * features * vq::kScqLanes;
      float *row = rows_.data() + std::int64_t{k} * features;
      double norm = 0.0;
      for (std::int32_t f = 0; f < features; ++f) {
        const double x = (value(k, f) - centre_[f]) * view_.inverse_radius;
        norm += x * x;
        row[f] = static_cast<float>(x);
        panel[std::int64_t{f} * vq::kScqLanes + k % vq::kScqLanes] = row[f];
      }
      half_norms_[k] = static_cast<float>(0.5 * norm);
      no_norms_[k] = 0.0f;
    }
  }

  vq::ScqCodebook view_{};
  std::vector<double> centre_;
  std::vector<float> panels_, rows_, half_norms_, no_norms_;
};

// One thread's memory: what scq_solve_tier.hpp places there. 24 latents of 320 codes by 320 are
// 63 MiB. Cleared: sums run over whole vectors, and what lies behind a support must be finite.
class Workspace {
 public:
  Workspace(const vq::ScqCodebook &book, std::int64_t latents) {
    const std::int64_t cap = book.capacity;
    const std::int64_t wide = book.features;
    const std::int64_t features = book.given->num_features;
    const std::int64_t per_latent = vq::kScqGuessRows + (features + 1) * vq::kScqCandidates;
    const std::int64_t shared = features + book.padded;
    doubles_.reset(new double[latents * (cap * wide + 2 * cap * cap + 7 * cap + 4 * wide)]());
    floats_.reset(new float[latents * (per_latent + shared) + features * vq::kScqGuess]());
    integers_.reset(new std::int32_t[latents * 2 * cap]());
  }

  vq::ScqWorkspace view() { return {doubles_.get(), floats_.get(), integers_.get()}; }

 private:
  std::unique_ptr<double[]> doubles_;
  std::unique_ptr<float[]> floats_;
  std::unique_ptr<std::int32_t[]> integers_;
};

// Splits latents over the pool's threads, whole blocks each.
template <typename Work>
class Split {
 public:
  Split(const vq::ScqCodebook &book, std::int64_t latents_per_thread, vq_pool *pool, Work work)
      : num_latents_(book.given->num_latents), pool_(pool), work_(work) {
    const std::int64_t blocks = (num_latents_ + vq::kScqBlock - 1) / vq::kScqBlock;
    const std::int64_t threads = pool == nullptr ? 1 : pool->num_threads();
    for (std::int64_t i = 0; i < std::min(threads, blocks); ++i) {
      workspaces_.emplace_back(book, latents_per_thread);
    }
  }

  void run() {
    if (workspaces_.size() == 1) {
      part(this, 0, 1);
    } else {
      pool_->run(part, this);
    }
  }

 private:
  static void part(void *context, std::int32_t index, std::int32_t) {
    auto *self = static_cast<Split *>(context);
    const auto parts = static_cast<std::int64_t>(self->workspaces_.size());
    if (index >= parts) {
      return;
    }
    const std::int64_t blocks = (self->num_latents_ + vq::kScqBlock - 1) / vq::kScqBlock;
    const std::int64_t begin = blocks * index / parts * vq::kScqBlock;
    const std::int64_t end = blocks * (index + 1) / parts * vq::kScqBlock;
    self->work_(self->workspaces_[static_cast<std::size_t>(index)].view(), begin,
                std::min(end, self->num_latents_));
  }

  std::int64_t num_latents_;
  vq_pool *pool_;
  Work work_;
  std::vector<Workspace> workspaces_;
};

std::int32_t largest_support(const vq_scq_problem &problem, std::int32_t max_support) {
  const std::int32_t wanted = std::min(problem.num_features + kSpareSupport, vq::kScqMaxSupport);
  return std::min({wanted, problem.num_codes, max_support});
}

void solve(const vq_scq_problem &problem, const vq_scq_solution &solution, vq_pool *pool) {
  // The factor's row length is a multiple of 8, a support is not: max_support limits it.
  const Codebook codebook(problem, largest_support(problem, solution.max_support));
  const vq::ScqOps &ops = vq::scq_ops();
  const auto work = [&](const vq::ScqWorkspace &space, std::int64_t begin, std::int64_t end) {
    ops.solve(codebook.view(), solution, space, begin, end);
  };
  Split(codebook.view(), vq::kScqBlock, pool, work).run();
}

void differentiate(const vq_scq_problem &problem, const vq_scq_gradient &gradient, vq_pool *pool) {
  const Codebook codebook(problem, gradient.max_support);
  const vq::ScqOps &ops = vq::scq_ops();
  std::vector<double> multipliers(
      static_cast<std::size_t>(problem.num_latents * gradient.max_support));
  const auto work = [&](const vq::ScqWorkspace &space, std::int64_t begin, std::int64_t end) {
    ops.differentiate(codebook.view(), gradient, space, multipliers.data(), begin, end);
  };
  Split(codebook.view(), 1, pool, work).run();
  if (gradient.grad_codebook != nullptr) {
    Workspace space(codebook.view(), 1);
    ops.scatter(codebook.view(), gradient, space.view(), multipliers.data());
  }
}

void find_nearest(const vq_scq_problem &problem, std::int64_t *indices, vq_pool *pool) {
  const Codebook codebook(problem, 1);
  const vq::ScqOps &ops = vq::scq_ops();
  const auto work = [&](const vq::ScqWorkspace &space, std::int64_t begin, std::int64_t end) {
    ops.nearest(codebook.view(), space, indices, begin, end);
  };
  Split(codebook.view(), vq::kScqBlock, pool, work).run();
}

bool supports_are_known(const vq_scq_problem &problem, const vq_scq_gradient &gradient) {
  for (std::int64_t row = 0; row < problem.num_latents; ++row) {
    if (gradient.sizes[row] < 1 || gradient.sizes[row] > gradient.max_support) {
      return false;
    }
    const std::int64_t *codes = gradient.indices + row * gradient.max_support;
    const bool all = std::all_of(codes, codes + gradient.sizes[row], [&](std::int64_t code) {
      return code >= 0 && code < problem.num_codes;
    });
    if (!all) {
      return false;
    }
  }
  return true;
}

}  // namespace

std::int32_t vq_scq_solve(const vq_scq_problem *problem, const vq_scq_solution *solution,
                          vq_pool *pool) {
  const std::int32_t status = check_problem(problem, pool);
  if (status != VQ_OK) {
    return status;
  }
  if (solution == nullptr || solution->indices == nullptr || solution->weights == nullptr ||
      solution->sizes == nullptr || solution->nearest == nullptr ||
      solution->iterations == nullptr || solution->kkt_residual == nullptr ||
      solution->quantized == nullptr || solution->unsolved == nullptr) {
    return VQ_ERR_NULL;
  }
  if (solution->max_support < 1 || solution->reserved != 0 || !initial_is_known(*problem)) {
    return VQ_ERR_SHAPE;
  }
  try {
    solve(*problem, *solution, pool);
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}

std::int32_t vq_scq_differentiate(const vq_scq_problem *problem, const vq_scq_gradient *gradient,
                                  vq_pool *pool) {
  const std::int32_t status = check_problem(problem, pool);
  if (status != VQ_OK) {
    return status;
  }
  if (gradient == nullptr || gradient->indices == nullptr || gradient->weights == nullptr ||
      gradient->sizes == nullptr || gradient->grad_latents == nullptr) {
    return VQ_ERR_NULL;
  }
  if (gradient->max_support < 1 || gradient->reserved != 0 ||
      !supports_are_known(*problem, *gradient)) {
    return VQ_ERR_SHAPE;
  }
  try {
    differentiate(*problem, *gradient, pool);
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}

std::int32_t vq_scq_nearest(const vq_scq_problem *problem, std::int64_t *indices, vq_pool *pool) {
  const std::int32_t status = check_problem(problem, pool);
  if (status != VQ_OK || indices == nullptr) {
    return status != VQ_OK ? status : VQ_ERR_NULL;
  }
  try {
    find_nearest(*problem, indices, pool);
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}
