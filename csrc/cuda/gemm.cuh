// Products with many rows of activations: tiles of weights are decoded into shared memory in half
// precision and multiplied by the matrix units, with sums in float.
//
// A block makes kTileOutputs outputs of BATCH rows, over its slice of the inputs. While tile i is
// multiplied, tile i + 1 is decoded and tiles i + 2 and i + 3 are on their way from memory.
#pragma once

#include "tile.cuh"

namespace vq {

constexpr int kSlots = 4;  // packed tiles and activations in flight

struct Activations {
  const __half *values;  // [rows][stride], zero beyond the inputs; 16-byte aligned
  int rows;
  int stride;  // a multiple of 8
};

template <int BATCH, typename Tiles>
struct Gemm {
  using Shape = TileShape<Tiles::kByInput>;
  static constexpr int kWarpsAcross = BATCH >= 64 ? 2 : 1;  // warps that share the outputs
  static constexpr int kWarpsDown = kWarps / kWarpsAcross;
  static constexpr int kDown = kTileOutputs / kWarpsDown / 16;  // fragments of 16 outputs per warp
  static constexpr int kAcross = BATCH / kWarpsAcross / 16;     // pairs of fragments of 8 rows
  static constexpr int kPitch = kTileInputs + kPadding;
  static constexpr int kInputBytes = 2 * BATCH * kPitch;
  static constexpr int kSharedBytes =
      kSlots * (Tiles::kPackedBytes + kInputBytes) + 2 * Shape::kBytes;

  Tiles &tiles;
  const Activations &x;
  unsigned char *shared;
  int first_row;  // of the activations
  float acc[kDown][2 * kAcross][4];

  VQ_INLINE unsigned char *packed(int tile) const {
    return shared + tile % kSlots * Tiles::kPackedBytes;
  }
  VQ_INLINE __half *inputs(int tile) const {
    return reinterpret_cast<__half *>(shared + kSlots * Tiles::kPackedBytes +
                                      tile % kSlots * kInputBytes);
  }
  VQ_INLINE __half *decoded(int tile) const {
    return reinterpret_cast<__half *>(shared + kSlots * (Tiles::kPackedBytes + kInputBytes) +
                                      tile % 2 * Shape::kBytes);
  }
  VQ_INLINE int warp_output() const { return warp_id() % kWarpsDown * (16 * kDown); }
  VQ_INLINE int warp_row() const { return warp_id() / kWarpsDown * (16 * kAcross); }

  // Starts copying everything of one tile and closes the group, empty beyond `end`.
  VQ_INLINE void fetch(int tile, int end) const {
    if (tile < end) {
      constexpr int kChunks = kTileInputs / 8;
      __half *target = inputs(tile);
      for (int i = static_cast<int>(threadIdx.x); i < BATCH * kChunks; i += kThreads) {
        const int row = i / kChunks, column = i % kChunks * 8;
        const int input = tile * kTileInputs + column;
        const bool inside = first_row + row < x.rows && input < x.stride;
        const long long at = static_cast<long long>(first_row + row) * x.stride + input;
        copy_async<16>(target + row * kPitch + column, x.values + (inside ? at : 0), inside);
      }
      tiles.fetch(tile * kTileInputs, packed(tile));
    }
    commit_copies();
  }

  VQ_INLINE void decode(int tile) { tiles.decode(tile * kTileInputs, packed(tile), decoded(tile)); }

  // This lane's row of the matrices that make 16 outputs x 16 inputs of weights.
  VQ_INLINE const __half *weight_row(const __half *tile, int output, int input) const {
    const int lane = lane_id();
    if constexpr (Tiles::kByInput) {
      const int row = input + lane % 8 + lane / 16 * 8;
      return tile + row * Shape::kPitch + output + lane / 8 % 2 * 8;
    } else {
      return tile + (output + lane % 16) * Shape::kPitch + input + lane / 16 * 8;
    }
  }

