// Baseline tier of the SCQ solver: plain C++ that any compiler vectorises as far as it can.
#include "lanes_baseline.hpp"

#define VQ_SCQ_TILE_ROWS 2
#define VQ_SCQ_TILE_PANELS 1
#include "scq_solve_tier.hpp"

namespace vq {

const ScqOps scq_ops_baseline = {solve_range, differentiate_range, scatter_all, nearest_range};

}  // namespace vq
