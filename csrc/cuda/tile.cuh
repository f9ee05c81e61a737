// Tiles of decoded weights in shared memory: what the matrix product and dequantization have in
// common. Every format has a `...Tiles` type that decodes the tiles of one block of outputs:
//
//   kByInput       whether a row of the decoded tile is one input (else it is one output)
//   kPackedBytes   of shared memory that one packed tile takes, a multiple of 16
//   m              the matrix, with .inputs and .outputs
//   output         first output of the block, a multiple of kTileOutputs
//   fetch(input, packed)         all threads start copying the tile at `input`; zeros outside
//   decode(input, packed, tile)  all threads write the decoded tile; ascending inputs
//
// Beyond the last output and the last input a tile holds finite garbage.
#pragma once

#include "common.cuh"
#include "tensor_core.cuh"

namespace vq {

constexpr int kTileOutputs = 128;
constexpr int kTileInputs = 64;
constexpr int kPadding = 8;  // halves between rows: eight rows of a matrix lie in different banks

template <bool BY_INPUT>
struct TileShape {
  static constexpr int kRows = BY_INPUT ? kTileInputs : kTileOutputs;
  static constexpr int kColumns = BY_INPUT ? kTileOutputs : kTileInputs;
  static constexpr int kPitch = kColumns + kPadding;
  static constexpr int kBytes = 2 * kRows * kPitch;
};

VQ_INLINE int count_tiles(int size, int tile) {
  return (size + tile - 1) / tile;
}

// Part `index` of `parts` nearly equal ones of `count`.
struct Range {
  int begin, end;
};
VQ_INLINE Range slice_of(int count, unsigned index, unsigned parts) {
  const long long all = count;
  return Range{static_cast<int>(all * index / parts), static_cast<int>(all * (index + 1) / parts)};
}

// Stores 2 * WORDS halves; `at` is aligned to them, up to 16 bytes.
template <int WORDS>
VQ_INLINE void store_words(__half *at, const unsigned (&words)[WORDS]) {
  if constexpr (WORDS == 2) {
    *reinterpret_cast<uint2 *>(at) = uint2{words[0], words[1]};
  } else {
#pragma unroll
    for (int w = 0; w < WORDS; w += 4) {
      *reinterpret_cast<uint4 *>(at + 2 * w) =
          uint4{words[w], words[w + 1], words[w + 2], words[w + 3]};
    }
  }
}

}  // namespace vq