  // The same for 16 rows x 16 inputs of activations: two fragments, for rows 0 .. 7 and 8 .. 15.
  VQ_INLINE const __half *input_row(const __half *staged, int row, int input) const {
    const int lane = lane_id();
    return staged + (row + lane % 8 + lane / 16 * 8) * kPitch + input + lane / 8 % 2 * 8;
  }

  VQ_INLINE void multiply(int tile) {
    const __half *weights = decoded(tile), *staged = inputs(tile);
#pragma unroll
    for (int input = 0; input < kTileInputs; input += 16) {
      unsigned b[kAcross][4];
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        load_matrices<false>(b[j], input_row(staged, warp_row() + 16 * j, input));
      }
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
        unsigned a[4];
        load_matrices<Tiles::kByInput>(a, weight_row(weights, warp_output() + 16 * i, input));
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
          multiply_add(acc[i][2 * j], a, b[j][0], b[j][1]);
          multiply_add(acc[i][2 * j + 1], a, b[j][2], b[j][3]);
        }
      }
    }
  }

  // Between the two barriers of tiles i and i + 1: i is read, i + 1 decoded into the other half,
  // and i + 3 arrives in the slot of i - 1, which nobody reads any more.
  VQ_INLINE void run(const Range &range) {
#pragma unroll
    for (int i = 0; i < kSlots - 1; ++i) fetch(range.begin + i, range.end);
    wait_copies<kSlots - 2>();
    __syncthreads();
    if (range.begin < range.end) decode(range.begin);
    for (int tile = range.begin; tile < range.end; ++tile) {
      wait_copies<kSlots - 3>();
      __syncthreads();
      fetch(tile + kSlots - 1, range.end);
      if (tile + 1 < range.end) decode(tile + 1);
      multiply(tile);
    }
    wait_copies<0>();
  }

  VQ_INLINE void store(__half *y, const Splits &splits) const {
    const int outputs = tiles.m.outputs;
    const long long size = static_cast<long long>(x.rows) * outputs;
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < 2 * kAcross; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int output = tiles.output + warp_output() + 16 * i + lane_id() / 4 + e / 2 * 8;
          const int row = first_row + warp_row() + 8 * j + lane_id() % 4 * 2 + e % 2;
          if (output >= outputs || row >= x.rows) continue;
          const long long at = static_cast<long long>(row) * outputs + output;
          store_slice(splits, y, size, at, acc[i][j][e]);
        }
      }
    }
    if (gridDim.y == 1) return;
    const int first_output = tiles.output, begin = first_row, rows = x.rows;
    add_splits(splits, y, size, kTileOutputs * BATCH, [=](int i) -> long long {
      const int output = first_output + i % kTileOutputs, row = begin + i / kTileOutputs;
      if (output >= outputs || row >= rows) return -1;
      return static_cast<long long>(row) * outputs + output;
    });
  }
};

// First output of this block; blocks of outputs come one after the other, then those of rows.
VQ_INLINE int block_output(int outputs) {
  return static_cast<int>(blockIdx.x) % count_tiles(outputs, kTileOutputs) * kTileOutputs;
}

// Grid: blocks of outputs x blocks of BATCH rows, slices of the inputs. `shared` is what the
// tables of `tiles` leave, aligned to 16 bytes: Gemm<BATCH, Tiles>::kSharedBytes of it.
template <int BATCH, typename Tiles>
VQ_INLINE void gemm(Tiles tiles, const Activations &x, __half *y, const Splits &splits,
                    unsigned char *shared) {
  const int row_block = static_cast<int>(blockIdx.x) / count_tiles(tiles.m.outputs, kTileOutputs);
  Gemm<BATCH, Tiles> work{tiles, x, shared, row_block * BATCH, {}};
  work.run(slice_of(count_tiles(tiles.m.inputs, kTileInputs), blockIdx.y, gridDim.y));
  work.store(y, splits);
}

}  // namespace vq
