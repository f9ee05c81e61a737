// vq_matrix: ownership, quantization of activations, the split over panels and threads, exact
// products. The loops are in the tiers.
#include "matrix.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "dispatch.hpp"
#include "matrix_half.hpp"
#include "matrix_pack.hpp"
#include "pool.hpp"
#include "rounding.hpp"

namespace vq {
namespace {

// Parts that lie side by side in the same rows, which are cut into panels of equal work.
struct Band {
  std::size_t first_part = 0;
  std::size_t end_part = 0;
  std::int32_t row_begin = 0;
  std::int32_t row_end = 0;
  std::int32_t panel_begin = 0;
  std::int32_t panel_end = 0;
  std::int32_t panel_rows = 0;
  double panel_cost = 0.0;
};

// Inputs that share an activation scale.
struct InputGroup {
  std::int32_t begin;
  std::int32_t count;
};

}  // namespace
}  // namespace vq

struct vq_matrix {
  std::int32_t in_features = 0;
  std::int32_t columns = 0;
  std::int32_t out_features = 0;
  std::int32_t num_panels = 0;
  std::vector<vq::PackedPart> parts;
  std::unique_ptr<vq::MatrixPart> upper;  // of a layered part
  std::vector<vq::Band> bands;
  std::vector<vq::InputGroup> groups;
  std::vector<std::int32_t> permutation;
  std::vector<float> column_scales;
  std::vector<float> column_bias;
  std::vector<float> row_bias;
  std::unique_ptr<std::uint8_t, decltype(&std::free)> owned{nullptr, &std::free};
};

