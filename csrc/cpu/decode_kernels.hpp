// What the ISA tiers of the decode step share: declarations only, see matrix_kernels.hpp for why.
//
// Cached keys and values lie in blocks of 16 positions of one head, so that one vector holds one
// number of 16 positions (keys) or 16 numbers of one position (values):
//   keys    [dims / 2] pairs: dimension 2i of 16 positions, then dimension 2i + 1
//   values  [16 positions][dims / 32] pairs: 16 dimensions, then the next 16
// A pair is 64 bytes of halves, 32 of int8, or 16 of nibbles (first vector in the low ones). Int8
// and int4 blocks end with scale[16] and minimum[16], floats: number = code * scale + minimum.
#pragma once

#include <cstdint>

#include "matrix.hpp"
#include "vqdecoder.h"

namespace vq {

constexpr std::int32_t kKvBlock = 16;         // positions per block
constexpr std::int32_t kMaxQueries = 4;       // rows of one attention job
constexpr std::int32_t kFloatsPerVector = 16;
constexpr std::int32_t kMaxRotationOrder = 1024;

enum class KvFormat : std::int32_t { kHalf = 16, kInt8 = 8, kInt4 = 4 };

// Geometry of the cache; all offsets in bytes.
struct KvLayout {
  KvFormat format;
  std::int32_t head_dim;
  std::int32_t key_pairs;          // pairs of dimensions, head_dim rounded up to 2
  std::int32_t value_pairs;        // pairs of vectors, head_dim rounded up to 32
  std::int32_t pair_bytes;
  std::int32_t blocks_per_page;
  std::int64_t key_parameters;     // offset of scale[16], minimum[16] in a key block
  std::int64_t value_parameters;
  std::int64_t key_bytes;          // a key block with its parameters, a multiple of 64
  std::int64_t value_bytes;
  std::int64_t page_stride;        // from one page of a head to the next
};

// Queries of one key-value head of one sequence. Query i sees positions [first[i], length[i]).
struct AttendJob {
  const KvLayout *layout;
  const std::uint8_t *cache;       // page 0 of this layer and head: key blocks, then value blocks
  const std::int32_t *pages;
  std::int32_t num_queries;
  const float *queries[kMaxQueries];  // [head_dim], scaled by 1 / sqrt(head_dim)
  float *outputs[kMaxQueries];        // [head_dim]
  std::int32_t first[kMaxQueries];
  std::int32_t length[kMaxQueries];
  float *scratch;                  // [kMaxQueries][scratch_stride]
  std::int64_t scratch_stride;     // at least the longest length, rounded up to kKvBlock
  const AttendJob *next;           // what this thread does next, or nullptr: only to fetch its keys
};

// Every row's result depends on that row alone, and all tiers give the same bits: no FMA, and sums
// in a fixed order. Vectors are padded to 16 floats with zeros.
struct DecodeOps {
  // y = x / sqrt(mean(x^2) + eps) * weight; `count` values, buffers padded.
  void (*rms_norm)(const float *x, const float *weight, std::int32_t count, float eps, float *y);
  // y = gate / (1 + exp(-gate)) * up; y may be gate.
  void (*silu_multiply)(const float *gate, const float *up, std::int32_t count, float *y);
  // x += y
  void (*add)(float *x, const float *y, std::int32_t count);
  void (*attend)(const AttendJob &job);
  // Copies one key or value vector (head_dim values) into slot `position` (0..15) of a block.
  void (*store_key)(const KvLayout &layout, const float *key, std::int32_t position,
                    std::uint8_t *block);
  void (*store_value)(const KvLayout &layout, const float *value, std::int32_t position,
                      std::uint8_t *block);
  // y = x R, or x R' if `inverse`; y may not be x. scratch: [size].
  void (*rotate)(const vq_rotation &rotation, bool inverse, const float *x, float *y,
                 float *scratch);
  // What quantize_rows of matrix.hpp writes for one row without an input transform, bit for bit;
  // false for NaN or infinity. nullptr: the tier has nothing faster than that function.
  bool (*quantize)(const float *x, std::int32_t count, const ActivationBuffers &row);
  // Reads `bytes` (a multiple of 64) and returns something that depends on all of them.
  float (*read_all)(const std::uint8_t *data, std::int64_t bytes);
};

extern const DecodeOps decode_ops_baseline;
extern const DecodeOps decode_ops_avx2;
extern const DecodeOps decode_ops_avx512_vnni;

}  // namespace vq
