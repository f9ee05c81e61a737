// What the upper layer of LAYERED weights tells of outputs: plain loops, which every tier compiles
// for itself in its own unnamed namespace.
#pragma once

#include <algorithm>
#include <cstdint>

#include "matrix_kernels.hpp"

namespace vq {
namespace {

inline std::int32_t layered_largest(const LayeredRows &rows) {
  float best[kPairRows];
  std::int32_t where[kPairRows] = {};
  std::fill_n(best, kPairRows, rows.y[0] + rows.scales[0] * rows.input.expected);
  std::int32_t row = 0;
  for (; row + kPairRows <= rows.count; row += kPairRows) {
    for (std::int32_t i = 0; i < kPairRows; ++i) {
      const float value = rows.y[row + i] + rows.scales[row + i] * rows.input.expected;
      where[i] = value > best[i] ? row + i : where[i];
      best[i] = value > best[i] ? value : best[i];
    }
  }
  for (; row < rows.count; ++row) {
    const float value = rows.y[row] + rows.scales[row] * rows.input.expected;
    where[0] = value > best[0] ? row : where[0];
    best[0] = std::max(best[0], value);
  }
  return where[std::max_element(best, best + kPairRows) - best];
}

// `count` rows of one panel.
inline bool layered_estimate_panel(const LayeredRows &rows, std::int32_t begin, std::int32_t count,
                                   float threshold) {
  float *y = rows.y + begin;
  const float *scales = rows.scales + begin;
  std::int32_t found = 0;
  for (std::int32_t i = 0; i < count; ++i) {
    y[i] += scales[i] * rows.input.expected;
    found += y[i] + scales[i] * rows.input.doubt >= threshold ? 1 : 0;
  }
  return found > 0;
}

inline std::int32_t layered_estimate(const LayeredRows &rows, float threshold,
                                     std::int32_t *panels) {
  std::int32_t count = 0;
  std::int32_t row = 0;
  for (; row + kPairRows <= rows.count; row += kPairRows) {
    panels[count] = row / kPairRows;
    count += layered_estimate_panel(rows, row, kPairRows, threshold) ? 1 : 0;  // vector code
  }
  if (row < rows.count) {
    panels[count] = row / kPairRows;
    count += layered_estimate_panel(rows, row, rows.count - row, threshold) ? 1 : 0;
  }
  return count;
}

}  // namespace
}  // namespace vq
