// AVX-512 tier of the lattice search: 16 codes are one register, comparisons give their mask.
// Compiled with the flags of CMakeLists.txt; only reached after the run-time check in dispatch.cpp.
#include "lanes_avx512.hpp"
#include "lattice_tier.hpp"

namespace vq {

const LatticeOps lattice_ops_avx512_vnni = {distances, scan_finds, scan,     mix,     evaluate,
                                            range,     at_most,    to_words, screen};

}  // namespace vq
