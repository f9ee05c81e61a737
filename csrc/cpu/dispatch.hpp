// Which tier runs. Knows cpuid, knows nothing of the layouts.
#pragma once

#include "lattice_kernels.hpp"
#include "matrix_kernels.hpp"
#include "scq_solve_kernels.hpp"
#include "trellis_kernels.hpp"

namespace vq {

// The lattice loops of the current tier.
const LatticeOps &lattice_ops();

// The packed-matrix loops of the current tier.
const MatrixOps &matrix_ops();

// The SCQ solver of the current tier.
const ScqOps &scq_ops();

// The weight encoders of the current tier.
const SweepOps &sweep_ops();

}  // namespace vq
