// The derivative of a solution: one factor per support. Part of scq_solve_tier.hpp.
#pragma once

#include "scq_solve_exact.hpp"

namespace vq {
namespace {

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

}  // namespace
}  // namespace vq
