// AVX2 tier of the lattice search: 16 codes are two registers.
// Compiled with -mavx2; only reached after the run-time check in dispatch.cpp.
#include "lanes_avx2.hpp"
#include "lattice_tier.hpp"

namespace vq {

const LatticeOps lattice_ops_avx2 = {distances, scan_finds, scan,     mix,     evaluate,
                                     range,     at_most,    to_words, screen};

}  // namespace vq
