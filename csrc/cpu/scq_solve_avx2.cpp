// AVX2 tier of the SCQ solver: 16 floats or 8 doubles are two registers.
// Compiled with -mavx2; only reached after the run-time check in dispatch.cpp.
#include "lanes_avx2.hpp"

// Four rows of 16 codes: eight registers of sums, of the sixteen there are.
#define VQ_SCQ_TILE_ROWS 4
#define VQ_SCQ_TILE_PANELS 1
#include "scq_solve_tier.hpp"

namespace vq {

const ScqOps scq_ops_avx2 = {solve_range, differentiate_range, scatter_all, nearest_range};

}  // namespace vq
