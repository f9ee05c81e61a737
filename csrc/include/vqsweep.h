/* C ABI of the weight encoders: error feedback along the input columns of a linear layer (GPTQ),
 * with a uniform grid or a trellis code as the quantizer of one column.
 *
 * The rules of vqkernels.h hold. A weight matrix lies transposed here, [column][row]: a column is
 * one input, a row one output. Every tier gives the same bits.
 */
#ifndef VQSWEEP_H
#define VQSWEEP_H

#include "vqkernels.h"

#ifdef __cplusplus
extern "C" {
#endif

enum {
  VQ_TRELLIS_MIN_STATE_BITS = 10,
  VQ_TRELLIS_MAX_STATE_BITS = 16,
  VQ_TRELLIS_MAX_BITS = 5,
  VQ_TRELLIS_TABLE = 256
};

/* A bitshift trellis code. A column is one stream of bits, least significant first; symbol r is the
 * bits [r * bits, (r + 1) * bits), the state after row r the state_bits bits that end there (zeros
 * before the stream). State s means the level table[(s * multiplier mod 2^state_bits) >>
 * (state_bits - 8)]. */
typedef struct vq_trellis {
  int32_t bits;       /* 1..VQ_TRELLIS_MAX_BITS per weight */
  int32_t state_bits; /* VQ_TRELLIS_MIN_STATE_BITS..VQ_TRELLIS_MAX_STATE_BITS */
  int32_t multiplier; /* odd, below 2^state_bits */
  int32_t reserved;   /* must be 0 */
  const int8_t *table; /* [VQ_TRELLIS_TABLE] */
} vq_trellis;

/* Columns to quantize one after the other. With a factor U, column j's error divided by U[j][j] is
 * taken U[j][i] times from every later column i before that is quantized. */
typedef struct vq_sweep {
  int32_t num_columns;
  int32_t num_rows;
  int64_t factor_stride;      /* floats from one row of factor to the next */
  float *columns;             /* [num_columns][num_rows]; left as they were when quantized */
  const float *factor;        /* [num_columns][factor_stride] or NULL: no feedback */
  float *errors;              /* [num_columns][num_rows] out: divided by U[j][j] if there is U */
  const float *scales;        /* [groups][num_rows], positive */
  const int32_t *groups;      /* [num_columns] row of scales, and of zeros */
  const float *column_scales; /* [num_columns] more factors, or NULL: all one */
} vq_sweep;

/* Weight = level * scale * column scale. codes is [num_columns][ceil(num_rows * bits / 8)]. The path
 * of least squared error over the whole column; see trellis_tier.hpp for the order of ties.
 * VQ_ERR_NONFINITE: columns hold NaN or infinity. */
VQ_API int32_t vq_sweep_trellis(const vq_sweep *sweep, const vq_trellis *trellis, uint8_t *codes);

/* Weight = (code - zero) * scale * column scale with codes 0..max_code (at most 255), rounded to
 * nearest, half to even. zeros is [groups][num_rows], codes [num_columns][num_rows]. */
VQ_API int32_t vq_sweep_grid(const vq_sweep *sweep, const uint8_t *zeros, int32_t max_code,
                             uint8_t *codes);

/* Best paths of num_streams pieces of streams, one after the other: states [num_streams][length] out,
 * each from its own start state (state before the piece). targets and scales are
 * [num_streams][length]; what counts is (target - scale * level)^2. Nothing is pushed on.
 * VQ_ERR_NONFINITE: targets hold NaN or infinity. */
VQ_API int32_t vq_trellis_search(const vq_trellis *trellis, const float *targets,
                                 const float *scales, const uint16_t *starts, int32_t num_streams,
                                 int32_t length, uint16_t *states);

/* The levels of codes: [num_columns][num_rows]. */
VQ_API int32_t vq_trellis_decode(const vq_trellis *trellis, const uint8_t *codes,
                                 int32_t num_columns, int32_t num_rows, int8_t *levels);

#ifdef __cplusplus
}
#endif

#endif
