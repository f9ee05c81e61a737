// Packed layouts of vq_matrix, and what its instruction-set tiers share.
// Declarations and constants only: an inline function here would be compiled once per tier, and the
// linker could keep the AVX-512 copy for everybody.
//
// Every format decodes to blocks: 64 bytes, byte 8 * r + c = code of row r of a row set (8 rows) in
// column c of 8 consecutive columns. A code w of a block stands for (w - zero) * scale. Two row sets
// are a pair, whose 16 rows are the lanes of one result vector; a panel has one or more pairs. The
// columns are padded to whole chunks; activations there are 0.
//
//   GRID  16 rows per panel, row sets = rows 0-7 and 8-15. Per 8 columns: 8 bits: two blocks; 4 bits:
//         64 bytes, low nibbles = set 0, high = set 1. 2 bits: per 16 columns 64 bytes, bit pairs =
//         (columns 0-7: set 0, set 1), (columns 8-15: set 0, set 1). 3 bits: per 32 columns 64 bytes
//         of high bits (bit 2 * block + set), then the low two bits as for 2 bits.
//   LAYERED  16 rows per panel, as GRID of 4 bits, twice: the upper four bits of all codes, behind
//         them the lower ones.
//   TCQ   16 rows per panel, likewise. Per 8 columns 16 * bits bytes of the columns' bit streams:
//         up to 3 bits one frame of 16 rows (2 * bits bytes per column), else two frames of 8 rows
//         (bits bytes per column). A state reaches back into the frame before, at most two bytes;
//         the first panel follows a panel of zeros.
//   VQ    8 index rows per panel, one index = vector_length rows. Per 8 columns 64 indices [8][8],
//         uint8 for up to 256 codes (row set = one component of 8 index rows; an odd number of them
//         gets one of zeros), else uint16 (components padded to 4, 8 or 16; row set = those of an
//         index row, of two index rows if they are 4, or half of them if they are 16).
//
// y = sum over stages of (sum over segments, in order, of float(dot - zero * sum) * (scale * x_scale))
// with exact int32 dots, and multiply and add as separate roundings.
#pragma once

#include <cstdint>

#include "matrix.hpp"

namespace vq {

constexpr int kBlock = 8;  // rows and columns of a block
constexpr int kBlockBytes = 64;
constexpr int kPairRows = 16;      // rows of a pair of row sets
constexpr int kChunkColumns = 32;  // columns are padded to a multiple
constexpr int kMaxPairs = 8;
constexpr int kMaxStages = 2;
constexpr int kMaxVector = 16;
constexpr int kReadAhead = 64;  // bytes behind the last code that a kernel may read

enum class Decode : std::int32_t {
  kGrid2,
  kGrid3,
  kGrid4,
  kGrid8,
  kTcq,
  kVqSmall,  // uint8 indices
  kVqLarge,  // uint16 indices
  kLayers,   // 8 bits in two layers
  kCount
};

// Byte-permute controls of the trellis, see matrix_avx512_vbmi.cpp. The windows of a frame's rows
// lie in 8 bytes per column: two of the frame before, then the frame's own.
struct TcqPlan {
  std::int32_t bits;
  std::int32_t trellis_bits;
  std::int32_t multiplier;
  std::int32_t frames;
  std::int32_t index_bits;                 // 6, 7 or 8: of the hash, as many as tell levels apart
  alignas(64) std::uint8_t gather[64];     // those bytes of 8 columns, out of (frame before, frame)
  alignas(64) std::uint8_t shifts[4][64];  // bit offsets of the 16-bit windows of 4 rows
  alignas(64) std::uint8_t table[256];     // [2^index_bits] code = value + 128
};

// One pass over the columns: all of a grid or trellis, one codebook of VQ.
struct MatrixStage {
  Decode decode;
  std::int32_t zero;           // code of weight 0, where the part has no zeros
  std::int32_t pairs;          // per panel
  std::int32_t vector_length;  // VQ: components of an index, else 0
  std::int32_t num_codes;
  std::int32_t entry_bytes;  // VQ: 4, 8 or 16, at least vector_length
  std::int64_t panel_bytes;
  const std::uint8_t *codes;
  const std::uint8_t *lower;      // LAYERED: lower four bits of the codes
  const std::uint8_t *table;      // VqSmall [2 * pairs][256]
  const std::uint8_t *entries;    // VQ [num_codes][entry_bytes]
  const float *lane_scales;       // VQ: [pairs][16]
  const std::uint16_t *codebook;  // VQ: binary16 [num_codes][vector_length], for exact products
  const TcqPlan *tcq;
  std::int16_t lane_rows[kMaxPairs * kPairRows];  // row in the panel, -1 for padding
};

struct MatrixPart {
  std::int32_t in_features;   // of this part
  std::int32_t input_begin;   // the first of them in the matrix
  std::int32_t columns;       // in_features, padded
  std::int32_t column_begin;  // the first of them in the activations
  std::int32_t rows;
  std::int32_t row_begin;  // in the whole matrix
  bool begins_rows;        // no part stands before it in these rows: writes y, else adds to it
  bool ends_rows;
  std::int32_t panels_at_once;  // that are one panel of the matrix
  std::int32_t num_panels;
  std::int32_t panel_rows;
  std::int32_t segment;  // columns with one weight and one activation scale: 32, 64 or 128
  std::int32_t segments_per_group;
  std::int32_t num_groups;
  std::int32_t num_stages;
  const std::uint16_t *scales;  // binary16 [panel][group][16], not for VQ
  const std::uint8_t *zeros;    // [panel][group][16] or nullptr
  const std::uint16_t *upper_scales;  // LAYERED: 16 * scales
  const float *row_scales;            // LAYERED: scales, [panel][16]
  MatrixStage stages[kMaxStages];
};

struct MatrixJob {
  const MatrixPart *part;
  Activations x;
  float *y;
  std::int64_t y_stride;
};

// Computes the panels [begin, end) of the part, numbered from its first.
using MatrixPanelsFn = void (*)(const MatrixJob &job, std::int32_t begin, std::int32_t end);

// Writes the blocks of columns [column, column + count) as tile [pair][count / 8][2][64].
using DecodeTileFn = void (*)(const MatrixStage &stage, std::int32_t panel, std::int32_t column,
                              std::int32_t count, std::uint8_t *tile);

// Outputs of a LAYERED part for one row of activations, from the upper layer alone.
struct LayeredRows {
  float *y;
  const float *scales;
  std::int32_t count;
  LayeredInput input;
};

struct LayeredOps {
  // The row whose expected output is the largest; count > 0.
  std::int32_t (*largest)(const LayeredRows &rows);
  // Adds what is expected of the lower layer. Writes the panels of 16 rows in which an output may
  // reach the threshold to panels [ceil(count / 16) + 1] and returns how many they are.
  std::int32_t (*estimate)(const LayeredRows &rows, float threshold, std::int32_t *panels);
};

struct MatrixOps {
  MatrixPanelsFn panels;
  DecodeTileFn decode;
  LayeredOps layered;
};

extern const MatrixOps matrix_ops_baseline;
extern const MatrixOps matrix_ops_avx2;
extern const MatrixOps matrix_ops_avx512_vnni;
extern const MatrixOps matrix_ops_avx512_vbmi;

void decode_tile_baseline(const MatrixStage &stage, std::int32_t panel, std::int32_t column,
                          std::int32_t count, std::uint8_t *tile);

}  // namespace vq
