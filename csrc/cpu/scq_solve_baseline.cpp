// Baseline tier of the SCQ solver: plain C++ that any compiler vectorises as far as it can.
#include <algorithm>
#include <cstdint>

#include "lanes_baseline.hpp"

namespace vq {
namespace {

float least(const Lanes &lanes) {
  return *std::min_element(lanes.value, lanes.value + 16);
}

// Writes first + i of every set bit i, in order.
void pack(std::uint32_t mask, std::int32_t first, std::int32_t *out) {
  for (; mask != 0; mask &= mask - 1) {
    *out++ = first + __builtin_ctz(mask);
  }
}

// out[i] = element at + i of the 16 rows, i < 4.
void transpose4(const float *const *rows, std::int32_t at, Lanes *out) {
  for (int i = 0; i < 4; ++i) {
    for (int lane = 0; lane < 16; ++lane) {
      out[i].value[lane] = rows[lane][at + i];
    }
  }
}

}  // namespace
}  // namespace vq

#define VQ_SCQ_TILE_ROWS 2
#define VQ_SCQ_TILE_PANELS 1
#include "scq_solve_tier.hpp"

namespace vq {

const ScqOps scq_ops_baseline = {solve_range, differentiate_range, scatter_all, nearest_range};

}  // namespace vq
