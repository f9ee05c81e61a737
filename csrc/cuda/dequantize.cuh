// Weights in half precision for matrix products that a library does better, decoded by the same
// tiles as in gemm.cuh: [outputs][inputs], or [inputs][outputs] where a tile's row is one input.
#pragma once

#include "tile.cuh"

namespace vq {

template <typename Tiles>
constexpr int kDequantizeBytes = 2 * Tiles::kPackedBytes + TileShape<Tiles::kByInput>::kBytes;

template <typename Tiles>
VQ_INLINE void store_tile(const Tiles &tiles, int input, const __half *tile, __half *weights) {
  using Shape = TileShape<Tiles::kByInput>;
  const int first_row = Tiles::kByInput ? input : tiles.output;
  const int first_column = Tiles::kByInput ? tiles.output : input;
  const int rows = Tiles::kByInput ? tiles.m.inputs : tiles.m.outputs;
  const int columns = Tiles::kByInput ? tiles.m.outputs : tiles.m.inputs;
  for (int i = static_cast<int>(threadIdx.x); i < Shape::kRows * Shape::kColumns; i += kThreads) {
    const int row = i / Shape::kColumns, column = i % Shape::kColumns;
    if (first_row + row >= rows || first_column + column >= columns) continue;
    const long long at = static_cast<long long>(first_row + row) * columns;
    weights[at + first_column + column] = tile[row * Shape::kPitch + column];
  }
}

// Grid: blocks of outputs, slices of the inputs. `shared` is what the tables leave, aligned to 16
// bytes: kDequantizeBytes<Tiles> of it.
template <typename Tiles>
VQ_INLINE void dequantize(Tiles tiles, __half *weights, unsigned char *shared) {
  const auto packed = [=](int tile) { return shared + tile % 2 * Tiles::kPackedBytes; };
  __half *decoded = reinterpret_cast<__half *>(shared + 2 * Tiles::kPackedBytes);
  const Range range = slice_of(count_tiles(tiles.m.inputs, kTileInputs), blockIdx.y, gridDim.y);
  if (range.begin < range.end) tiles.fetch(range.begin * kTileInputs, packed(range.begin));
  commit_copies();
  for (int tile = range.begin; tile < range.end; ++tile) {
    if (tile + 1 < range.end) tiles.fetch((tile + 1) * kTileInputs, packed(tile + 1));
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    tiles.decode(tile * kTileInputs, packed(tile), decoded);
    __syncthreads();
    store_tile(tiles, tile * kTileInputs, decoded, weights);
  }
  wait_copies<0>();
}

}  // namespace vq
