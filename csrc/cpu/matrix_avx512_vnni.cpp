// AVX-512 VNNI tier: grids decode in registers, vpdpbusd adds four products per 32-bit lane.
// Without byte permutes, codebooks and trellises decode as in the AVX2 tier, into a tile.
// Compiled with the flags of CMakeLists.txt; only reached after the run-time check in dispatch.cpp.
#include "matrix_avx2.hpp"
#include "matrix_avx512.hpp"

namespace vq {
namespace {

struct Vnni {
  static void decode(const MatrixStage &stage, std::int32_t panel, std::int32_t column,
                     std::int32_t count, std::uint8_t *tile) {
    if (!decode_grid(stage, panel, column, count, tile)) {
      decode_codebooks(stage, panel, column, count, tile);
    }
  }
};

void panels(const MatrixJob &job, std::int32_t begin, std::int32_t end) {
  if (!multiply_grid(job, begin, end)) {
    multiply_vectors<Vnni>(job, begin, end);
  }
}

}  // namespace

const MatrixOps matrix_ops_avx512_vnni = {
    panels, Vnni::decode, {layered_largest, layered_estimate}};

}  // namespace vq
