// The one interface to every packed weight: quantize activations once, then multiply any slice of
// row panels of any format with them, from any thread, without allocating.
// Knows nothing of layers or models; formats and layouts are described in matrix_kernels.hpp.
#pragma once

#include <cstdint>

#include "vqkernels.h"

namespace vq {

// Columns that share one activation scale.
constexpr std::int32_t kActivationGroup = 128;
// Columns between two entries of Activations::prefix.
constexpr std::int32_t kPrefixStep = 32;

// Lengths of one row's arrays, for MatrixShape::columns.
static constexpr std::int32_t activation_groups(std::int32_t columns) {
  return (columns + kActivationGroup - 1) / kActivationGroup;
}
static constexpr std::int32_t padded_columns(std::int32_t columns) {
  return activation_groups(columns) * kActivationGroup;
}
static constexpr std::int32_t prefix_length(std::int32_t columns) {
  return padded_columns(columns) / kPrefixStep + 1;
}

// Rows of x as int8: x[b][k] ~ scales[b][k / 128] * q[b][k]. Rows of every array follow each other
// without gaps; q is zero beyond the columns and best aligned to 64 bytes.
struct Activations {
  const std::int8_t *q;        // [batch][padded_columns]
  const float *scales;         // [batch][activation_groups]
  const std::int32_t *prefix;  // [batch][prefix_length], prefix[i] = sum of q[0 .. 32 i)
  const float *offsets;        // [batch], added to every output of the row; nullptr means 0
  std::int32_t batch;
  std::int32_t columns;
};

// The same arrays, writable.
struct ActivationBuffers {
  std::int8_t *q;
  float *scales;
  std::int32_t *prefix;
  float *offsets;  // may be nullptr if the matrix has no column bias
};

// Facts of a matrix that a caller needs for buffers and splits.
struct MatrixShape {
  std::int32_t in_features;
  std::int32_t columns;          // of Activations: in_features, more where parts lie side by side
  std::int32_t out_features;     // rows of all stacked parts
  std::int32_t num_panels;       // what work is split by: runs of rows
  std::int32_t has_transform;    // arranges or scales its input: shares no Activations
  std::int32_t has_parts;        // its columns lie in parts side by side
  std::int32_t has_column_bias;  // needs ActivationBuffers::offsets
  std::int32_t is_layered;       // and adds nothing to its outputs: the functions below apply
};
MatrixShape shape_of(const vq_matrix &matrix);

// Writes rows [row, row + count) of the buffers from x [count][x_stride] (float32, natural order).
// The matrix's permutation and column scales are applied here, so Activations made for one matrix
// serve another one only if neither has a transform. Returns VQ_ERR_NONFINITE for NaN or infinity.
std::int32_t quantize_rows(const vq_matrix &matrix, const float *x, std::int64_t x_stride,
                           std::int32_t row, std::int32_t count, const ActivationBuffers &buffers);

// One row of x (in natural order) as the weights see it: permuted, and times the column scales.
// Returns x itself where there is nothing to do, else `arranged` [in_features]. *offset is what the
// column bias adds to every output.
const float *arrange_row(const vq_matrix &matrix, const float *x, float *arranged, float *offset);

// y[b * y_stride + n] = sum_k x[b][k] * W[n][k] + offsets[b] + row_bias[n] for the rows n of the
// panels [panel_begin, panel_end). y addresses row 0 of the matrix; other rows are left alone. Every tier,
// batch and split gives the same bits.
void multiply_panels(const vq_matrix &matrix, const Activations &x, float *y, std::int64_t y_stride,
                     std::int32_t panel_begin, std::int32_t panel_end);

// ---- layered matrices: the largest output of one row of activations, estimates of the others ----

// What the lower layer adds to an output, over the scale of its weights: `expected` on average, and
// hardly ever more than `doubt` beside it. Its codes are taken for independent and uniform, and
// believed to 5 standard deviations.
struct LayeredInput {
  float expected;
  float doubt;
};

// multiply_panels without the lower layer.
void multiply_upper(const vq_matrix &matrix, const Activations &x, float *y,
                    std::int32_t panel_begin, std::int32_t panel_end);

// Then the output of the panels that seems to be the largest, from both layers. Only the first `count`
// outputs of the matrix are looked at; minus infinity if none of them is in the panels.
float try_largest(const vq_matrix &matrix, const Activations &x, float *y,
                  std::int32_t panel_begin, std::int32_t panel_end, std::int32_t count);

// And then outputs that may reach `threshold` as multiply_panels has them, bit for bit; to others
// what is expected of the lower layer is added. At most kMaxCompleted panels.
constexpr std::int32_t kMaxCompleted = 32;
void complete_panels(const vq_matrix &matrix, const Activations &x, float *y,
                     std::int32_t panel_begin, std::int32_t panel_end, float threshold);

// The same with float32 activations and weights as the checkpoint means them (no int8 anywhere).
// x is [batch][x_stride] in natural order. Slow; may allocate scratch once per thread.
std::int32_t multiply_panels_exact(const vq_matrix &matrix, const float *x, std::int64_t x_stride,
                                   std::int32_t batch, float *y, std::int64_t y_stride,
                                   std::int32_t panel_begin, std::int32_t panel_end);

// First panel of part `index` when the matrix is cut into `count` parts of equal work;
// split_begin(m, count, count) is num_panels.
std::int32_t split_begin(const vq_matrix &matrix, std::int32_t index, std::int32_t count);

// Row n of the weight as float32 [in_features]: the embedding look-up of a tied output head.
void read_row(const vq_matrix &matrix, std::int32_t n, float *row);

}  // namespace vq
