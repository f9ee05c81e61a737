// AVX-512 tier of the SCQ solver: 16 floats or 8 doubles are one register.
// Compiled with the flags of avx512_vnni; only reached after the run-time check in dispatch.cpp.
#include "lanes_avx512.hpp"

#define VQ_SCQ_TILE_ROWS 6
#define VQ_SCQ_TILE_PANELS 2
#include "scq_solve_tier.hpp"

namespace vq {

const ScqOps scq_ops_avx512_vnni = {solve_range, differentiate_range, scatter_all, nearest_range};

}  // namespace vq