namespace vq {
namespace {

constexpr float kSmallestMax = 1e-30f;  // below this, 127 / amax would overflow
constexpr std::uint32_t kInfinityBits = 0x7f800000u;
constexpr std::int32_t kPartialSums = 8;
constexpr std::int64_t kAlignment = 64;
constexpr std::int32_t kUpperZero = 8;
constexpr float kMeanLower = 7.5f;              // of 0..15
constexpr float kLowerDoubt = 5.0f * 4.609772f;  // standard deviations, sqrt((16^2 - 1) / 12)

// ---- activations ----

std::uint32_t max_abs_bits(const float *x) {
  std::int32_t max_bits = 0;
  for (std::int32_t k = 0; k < kActivationGroup; ++k) {
    std::int32_t bits;
    std::memcpy(&bits, x + k, sizeof bits);
    bits &= 0x7fffffff;
    max_bits = bits > max_bits ? bits : max_bits;
  }
  return static_cast<std::uint32_t>(max_bits);
}

std::int32_t quantize_step(const float *x, float inverse, std::int8_t *q) {
  std::int32_t sum = 0;
  for (std::int32_t k = 0; k < kPrefixStep; ++k) {
    const float shifted = x[k] * inverse + kRoundMagic;
    std::int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    const std::int32_t value = bits - kRoundMagicBits;
    q[k] = static_cast<std::int8_t>(value);
    sum += value;
  }
  return sum;
}

// 128 values; prefix[0] is given, prefix[1..4] are written.
bool quantize_group(const float *x, std::int8_t *q, float *scale, std::int32_t *prefix) {
  const std::uint32_t bits = max_abs_bits(x);
  if (bits >= kInfinityBits) {
    return false;
  }
  float amax;
  std::memcpy(&amax, &bits, sizeof amax);
  const bool is_zero = amax < kSmallestMax;
  *scale = is_zero ? 0.0f : amax / 127.0f;
  const float inverse = is_zero ? 0.0f : 127.0f / amax;
  for (std::int32_t i = 0; i < kActivationGroup / kPrefixStep; ++i) {
    prefix[i + 1] = prefix[i] + quantize_step(x + i * kPrefixStep, inverse, q + i * kPrefixStep);
  }
  return true;
}

// Columns [column, column + count) of x as the weights see them.
void gather_columns(const vq_matrix &matrix, const float *x, std::int32_t column,
                    std::int32_t count, float *values) {
  const float *scales = matrix.column_scales.empty() ? nullptr : matrix.column_scales.data();
  if (matrix.permutation.empty() && scales == nullptr) {
    std::copy_n(x + column, count, values);
    return;
  }
  if (matrix.permutation.empty()) {
    for (std::int32_t k = 0; k < count; ++k) values[k] = x[column + k] * scales[column + k];
    return;
  }
  for (std::int32_t k = 0; k < count; ++k) {
    const std::int32_t from = matrix.permutation[static_cast<std::size_t>(column + k)];
    values[k] = scales == nullptr ? x[from] : x[from] * scales[from];
  }
}

bool quantize_row(const vq_matrix &matrix, const float *x, std::int8_t *q, float *scales,
                  std::int32_t *prefix) {
  prefix[0] = 0;
  for (const InputGroup &group : matrix.groups) {
    alignas(64) float values[kActivationGroup];
    gather_columns(matrix, x, group.begin, group.count, values);
    std::fill(values + group.count, values + kActivationGroup, 0.0f);
    if (!quantize_group(values, q, scales, prefix)) {
      return false;
    }
    q += kActivationGroup;
    scales += 1;
    prefix += kActivationGroup / kPrefixStep;
  }
  return true;
}

// In a fixed order of eight partial sums.
float dot_floats(const float *a, const float *b, std::int32_t count) {
  float partial[kPartialSums] = {};
  std::int32_t k = 0;
  for (; k + kPartialSums <= count; k += kPartialSums) {
    for (std::int32_t i = 0; i < kPartialSums; ++i) {
      partial[i] += a[k + i] * b[k + i];
    }
  }
  for (; k < count; ++k) {
    partial[k % kPartialSums] += a[k] * b[k];
  }
  float sum = 0.0f;
  for (const float value : partial) {
    sum += value;
  }
  return sum;
}

float offset_of(const vq_matrix &matrix, const float *x) {
  return matrix.column_bias.empty() ? 0.0f
                                    : dot_floats(x, matrix.column_bias.data(), matrix.in_features);
}

// ---- exact weights ----

// Grid and trellis: columns [column, column + count) of a panel, [16][count].
void exact_codes(const MatrixPart &part, std::int32_t panel, std::int32_t column,
                 std::int32_t count, float *weights) {
  std::uint8_t tile[kActivationGroup * kPairRows];
  const MatrixStage &stage = part.stages[0];
  decode_tile_baseline(stage, panel, column, count, tile);
  for (std::int32_t c = 0; c < count; ++c) {
    const std::int32_t group = (column + c) / (part.segment * part.segments_per_group);
    const std::int64_t at = (std::int64_t{panel} * part.num_groups + group) * kPairRows;
    for (std::int32_t lane = 0; lane < kPairRows; ++lane) {
      const std::int32_t zero = part.zeros != nullptr ? part.zeros[at + lane] : stage.zero;
      const std::uint8_t code = tile[(c / kBlock * 2 + lane / kBlock) * kBlockBytes +
                                     lane % kBlock * kBlock + c % kBlock];
      weights[lane * count + c] =
          static_cast<float>(code - zero) * half_to_float(part.scales[at + lane]);
    }
  }
}

std::int32_t index_at(const MatrixStage &stage, std::int32_t panel, std::int32_t index_row,
                      std::int32_t column) {
  const std::uint8_t *codes = stage.codes + panel * stage.panel_bytes;
  const std::int32_t at = column / kBlock * kBlockBytes + index_row * kBlock + column % kBlock;
  if (stage.decode == Decode::kVqSmall) {
    return codes[at];
  }
  std::uint16_t wide;
  std::memcpy(&wide, codes + 2 * at, sizeof wide);
  return wide;
}

// VQ: the same, [panel_rows][count].
void exact_vectors(const MatrixPart &part, std::int32_t panel, std::int32_t column,
                   std::int32_t count, float *weights) {
  std::fill_n(weights, part.panel_rows * count, 0.0f);
  for (std::int32_t s = 0; s < part.num_stages; ++s) {
    const MatrixStage &stage = part.stages[s];
    const std::int32_t v = stage.vector_length;
    for (std::int32_t row = 0; row < part.panel_rows / v; ++row) {
      for (std::int32_t c = 0; c < count; ++c) {
        const std::uint16_t *entry =
            stage.codebook + std::int64_t{index_at(stage, panel, row, column + c)} * v;
        for (std::int32_t i = 0; i < v; ++i) {
          weights[(row * v + i) * count + c] += half_to_float(entry[i]);
        }
      }
    }
  }
}

void exact_weights(const MatrixPart &part, std::int32_t panel, std::int32_t column,
                   std::int32_t count, float *weights) {
  if (part.stages[0].vector_length > 0) {
    exact_vectors(part, panel, column, count, weights);
  } else {
    exact_codes(part, panel, column, count, weights);
  }
}

// Scratch of exact products, kept per thread.
struct ExactScratch {
  std::vector<float> x;
  std::vector<float> weights;
};

ExactScratch &exact_scratch() {
  static thread_local ExactScratch scratch;
  return scratch;
}

struct ExactJob {
  const MatrixPart *part;
  const float *x;  // transformed, [batch][x_stride]
  std::int64_t x_stride;
  const float *offsets;
  std::int32_t batch;
  float *y;
  std::int64_t y_stride;
};

// All columns of one panel.
void exact_panel(const ExactJob &job, std::int32_t panel, float *weights) {
  const MatrixPart &part = *job.part;
  const std::int32_t base = panel * part.panel_rows;
  const std::int32_t rows = std::min(part.panel_rows, part.rows - base);
  for (std::int32_t column = 0; column < part.in_features; column += kActivationGroup) {
    const std::int32_t padded = std::min(kActivationGroup, part.columns - column);
    const std::int32_t count = std::min(kActivationGroup, part.in_features - column);
    exact_weights(part, panel, column, padded, weights);
    for (std::int32_t b = 0; b < job.batch; ++b) {
      const float *x = job.x + b * job.x_stride + part.input_begin + column;
      float *y = job.y + b * job.y_stride + part.row_begin + base;
      for (std::int32_t row = 0; row < rows; ++row) {
        const float dot = dot_floats(x, weights + row * padded, count);
        y[row] = (column == 0 && part.begins_rows ? job.offsets[b] : y[row]) + dot;
      }
    }
  }
}

// Row n of the part, at the places of its columns.
void read_part(const vq_matrix &matrix, const MatrixPart &part, std::int32_t n, float *row) {
  const std::int32_t panel = n / part.panel_rows;
  const std::int32_t lane = n % part.panel_rows;
  float weights[kMaxPairs * kPairRows * kChunkColumns];
  for (std::int32_t column = 0; column < part.columns; column += kChunkColumns) {
    exact_weights(part, panel, column, kChunkColumns, weights);
    const std::int32_t count = std::min(kChunkColumns, part.in_features - column);
    for (std::int32_t c = 0; c < count; ++c) {
      const auto input = static_cast<std::size_t>(part.input_begin + column + c);
      const std::size_t at =
          matrix.permutation.empty() ? input : static_cast<std::size_t>(matrix.permutation[input]);
      const float scale = matrix.column_scales.empty() ? 1.0f : matrix.column_scales[at];
      const float bias = matrix.column_bias.empty() ? 0.0f : matrix.column_bias[at];
      row[at] = weights[lane * kChunkColumns + c] * scale + bias;
    }
  }
}

// ---- splits ----

// The columns that the part reads; offsets are for the last part of a row.
Activations activations_of(const MatrixPart &part, const Activations &x) {
  Activations own = x;
  own.q += part.column_begin;
  own.scales += part.column_begin / kActivationGroup;
  own.prefix += part.column_begin / kPrefixStep;
  own.offsets = part.ends_rows ? x.offsets : nullptr;
  return own;
}

// Calls visit(part, begin, end) with panels numbered from the part's first, in the order of parts.
template <class Visit>
void for_parts(const vq_matrix &matrix, std::int32_t begin, std::int32_t end, const Visit &visit) {
  for (const Band &band : matrix.bands) {
    const std::int32_t from = std::max(begin, band.panel_begin) - band.panel_begin;
    const std::int32_t to = std::min(end, band.panel_end) - band.panel_begin;
    for (std::size_t i = band.first_part; from < to && i < band.end_part; ++i) {
      const MatrixPart &part = matrix.parts[i].part;
      visit(part, from * part.panels_at_once, std::min(to * part.panels_at_once, part.num_panels));
    }
  }
}

// Adds row_bias to the rows of the panels [begin, end).
void add_row_bias(const vq_matrix &matrix, std::int32_t begin, std::int32_t end, std::int32_t batch,
                  float *y, std::int64_t y_stride) {
  if (matrix.row_bias.empty()) {
    return;
  }
  for (const Band &band : matrix.bands) {
    const std::int32_t from = std::max(begin, band.panel_begin) - band.panel_begin;
    const std::int32_t to = std::min(end, band.panel_end) - band.panel_begin;
    const std::int32_t first = band.row_begin + from * band.panel_rows;
    const std::int32_t last = std::min(band.row_end, band.row_begin + to * band.panel_rows);
    for (std::int64_t b = 0; b < batch; ++b) {
      for (std::int32_t row = first; row < last; ++row) {
        y[b * y_stride + row] += matrix.row_bias[static_cast<std::size_t>(row)];
      }
    }
  }
}

// Time of a panel relative to others, from measurements on Zen 5.
double panel_cost(const MatrixPart &part) {
  double cost = 0.0;
  for (std::int32_t s = 0; s < part.num_stages; ++s) {
    switch (part.stages[s].decode) {
      case Decode::kGrid8:
      case Decode::kLayers:
        cost += 2.0;
        break;
      case Decode::kTcq:
        cost += 2.5;
        break;
      case Decode::kVqLarge:
        cost += 4.0;
        break;
      default:
        cost += 1.0;
    }
  }
  return cost * part.panel_rows;
}

// ---- layers ----

std::int32_t sum_of_squares(const std::int8_t *q) {
  std::int32_t sum = 0;
  for (std::int32_t k = 0; k < kActivationGroup; ++k) {
    sum += std::int32_t{q[k]} * q[k];
  }
  return sum;
}

LayeredInput layered_input(const Activations &x) {
  const std::int32_t groups = activation_groups(x.columns);
  float sum = 0.0f;
  float squares = 0.0f;
  for (std::int32_t group = 0; group < groups; ++group) {
    constexpr std::int32_t kSteps = kActivationGroup / kPrefixStep;
    const std::int32_t codes = x.prefix[(group + 1) * kSteps] - x.prefix[group * kSteps];
    const std::int32_t energy = sum_of_squares(x.q + group * kActivationGroup);
    sum += static_cast<float>(codes) * x.scales[group];
    squares += static_cast<float>(energy) * (x.scales[group] * x.scales[group]);
  }
  return {kMeanLower * sum, kLowerDoubt * std::sqrt(squares)};
}

LayeredRows layered_rows(const vq_matrix &matrix, const Activations &x, float *y,
                         std::int32_t panel_begin, std::int32_t panel_end) {
  const std::int32_t begin = panel_begin * kPairRows;
  const std::int32_t end = std::min(panel_end * kPairRows, matrix.out_features);
  return {y + begin, matrix.upper->row_scales + begin, end - begin, layered_input(x)};
}

// Whether 16 times every scale is still a half; weights beyond half a million are not.
bool has_upper_scales(const MatrixPart &part) {
  return std::none_of(part.upper_scales, part.upper_scales + part.rows,
                      [](std::uint16_t half) { return (half & 0x7fffu) >= 0x7c00u; });
}

// The upper layer of a part as a grid of its own.
std::unique_ptr<MatrixPart> upper_layer(const MatrixPart &part) {
  auto upper = std::make_unique<MatrixPart>(part);
  upper->scales = part.upper_scales;
  upper->stages[0].decode = Decode::kGrid4;
  upper->stages[0].zero = kUpperZero;
  return upper;
}

// ---- creation ----

bool is_layered(const vq_matrix_part &part) {
  return part.kind == VQ_MATRIX_LAYERED;
}

// Parts in the rows of parts[first], itself included.
std::int32_t parts_beside(const vq_matrix_part *parts, std::int32_t num_parts, std::int32_t first) {
  std::int32_t end = first + 1;
  while (end < num_parts && parts[end].extends_columns != 0) {
    ++end;
  }
  return end - first;
}

// Whether all rows are cut at the same columns, and only vectors are.
bool check_columns(const vq_matrix_part *parts, std::int32_t num_parts) {
  const std::int32_t width = parts_beside(parts, num_parts, 0);
  std::int64_t columns = 0;
  for (std::int32_t i = 0; i < num_parts; ++i) {
    const vq_matrix_part &part = parts[i];
    const bool extends = i % width != 0;
    columns += i < width ? part.in_features : 0;
    if (part.extends_columns != (extends ? 1 : 0) ||
        part.in_features != parts[i % width].in_features ||
        (width > 1 && part.kind != VQ_MATRIX_VQ) ||
        (extends && part.out_features != parts[i - 1].out_features)) {
      return false;
    }
  }
  return num_parts % width == 0 && columns <= VQ_MAX_FEATURES;
}

std::int32_t check_parts(const vq_matrix_part *parts, std::int32_t num_parts, bool is_packed) {
  if (parts == nullptr) {
    return VQ_ERR_NULL;
  }
  if (num_parts < 1 || num_parts > VQ_MATRIX_MAX_PARTS) {
    return VQ_ERR_SHAPE;
  }
  for (std::int32_t i = 0; i < num_parts; ++i) {
    const std::int32_t status = check_part(parts[i], is_packed);
    if (status != VQ_OK) {
      return status;
    }
  }
  const bool stacks_layers = num_parts > 1 && std::any_of(parts, parts + num_parts, is_layered);
  return check_columns(parts, num_parts) && !stacks_layers ? VQ_OK : VQ_ERR_SHAPE;
}

std::int32_t copy_transform(const vq_matrix_transform *input, vq_matrix &matrix) {
  if (input == nullptr) {
    return VQ_OK;
  }
  if (input->row_bias != nullptr) {
    matrix.row_bias.assign(input->row_bias, input->row_bias + matrix.out_features);
  }
  const auto count = static_cast<std::size_t>(matrix.in_features);
  if (input->permutation != nullptr) {
    matrix.permutation.assign(input->permutation, input->permutation + count);
    for (const std::int32_t from : matrix.permutation) {
      if (from < 0 || from >= matrix.in_features) {
        return VQ_ERR_SHAPE;
      }
    }
  }
  if (input->column_scales != nullptr) {
    matrix.column_scales.assign(input->column_scales, input->column_scales + count);
  }
  if (input->column_bias != nullptr) {
    matrix.column_bias.assign(input->column_bias, input->column_bias + count);
  }
  return VQ_OK;
}

std::int64_t total_bytes(const vq_matrix_part *parts, std::int32_t num_parts) {
  std::int64_t bytes = 0;
  for (std::int32_t i = 0; i < num_parts; ++i) {
    bytes += packed_bytes(parts[i]);
  }
  return bytes;
}

// Parts side by side, packed one behind the other; returns where the next may go.
std::uint8_t *add_band(const vq_matrix_part *sources, std::int32_t width, std::uint8_t *memory,
                       bool is_packed, vq_matrix &matrix) {
  Band band;
  band.first_part = matrix.parts.size();
  band.end_part = band.first_part + static_cast<std::size_t>(width);
  band.row_begin = matrix.out_features;
  band.row_end = band.row_begin + sources[0].out_features;
  band.panel_begin = matrix.num_panels;
  band.panel_rows = 1;
  std::int32_t input = 0;
  std::int32_t column = 0;
  for (std::int32_t i = 0; i < width; ++i) {
    matrix.parts.emplace_back();
    PackedPart &packed = matrix.parts.back();
    place_part(sources[i], memory, packed);
    MatrixPart &part = packed.part;
    part.row_begin = band.row_begin;
    part.begins_rows = i == 0;
    part.ends_rows = i + 1 == width;
    part.input_begin = input;
    part.column_begin = column;
    input += part.in_features;
    column += padded_columns(part.in_features);
    band.panel_rows = std::lcm(band.panel_rows, part.panel_rows);
    if (!is_packed) {
      fill_part(sources[i], memory, packed);
    }
    memory += packed_bytes(sources[i]);
  }
  for (std::size_t i = band.first_part; i < band.end_part; ++i) {
    MatrixPart &part = matrix.parts[i].part;
    part.panels_at_once = band.panel_rows / part.panel_rows;
    band.panel_cost += panel_cost(part) * part.panels_at_once * part.columns;
  }
  band.panel_end =
      band.panel_begin + (sources[0].out_features + band.panel_rows - 1) / band.panel_rows;
  matrix.out_features = band.row_end;
  matrix.num_panels = band.panel_end;
  matrix.bands.push_back(band);
  return memory;
}

// Every run of columns starts a group.
void cut_inputs(vq_matrix &matrix) {
  for (std::size_t i = 0; i < matrix.bands[0].end_part; ++i) {
    const MatrixPart &part = matrix.parts[i].part;
    for (std::int32_t at = 0; at < part.in_features; at += kActivationGroup) {
      const std::int32_t count = std::min(kActivationGroup, part.in_features - at);
      matrix.groups.push_back({part.input_begin + at, count});
    }
    matrix.in_features = part.input_begin + part.in_features;
    matrix.columns = part.column_begin + part.in_features;
  }
}

std::unique_ptr<vq_matrix> make_matrix(const vq_matrix_part *parts, std::int32_t num_parts,
                                       std::uint8_t *memory, bool is_packed) {
  std::unique_ptr<vq_matrix> matrix(new vq_matrix);
  if (memory == nullptr) {
    const auto bytes = static_cast<std::size_t>(total_bytes(parts, num_parts));
    memory = static_cast<std::uint8_t *>(std::aligned_alloc(kAlignment, bytes));
    if (memory == nullptr) {
      throw std::bad_alloc();
    }
    matrix->owned.reset(memory);
  }
  const std::int32_t width = parts_beside(parts, num_parts, 0);
  for (std::int32_t i = 0; i < num_parts; i += width) {
    memory = add_band(parts + i, width, memory, is_packed, *matrix);
  }
  cut_inputs(*matrix);
  if (is_layered(parts[0]) && has_upper_scales(matrix->parts[0].part)) {
    matrix->upper = upper_layer(matrix->parts[0].part);
  }
  return matrix;
}

// ---- products of a whole matrix ----

struct Scratch {
  std::vector<std::int8_t> q;
  std::vector<float> scales;
  std::vector<std::int32_t> prefix;
  std::vector<float> offsets;
};

Activations quantize_batch(const vq_matrix &matrix, const float *x, std::int32_t batch,
                           Scratch &scratch, std::int32_t *status) {
  const auto rows = static_cast<std::size_t>(batch);
  scratch.q.resize(rows * static_cast<std::size_t>(padded_columns(matrix.columns)));
  scratch.scales.resize(rows * static_cast<std::size_t>(activation_groups(matrix.columns)));
  scratch.prefix.resize(rows * static_cast<std::size_t>(prefix_length(matrix.columns)));
  scratch.offsets.resize(rows);
  const ActivationBuffers buffers{scratch.q.data(), scratch.scales.data(), scratch.prefix.data(),
                                  scratch.offsets.data()};
  *status = quantize_rows(matrix, x, matrix.in_features, 0, batch, buffers);
  return {buffers.q,      buffers.scales,
          buffers.prefix, matrix.column_bias.empty() ? nullptr : buffers.offsets,
          batch,          matrix.columns};
}

struct MultiplyJob {
  const vq_matrix *matrix;
  const Activations *activations;
  const float *x;
  std::int32_t batch;
  float *y;
  std::atomic<std::int32_t> status{VQ_OK};
};

void multiply_share(void *context, std::int32_t index, std::int32_t count) {
  auto *job = static_cast<MultiplyJob *>(context);
  const vq_matrix &matrix = *job->matrix;
  const std::int32_t begin = split_begin(matrix, index, count);
  const std::int32_t end = split_begin(matrix, index + 1, count);
  if (job->activations != nullptr) {
    multiply_panels(matrix, *job->activations, job->y, matrix.out_features, begin, end);
    return;
  }
  const std::int32_t status = multiply_panels_exact(matrix, job->x, matrix.in_features, job->batch,
                                                    job->y, matrix.out_features, begin, end);
  if (status != VQ_OK) {
    job->status.store(status, std::memory_order_relaxed);
  }
}

std::int32_t multiply(const vq_matrix &matrix, const float *x, std::int32_t batch, float *y,
                      bool exact, vq_pool *pool) {
  static thread_local Scratch scratch;
  MultiplyJob job{&matrix, nullptr, x, batch, y, {}};
  Activations activations{};
  if (!exact) {
    std::int32_t status = VQ_OK;
    activations = quantize_batch(matrix, x, batch, scratch, &status);
    if (status != VQ_OK) {
      return status;
    }
    job.activations = &activations;
  }
  if (pool == nullptr || pool->num_threads() == 1) {
    multiply_share(&job, 0, 1);
  } else {
    pool->run(multiply_share, &job);
  }
  return job.status.load();
}

}  // namespace

MatrixShape shape_of(const vq_matrix &matrix) {
  const bool has_transform = !matrix.permutation.empty() || !matrix.column_scales.empty();
  return {matrix.in_features,
          matrix.columns,
          matrix.out_features,
          matrix.num_panels,
          has_transform || matrix.bands[0].end_part > 1,
          matrix.bands[0].end_part > 1,
          !matrix.column_bias.empty(),
          matrix.upper != nullptr && matrix.row_bias.empty() && matrix.column_bias.empty()};
}

void multiply_upper(const vq_matrix &matrix, const Activations &x, float *y,
                    std::int32_t panel_begin, std::int32_t panel_end) {
  matrix_ops().panels(MatrixJob{matrix.upper.get(), x, y, 0}, panel_begin, panel_end);
}

float try_largest(const vq_matrix &matrix, const Activations &x, float *y,
                  std::int32_t panel_begin, std::int32_t panel_end, std::int32_t count) {
  LayeredRows rows = layered_rows(matrix, x, y, panel_begin, panel_end);
  rows.count = std::min(rows.count, count - panel_begin * kPairRows);
  if (rows.count <= 0) {
    return -std::numeric_limits<float>::infinity();
  }
  const std::int32_t row = panel_begin * kPairRows + matrix_ops().layered.largest(rows);
  const std::int32_t panel = row / kPairRows;
  float upper[kPairRows];
  const std::int32_t valid = std::min(kPairRows, matrix.out_features - panel * kPairRows);
  std::copy_n(y + panel * kPairRows, valid, upper);
  multiply_panels(matrix, x, y, 0, panel, panel + 1);
  const float largest = y[row];
  std::copy_n(upper, valid, y + panel * kPairRows);
  return largest;
}

void complete_panels(const vq_matrix &matrix, const Activations &x, float *y,
                     std::int32_t panel_begin, std::int32_t panel_end, float threshold) {
  std::int32_t panels[kMaxCompleted + 1];
  const LayeredRows rows = layered_rows(matrix, x, y, panel_begin, panel_end);
  const std::int32_t count = matrix_ops().layered.estimate(rows, threshold, panels);
  for (std::int32_t i = 0; i < count; ++i) {
    multiply_panels(matrix, x, y, 0, panel_begin + panels[i], panel_begin + panels[i] + 1);
  }
}

std::int32_t quantize_rows(const vq_matrix &matrix, const float *x, std::int64_t x_stride,
                           std::int32_t row, std::int32_t count, const ActivationBuffers &buffers) {
  const std::int32_t columns = matrix.columns;
  for (std::int64_t b = row; b < row + count; ++b) {
    const float *values = x + (b - row) * x_stride;
    if (!quantize_row(matrix, values, buffers.q + b * padded_columns(columns),
                      buffers.scales + b * activation_groups(columns),
                      buffers.prefix + b * prefix_length(columns))) {
      return VQ_ERR_NONFINITE;
    }
    if (buffers.offsets != nullptr) {
      buffers.offsets[b] = offset_of(matrix, values);
    }
  }
  return VQ_OK;
}

const float *arrange_row(const vq_matrix &matrix, const float *x, float *arranged, float *offset) {
  *offset = offset_of(matrix, x);
  if (matrix.permutation.empty() && matrix.column_scales.empty()) return x;
  gather_columns(matrix, x, 0, matrix.in_features, arranged);
  return arranged;
}

void multiply_panels(const vq_matrix &matrix, const Activations &x, float *y, std::int64_t y_stride,
                     std::int32_t panel_begin, std::int32_t panel_end) {
  const MatrixPanelsFn panels = matrix_ops().panels;
  for_parts(matrix, panel_begin, panel_end,
            [&](const MatrixPart &part, std::int32_t begin, std::int32_t end) {
              panels(MatrixJob{&part, activations_of(part, x), y, y_stride}, begin, end);
            });
  add_row_bias(matrix, panel_begin, panel_end, x.batch, y, y_stride);
}

std::int32_t multiply_panels_exact(const vq_matrix &matrix, const float *x, std::int64_t x_stride,
                                   std::int32_t batch, float *y, std::int64_t y_stride,
                                   std::int32_t panel_begin, std::int32_t panel_end) {
  ExactScratch &scratch = exact_scratch();
  const auto columns = static_cast<std::size_t>(matrix.in_features);
  try {
    scratch.x.resize(static_cast<std::size_t>(batch) * (columns + 1));
    scratch.weights.resize(std::size_t{kMaxPairs} * kPairRows * kActivationGroup);
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  float *offsets = scratch.x.data() + static_cast<std::size_t>(batch) * columns;
  for (std::int32_t b = 0; b < batch; ++b) {
    gather_columns(matrix, x + b * x_stride, 0, matrix.in_features,
                   scratch.x.data() + static_cast<std::size_t>(b) * columns);
    offsets[b] = offset_of(matrix, x + b * x_stride);
  }
  for_parts(matrix, panel_begin, panel_end,
            [&](const MatrixPart &part, std::int32_t begin, std::int32_t end) {
              const ExactJob job{&part, scratch.x.data(), matrix.in_features, offsets, batch,
                                 y,     y_stride};
              for (std::int32_t panel = begin; panel < end; ++panel) {
                exact_panel(job, panel, scratch.weights.data());
              }
            });
  add_row_bias(matrix, panel_begin, panel_end, batch, y, y_stride);
  return VQ_OK;
}

std::int32_t split_begin(const vq_matrix &matrix, std::int32_t index, std::int32_t count) {
  double total = 0.0;
  for (const Band &band : matrix.bands) {
    total += band.panel_cost * (band.panel_end - band.panel_begin);
  }
  double before = total * index / count;
  for (const Band &band : matrix.bands) {
    const double cost = band.panel_cost * (band.panel_end - band.panel_begin);
    if (before < cost) {
      return band.panel_begin + static_cast<std::int32_t>(before / band.panel_cost + 0.5);
    }
    before -= cost;
  }
  return matrix.num_panels;
}

void read_row(const vq_matrix &matrix, std::int32_t n, float *row) {
  const auto owner = std::find_if(matrix.bands.begin(), matrix.bands.end(),
                                  [n](const Band &band) { return n < band.row_end; });
  for (std::size_t i = owner->first_part; i < owner->end_part; ++i) {
    read_part(matrix, matrix.parts[i].part, n - owner->row_begin, row);
  }
}

}  // namespace vq

std::int32_t vq_matrix_get_size(const vq_matrix_part *parts, std::int32_t num_parts,
                                std::int64_t *bytes) {
  if (bytes == nullptr) {
    return VQ_ERR_NULL;
  }
  const std::int32_t status = vq::check_parts(parts, num_parts, true);
  if (status == VQ_OK) {
    *bytes = vq::total_bytes(parts, num_parts);
  }
  return status;
}

std::int32_t vq_matrix_create(const vq_matrix_part *parts, std::int32_t num_parts,
                              const vq_matrix_transform *transform, void *memory,
                              std::int32_t is_packed, vq_matrix **matrix) {
  if (matrix == nullptr) {
    return VQ_ERR_NULL;
  }
  *matrix = nullptr;
  std::int32_t status = vq::check_parts(parts, num_parts, is_packed != 0);
  if (status != VQ_OK || (is_packed != 0 && memory == nullptr)) {
    return status != VQ_OK ? status : std::int32_t{VQ_ERR_NULL};
  }
  try {
    std::unique_ptr<vq_matrix> made =
        vq::make_matrix(parts, num_parts, static_cast<std::uint8_t *>(memory), is_packed != 0);
    status = vq::copy_transform(transform, *made);
    *matrix = status == VQ_OK ? made.release() : nullptr;
  } catch (const std::bad_alloc &) {
    status = VQ_ERR_MEMORY;
  }
  return status;
}

void vq_matrix_free(vq_matrix *matrix) {
  delete matrix;
}

std::int32_t vq_matrix_multiply(const vq_matrix *matrix, const float *x, std::int32_t batch,
                                float *y, std::int32_t exact, vq_pool *pool) {
  if (matrix == nullptr || x == nullptr || y == nullptr) {
    return VQ_ERR_NULL;
  }
  if (batch < 1 || batch > VQ_MAX_FEATURES) {
    return VQ_ERR_SHAPE;
  }
  if (pool != nullptr && !pool->owned_by_this_process()) {
    return VQ_ERR_FORKED;
  }
  try {
    return vq::multiply(*matrix, x, batch, y, exact != 0, pool);
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
}

std::int32_t vq_matrix_read_rows(const vq_matrix *matrix, const std::int32_t *rows,
                                 std::int32_t count, float *weights) {
  if (matrix == nullptr || rows == nullptr || weights == nullptr) {
    return VQ_ERR_NULL;
  }
  for (std::int32_t i = 0; i < count; ++i) {
    if (rows[i] < 0 || rows[i] >= matrix->out_features) {
      return VQ_ERR_SHAPE;
    }
  }
  for (std::int64_t i = 0; i < count; ++i) {
    vq::read_row(*matrix, rows[i], weights + i * matrix->in_features);
  }
  return VQ_OK;
}
