// Baseline tier of the lattice search: plain C++ that any compiler vectorises as far as it can.
#include "lanes_baseline.hpp"
#include "lattice_tier.hpp"

namespace vq {

const LatticeOps lattice_ops_baseline = {distances, scan_finds, scan,     mix,     evaluate,
                                         range,     at_most,    to_words, screen};

}  // namespace vq
