#include "matrix_pack.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "matrix_half.hpp"
#include "rounding.hpp"

namespace vq {
namespace {

constexpr std::int32_t kMaxBits = 8;
constexpr std::int32_t kLayerBits = 4;
constexpr float kUpperStep = 16.0f;  // of the upper layer, in steps of the lower
constexpr std::int32_t kMinTrellis = 10;
constexpr std::int32_t kMaxTrellis = 16;
constexpr std::int32_t kSmallCodes = 256;
constexpr std::int32_t kCodeOffset = 128;  // int8 values are stored as value + 128
constexpr std::int32_t kIndexRows = 8;     // index rows of a VQ panel

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return ceil_div(a, b) * b;
}

bool is_grid(const vq_matrix_part &source) {
  return source.kind == VQ_MATRIX_GRID || source.kind == VQ_MATRIX_DENSE;
}

std::int32_t grid_bits(const vq_matrix_part &source) {
  switch (source.kind) {
    case VQ_MATRIX_DENSE:
      return kMaxBits;
    case VQ_MATRIX_LAYERED:
      return kLayerBits;
    default:
      return source.bits;
  }
}

// ---- checks ----

bool good_group(std::int32_t group) {
  return group == 0 || group == 32 || group == 64 || (group > 0 && group % kActivationGroup == 0);
}

bool good_size(std::int32_t size) {
  return size >= 1 && size <= VQ_MAX_FEATURES;
}

std::int32_t check_grid(const vq_matrix_part &source, bool is_packed) {
  const std::int32_t bits = grid_bits(source);
  if ((bits != 2 && bits != 3 && bits != 4 && bits != 8) || !good_group(source.group_size)) {
    return VQ_ERR_SHAPE;
  }
  const bool needs_scales = source.kind == VQ_MATRIX_GRID;
  const bool missing = source.codes == nullptr || (needs_scales && source.scales == nullptr);
  return !is_packed && missing ? VQ_ERR_NULL : VQ_OK;
}

std::int32_t check_layered(const vq_matrix_part &source, bool is_packed) {
  if (source.group_size != 0 || source.extends_columns != 0) {
    return VQ_ERR_SHAPE;
  }
  const bool needs_scales = source.codes_are_bytes != 0;
  const bool missing = source.codes == nullptr || (needs_scales && source.scales == nullptr);
  return !is_packed && missing ? VQ_ERR_NULL : VQ_OK;
}

std::int32_t check_tcq(const vq_matrix_part &source, bool is_packed) {
  const bool good = source.bits >= 1 && source.bits <= 5 && source.trellis_bits >= kMinTrellis &&
                    source.trellis_bits <= kMaxTrellis && source.multiplier > 0 &&
                    source.multiplier < (1 << kMaxTrellis) && source.multiplier % 2 == 1 &&
                    good_group(source.group_size);
  if (!good) {
    return VQ_ERR_SHAPE;
  }
  if (source.table == nullptr) {
    return VQ_ERR_NULL;
  }
  const bool missing = source.codes == nullptr || source.scales == nullptr;
  return !is_packed && missing ? VQ_ERR_NULL : VQ_OK;
}

std::int32_t check_vq(const vq_matrix_part &source, bool is_packed) {
  const std::int32_t v = source.vector_length;
  if (v < 1 || v > kMaxVector || source.num_stages < 1 || source.num_stages > kMaxStages) {
    return VQ_ERR_SHAPE;
  }
  for (std::int32_t s = 0; s < source.num_stages; ++s) {
    if (source.num_codes[s] < 1 || source.num_codes[s] > VQ_MATRIX_MAX_CODES) {
      return VQ_ERR_SHAPE;
    }
    if (source.codebooks[s] == nullptr || (!is_packed && source.indices[s] == nullptr)) {
      return VQ_ERR_NULL;
    }
  }
  return VQ_OK;
}

// ---- placement ----

// Hands out 64-byte aligned pieces of packed memory, or only counts them.
class Pieces {
 public:
  explicit Pieces(std::uint8_t *memory) : memory_(memory) {}
  std::uint8_t *take(std::int64_t bytes) {
    std::uint8_t *piece = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(bytes, kBlockBytes);
    return piece;
  }
  std::int64_t used() const { return used_; }

 private:
  std::uint8_t *memory_;
  std::int64_t used_ = 0;
};

void place_groups(const vq_matrix_part &source, MatrixPart &part) {
  const std::int32_t group =
      source.group_size == 0 || source.kind == VQ_MATRIX_VQ
          ? static_cast<std::int32_t>(round_up(part.columns, kActivationGroup))
          : source.group_size;
  part.segment = std::min(group, kActivationGroup);
  part.segments_per_group = group / part.segment;
  part.num_groups = static_cast<std::int32_t>(ceil_div(part.in_features, group));
}

void place_rows(const vq_matrix_part &source, MatrixPart &part) {
  part.in_features = source.in_features;
  part.columns = static_cast<std::int32_t>(round_up(source.in_features, kChunkColumns));
  part.rows = source.out_features;
  part.panel_rows = source.kind == VQ_MATRIX_VQ ? kIndexRows * source.vector_length : kPairRows;
  part.num_panels = static_cast<std::int32_t>(ceil_div(part.rows, part.panel_rows));
  place_groups(source, part);
}

void lanes_in_order(MatrixStage &stage) {
  for (std::int32_t lane = 0; lane < stage.pairs * kPairRows; ++lane) {
    stage.lane_rows[lane] = static_cast<std::int16_t>(lane);
  }
}

Decode grid_decode(std::int32_t bits) {
  switch (bits) {
    case 2:
      return Decode::kGrid2;
    case 3:
      return Decode::kGrid3;
    case 4:
      return Decode::kGrid4;
    default:
      return Decode::kGrid8;
  }
}

void place_grid(const vq_matrix_part &source, MatrixPart &part, Pieces &pieces) {
  MatrixStage &stage = part.stages[0];
  const std::int32_t bits = grid_bits(source);
  stage.decode = grid_decode(bits);
  stage.zero = 1 << (bits - 1);
  stage.pairs = 1;
  stage.panel_bytes = std::int64_t{part.columns} * 2 * bits;
  stage.codes = pieces.take(stage.panel_bytes * part.num_panels + kReadAhead);
  lanes_in_order(stage);
}

void place_tcq(const vq_matrix_part &source, MatrixPart &part, Pieces &pieces) {
  MatrixStage &stage = part.stages[0];
  stage.decode = Decode::kTcq;
  stage.zero = kCodeOffset;
  stage.pairs = 1;
  stage.panel_bytes = std::int64_t{part.columns} * 2 * source.bits;
  const std::uint8_t *zeros = pieces.take(stage.panel_bytes * (part.num_panels + 1) + kReadAhead);
  stage.codes = zeros == nullptr ? nullptr : zeros + stage.panel_bytes;
  lanes_in_order(stage);
}

void place_scales(const vq_matrix_part &source, MatrixPart &part, Pieces &pieces) {
  const std::int64_t count = std::int64_t{part.num_panels} * part.num_groups * kPairRows;
  part.scales = reinterpret_cast<const std::uint16_t *>(pieces.take(count * 2));
  if (source.kind == VQ_MATRIX_GRID && source.zeros != nullptr) {
    part.zeros = pieces.take(count);
  }
}

void place_layers(const vq_matrix_part &source, MatrixPart &part, Pieces &pieces) {
  MatrixStage &stage = part.stages[0];
  const std::int64_t rows = std::int64_t{part.num_panels} * kPairRows;
  place_grid(source, part, pieces);
  stage.decode = Decode::kLayers;
  stage.zero = kCodeOffset;
  stage.lower = pieces.take(stage.panel_bytes * part.num_panels + kReadAhead);
  place_scales(source, part, pieces);
  part.upper_scales = reinterpret_cast<const std::uint16_t *>(pieces.take(rows * 2));
  part.row_scales =
      reinterpret_cast<const float *>(pieces.take(rows * std::int64_t{sizeof(float)}));
}

// Components of an entry with its padding, so that entries can be loaded whole.
std::int32_t entry_bytes(std::int32_t vector_length) {
  return vector_length <= 4 ? 4 : vector_length <= 8 ? 8 : kMaxVector;
}

// Rows of the lanes: row sets are components of 8 index rows.
void lanes_of_components(MatrixStage &stage) {
  for (std::int32_t lane = 0; lane < stage.pairs * kPairRows; ++lane) {
    const std::int32_t component = lane / kBlock;
    const std::int32_t row = lane % kBlock * stage.vector_length + component;
    stage.lane_rows[lane] = static_cast<std::int16_t>(component < stage.vector_length ? row : -1);
  }
}

// Row sets are runs of padded entries.
void lanes_of_entries(MatrixStage &stage) {
  for (std::int32_t lane = 0; lane < stage.pairs * kPairRows; ++lane) {
    const std::int32_t component = lane % stage.entry_bytes;
    const std::int32_t row = lane / stage.entry_bytes * stage.vector_length + component;
    stage.lane_rows[lane] = static_cast<std::int16_t>(component < stage.vector_length ? row : -1);
  }
}

void place_vq_stage(const vq_matrix_part &source, std::int32_t index, const MatrixPart &part,
                    MatrixStage &stage, Pieces &pieces) {
  const bool is_small = source.num_codes[index] <= kSmallCodes;
  stage.decode = is_small ? Decode::kVqSmall : Decode::kVqLarge;
  stage.zero = kCodeOffset;
  stage.vector_length = source.vector_length;
  stage.num_codes = source.num_codes[index];
  stage.entry_bytes = entry_bytes(source.vector_length);
  stage.panel_bytes = std::int64_t{part.columns} * kIndexRows * (is_small ? 1 : 2);
  stage.pairs =
      is_small ? (source.vector_length + 1) / 2 : kIndexRows * stage.entry_bytes / kPairRows;
  stage.codes = pieces.take(stage.panel_bytes * part.num_panels + kReadAhead);
  stage.entries = pieces.take(std::int64_t{stage.num_codes} * stage.entry_bytes + kReadAhead);
  if (is_small) {
    stage.table = pieces.take(std::int64_t{2} * stage.pairs * kSmallCodes);
  }
  stage.lane_scales = reinterpret_cast<const float *>(
      pieces.take(kMaxPairs * kPairRows * std::int64_t{sizeof(float)}));
  stage.codebook = reinterpret_cast<const std::uint16_t *>(
      pieces.take(std::int64_t{stage.num_codes} * stage.vector_length * 2));
  if (is_small) {
    lanes_of_components(stage);
  } else {
    lanes_of_entries(stage);
  }
}

void place(const vq_matrix_part &source, MatrixPart &part, Pieces &pieces) {
  place_rows(source, part);
  part.num_stages = 1;
  if (is_grid(source)) {
    place_grid(source, part, pieces);
    place_scales(source, part, pieces);
  } else if (source.kind == VQ_MATRIX_LAYERED) {
    place_layers(source, part, pieces);
  } else if (source.kind == VQ_MATRIX_TCQ) {
    place_tcq(source, part, pieces);
    place_scales(source, part, pieces);
  } else {
    part.num_stages = source.num_stages;
    for (std::int32_t s = 0; s < source.num_stages; ++s) {
      place_vq_stage(source, s, part, part.stages[s], pieces);
    }
  }
}

// ---- trellis plan ----

std::int32_t frames_of(std::int32_t bits) {
  return bits <= 3 ? 1 : 2;
}

// Bytes of a column in a frame.
std::int32_t frame_bytes(std::int32_t bits) {
  return kPairRows / frames_of(bits) * bits / 8;
}

void plan_gather(TcqPlan &plan) {
  const std::int32_t bytes = frame_bytes(plan.bits);
  for (std::int32_t i = 0; i < kBlockBytes; ++i) {
    const std::int32_t column = i / 8;
    const std::int32_t byte = i % 8 - 2;  // of the column in the frame
    const std::int32_t at = byte < 0 ? (column + 1) * bytes + byte
                                     : kBlockBytes + column * bytes + std::min(byte, bytes - 1);
    plan.gather[i] = static_cast<std::uint8_t>(at);
  }
}

// Window of row 4 * quarter + i: two bytes of lane i of every column.
void plan_shifts(TcqPlan &plan) {
  for (std::int32_t quarter = 0; quarter < 4; ++quarter) {
    for (std::int32_t i = 0; i < kBlockBytes; ++i) {
      const std::int32_t row = (4 * quarter + i % 8 / 2) % (kPairRows / plan.frames);
      const std::int32_t bit = 16 + (row + 1) * plan.bits - plan.trellis_bits + i % 2 * 8;
      plan.shifts[quarter][i] = static_cast<std::uint8_t>(bit % 64);
    }
  }
}

// Tables that repeat every level in 4 or 2 neighbouring entries are as good as ones of 64 or 128. The
// kernels multiply by multiplier * 2^(8 + index_bits - trellis_bits).
std::int32_t index_bits_of(const std::int8_t *table, std::int32_t trellis_bits) {
  for (std::int32_t bits = 6; bits < 8; ++bits) {
    bool repeats = trellis_bits <= 8 + bits;
    for (std::int32_t i = 0; i < 256; ++i) {
      repeats = repeats && table[i] == table[i >> (8 - bits) << (8 - bits)];
    }
    if (repeats) return bits;
  }
  return 8;
}

std::unique_ptr<TcqPlan> make_plan(const vq_matrix_part &source) {
  std::unique_ptr<TcqPlan> plan(new TcqPlan{});
  plan->bits = source.bits;
  plan->trellis_bits = source.trellis_bits;
  plan->multiplier = source.multiplier;
  plan->frames = frames_of(source.bits);
  plan_gather(*plan);
  plan_shifts(*plan);
  plan->index_bits = index_bits_of(source.table, source.trellis_bits);
  for (int i = 0; i < 1 << plan->index_bits; ++i) {
    const std::int32_t level = source.table[i << (8 - plan->index_bits)];
    plan->table[i] = static_cast<std::uint8_t>(level + kCodeOffset);
  }
  return plan;
}

// ---- packing ----

// Codes of 16 rows in 32 columns.
struct Chunk {
  std::uint8_t code[kChunkColumns][kPairRows];
};

std::uint8_t *writable(const void *piece) {
  return const_cast<std::uint8_t *>(static_cast<const std::uint8_t *>(piece));
}

// Bits [at, at + bits) of a stream of words that are `stride` words apart.
std::uint32_t stream_code(const std::int32_t *words, std::int64_t stride, std::int64_t at,
                          std::int32_t bits) {
  const auto low = static_cast<std::uint32_t>(words[at / 32 * stride]) >> (at % 32);
  const std::int64_t have = 32 - at % 32;
  if (have >= bits) {
    return low & ((1u << bits) - 1u);
  }
  const auto high = static_cast<std::uint32_t>(words[(at / 32 + 1) * stride]);
  return (low | (high << have)) & ((1u << bits) - 1u);
}

void read_word_codes(const vq_matrix_part &source, std::int64_t row, std::int64_t rows,
                     std::int64_t column, std::int64_t columns, Chunk &chunk) {
  const auto *words = static_cast<const std::int32_t *>(source.codes);
  for (std::int64_t c = 0; c < columns; ++c) {
    for (std::int64_t r = 0; r < rows; ++r) {
      chunk.code[c][r] = static_cast<std::uint8_t>(stream_code(
          words + row + r, source.out_features, (column + c) * source.bits, source.bits));
    }
  }
}

void read_byte_codes(const vq_matrix_part &source, std::int64_t row, std::int64_t rows,
                     std::int64_t column, std::int64_t columns, Chunk &chunk) {
  const auto *bytes = static_cast<const std::uint8_t *>(source.codes);
  for (std::int64_t c = 0; c < columns; ++c) {
    const std::uint8_t *from = bytes + (column + c) * source.out_features + row;
    std::memcpy(chunk.code[c], from, static_cast<std::size_t>(rows));
  }
}

// Weights [column, column + count) of a row.
void read_dense(const vq_matrix_part &source, std::int64_t row, std::int64_t column,
                std::int64_t count, float *values) {
  const std::int64_t at = row * source.in_features + column;
  if (source.weights_are_half == 0) {
    std::copy_n(static_cast<const float *>(source.codes) + at, count, values);
    return;
  }
  const std::uint16_t *halves = static_cast<const std::uint16_t *>(source.codes) + at;
  for (std::int64_t i = 0; i < count; ++i) {
    values[i] = finite_half_to_float(halves[i]);
  }
}

// round(value * inverse), half to even, within -127 and 127, plus kCodeOffset.
void round_codes(const float *values, float inverse, std::uint8_t *codes) {
  for (std::int32_t c = 0; c < kChunkColumns; ++c) {
    const float limited = std::min(127.0f, std::max(-127.0f, values[c] * inverse));
    const float shifted = limited + kRoundMagic;
    std::int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    codes[c] = static_cast<std::uint8_t>(bits - kRoundMagicBits + kCodeOffset);
  }
}

void read_chunk(const vq_matrix_part &source, const MatrixPart &part, std::int32_t panel,
                std::int32_t column, Chunk &chunk) {
  std::memset(&chunk, 0, sizeof chunk);
  const std::int32_t row = panel * kPairRows;
  const std::int32_t rows = std::min(kPairRows, part.rows - row);
  const std::int32_t columns = std::min(kChunkColumns, part.in_features - column);
  if (source.codes_are_bytes != 0) {
    read_byte_codes(source, row, rows, column, columns, chunk);
  } else {
    read_word_codes(source, row, rows, column, columns, chunk);
  }
}

// Block (block, set) of a chunk, one code per byte.
void take_block(const Chunk &chunk, int block, int set, std::uint8_t *codes) {
  for (int c = 0; c < kBlock; ++c) {
    for (int r = 0; r < kBlock; ++r) {
      codes[r * kBlock + c] = chunk.code[block * kBlock + c][set * kBlock + r];
    }
  }
}

// Puts `width` bits of every code, from bit `from` on, at bit `to` of 64 bytes.
void put_bits(const std::uint8_t *codes, int from, int width, int to, std::uint8_t *out) {
  const unsigned mask = (1u << width) - 1u;
  for (int i = 0; i < kBlockBytes; ++i) {
    out[i] = static_cast<std::uint8_t>(out[i] | (((codes[i] >> from) & mask) << to));
  }
}

// The 8 blocks of a chunk (2 * block + set) to the layout of the header; 64 * bits bytes.
void write_chunk(const Chunk &chunk, std::int32_t bits, std::uint8_t *out) {
  std::memset(out, 0, static_cast<std::size_t>(bits * kBlockBytes));
  for (int i = 0; i < 8; ++i) {
    std::uint8_t codes[kBlockBytes];
    take_block(chunk, i / 2, i % 2, codes);
    if (bits == 8) {
      std::memcpy(out + i * kBlockBytes, codes, kBlockBytes);
    } else if (bits == 4) {
      put_bits(codes, 0, 4, i % 2 * 4, out + i / 2 * kBlockBytes);
    } else if (bits == 2) {
      put_bits(codes, 0, 2, i % 4 * 2, out + i / 4 * kBlockBytes);
    } else {
      put_bits(codes, 2, 1, i, out);
      put_bits(codes, 0, 2, i % 4 * 2, out + (1 + i / 4) * kBlockBytes);
    }
  }
}

float dense_scale(const vq_matrix_part &source, std::int64_t row, std::int64_t column,
                  std::int64_t end) {
  std::int32_t largest = 0;  // bits of a magnitude: they sort as it does
  for (std::int64_t c = column; c < end; c += kChunkColumns) {
    float values[kChunkColumns] = {};
    read_dense(source, row, c, std::min<std::int64_t>(kChunkColumns, end - c), values);
    for (const float value : values) {
      std::int32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      largest = std::max(largest, bits & 0x7fffffff);
    }
  }
  float magnitude;
  std::memcpy(&magnitude, &largest, sizeof magnitude);
  return magnitude / 127.0f;
}

std::uint16_t group_scale(const vq_matrix_part &source, const MatrixPart &part, std::int64_t row,
                          std::int64_t group) {
  if (row >= part.rows) {
    return 0;
  }
  if (source.kind == VQ_MATRIX_DENSE || source.kind == VQ_MATRIX_LAYERED) {
    const std::int64_t columns = std::int64_t{part.segment} * part.segments_per_group;
    const std::int64_t end = std::min<std::int64_t>(part.in_features, (group + 1) * columns);
    return float_to_half(dense_scale(source, row, group * columns, end));
  }
  return source.scales[group * part.rows + row];
}

std::uint8_t group_zero(const vq_matrix_part &source, const MatrixPart &part, std::int64_t row,
                        std::int64_t group) {
  if (row >= part.rows) {
    return static_cast<std::uint8_t>(part.stages[0].zero);
  }
  return source.zeros[group * part.rows + row];
}

void fill_scales(const vq_matrix_part &source, const MatrixPart &part) {
  auto *scales = reinterpret_cast<std::uint16_t *>(writable(part.scales));
  auto *zeros = writable(part.zeros);
  for (std::int64_t panel = 0; panel < part.num_panels; ++panel) {
    for (std::int64_t group = 0; group < part.num_groups; ++group) {
      for (std::int64_t lane = 0; lane < kPairRows; ++lane) {
        const std::int64_t at = (panel * part.num_groups + group) * kPairRows + lane;
        scales[at] = group_scale(source, part, panel * kPairRows + lane, group);
        if (zeros != nullptr) {
          zeros[at] = group_zero(source, part, panel * kPairRows + lane, group);
        }
      }
    }
  }
}

void fill_grid(const vq_matrix_part &source, const MatrixPart &part) {
  const MatrixStage &stage = part.stages[0];
  const std::int32_t bits = grid_bits(source);
  for (std::int32_t panel = 0; panel < part.num_panels; ++panel) {
    std::uint8_t *out = writable(stage.codes) + panel * stage.panel_bytes;
    for (std::int32_t column = 0; column < part.columns; column += kChunkColumns) {
      Chunk chunk;
      read_chunk(source, part, panel, column, chunk);
      write_chunk(chunk, bits, out + std::int64_t{column} * 2 * bits);
    }
  }
}

// 32 columns of 16 rows of floats, straight to blocks of 8-bit codes; padding is left alone.
void write_dense_chunk(const vq_matrix_part &source, const MatrixPart &part, std::int32_t panel,
                       std::int32_t column, std::uint8_t *out) {
  const std::int32_t group = column / (part.segment * part.segments_per_group);
  const std::uint16_t *scales =
      part.scales + (std::int64_t{panel} * part.num_groups + group) * kPairRows;
  const std::int32_t rows = std::min(kPairRows, part.rows - panel * kPairRows);
  const std::int32_t columns = std::min(kChunkColumns, part.in_features - column);
  for (std::int32_t r = 0; r < rows; ++r) {
    const float scale = half_to_float(scales[r]);
    float values[kChunkColumns] = {};
    std::uint8_t codes[kChunkColumns];
    read_dense(source, std::int64_t{panel} * kPairRows + r, column, columns, values);
    round_codes(values, scale > 0.0f ? 1.0f / scale : 0.0f, codes);
    for (std::int32_t c = 0; c < columns; c += kBlock) {
      std::uint8_t *block = out + (c / kBlock * 2 + r / kBlock) * kBlockBytes;
      const auto count = static_cast<std::size_t>(std::min(kBlock, columns - c));
      std::memcpy(block + r % kBlock * kBlock, codes + c, count);
    }
  }
}

void fill_dense(const vq_matrix_part &source, const MatrixPart &part) {
  const MatrixStage &stage = part.stages[0];
  for (std::int32_t panel = 0; panel < part.num_panels; ++panel) {
    std::uint8_t *out = writable(stage.codes) + panel * stage.panel_bytes;
    for (std::int32_t column = 0; column < part.columns; column += kChunkColumns) {
      write_dense_chunk(source, part, panel, column, out + std::int64_t{column} * kPairRows);
    }
  }
}

// Codes 0..255 of a row; padding is left alone.
void read_row_codes(const vq_matrix_part &source, const MatrixPart &part, std::int64_t row,
                    std::uint8_t *codes) {
  if (source.codes_are_bytes != 0) {
    const auto *from = static_cast<const std::uint8_t *>(source.codes) + row * part.in_features;
    std::transform(from, from + part.in_features, codes,
                   [](std::uint8_t code) { return static_cast<std::uint8_t>(code ^ 0x80u); });
    return;
  }
  const float scale = part.row_scales[row];
  for (std::int32_t column = 0; column < part.in_features; column += kChunkColumns) {
    const std::int32_t count = std::min(kChunkColumns, part.in_features - column);
    float values[kChunkColumns] = {};
    std::uint8_t chunk[kChunkColumns];
    read_dense(source, row, column, count, values);
    round_codes(values, scale > 0.0f ? 1.0f / scale : 0.0f, chunk);
    std::copy_n(chunk, count, codes + column);
  }
}

// Four bits of the codes of row `lane`, from bit `from` on, into a panel of a layer.
void write_layer(const std::uint8_t *codes, int from, std::int32_t columns, std::int32_t lane,
                 std::uint8_t *panel) {
  const int to = lane / kBlock * kLayerBits;
  for (std::int32_t column = 0; column < columns; column += kBlock) {
    std::uint8_t *out = panel + column / kBlock * kBlockBytes + lane % kBlock * kBlock;
    for (int c = 0; c < kBlock; ++c) {
      out[c] = static_cast<std::uint8_t>(out[c] | (((codes[column + c] >> from) & 15u) << to));
    }
  }
}

void fill_layers(const vq_matrix_part &source, const MatrixPart &part) {
  const MatrixStage &stage = part.stages[0];
  auto *scales = reinterpret_cast<std::uint16_t *>(writable(part.scales));
  auto *upper_scales = reinterpret_cast<std::uint16_t *>(writable(part.upper_scales));
  auto *row_scales = reinterpret_cast<float *>(writable(part.row_scales));
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(part.columns));
  for (std::int64_t row = 0; row < part.rows; ++row) {
    const bool has_scales = source.codes_are_bytes != 0;
    scales[row] = has_scales ? source.scales[row] : group_scale(source, part, row, 0);
    row_scales[row] = half_to_float(scales[row]);
    upper_scales[row] = float_to_half(kUpperStep * row_scales[row]);
    read_row_codes(source, part, row, codes.data());
    const auto lane = static_cast<std::int32_t>(row % kPairRows);
    const std::int64_t panel = row / kPairRows * stage.panel_bytes;
    write_layer(codes.data(), kLayerBits, part.columns, lane, writable(stage.codes) + panel);
    write_layer(codes.data(), 0, part.columns, lane, writable(stage.lower) + panel);
  }
}

// One column of the file, panel by panel, frame by frame.
void fill_stream(const std::uint8_t *stream, std::int64_t length, std::int32_t bits,
                 std::int64_t column, const MatrixStage &stage) {
  const std::int64_t bytes = frame_bytes(bits);
  const std::int64_t frames = frames_of(bits);
  const std::int64_t block = column / kBlock * kBlock * frames * bytes;
  for (std::int64_t at = 0, frame = 0; at < length; at += bytes, ++frame) {
    std::uint8_t *panel = writable(stage.codes) + frame / frames * stage.panel_bytes + block;
    std::memcpy(panel + (frame % frames * kBlock + column % kBlock) * bytes, stream + at,
                static_cast<std::size_t>(std::min(bytes, length - at)));
  }
}

void fill_tcq(const vq_matrix_part &source, const MatrixPart &part) {
  const std::int64_t length = ceil_div(std::int64_t{part.rows} * source.bits, 8);
  const auto *codes = static_cast<const std::uint8_t *>(source.codes);
  for (std::int64_t column = 0; column < part.in_features; ++column) {
    fill_stream(codes + column * length, length, source.bits, column, part.stages[0]);
  }
}

void fill_indices(const vq_matrix_part &source, std::int32_t index, const MatrixPart &part) {
  const MatrixStage &stage = part.stages[index];
  const bool is_small = stage.decode == Decode::kVqSmall;
  const std::int64_t index_rows = ceil_div(part.rows, source.vector_length);
  for (std::int64_t row = 0; row < index_rows; ++row) {
    const std::uint16_t *from = source.indices[index] + row * part.in_features;
    std::uint8_t *panel = writable(stage.codes) + row / kIndexRows * stage.panel_bytes;
    for (std::int64_t column = 0; column < part.in_features; ++column) {
      const std::int64_t at =
          column / kBlock * kBlockBytes + row % kIndexRows * kBlock + column % kBlock;
      const auto code = std::min<std::int32_t>(from[column], stage.num_codes - 1);
      if (is_small) {
        panel[at] = static_cast<std::uint8_t>(code);
      } else {
        const auto wide = static_cast<std::uint16_t>(code);
        std::memcpy(panel + 2 * at, &wide, sizeof wide);
      }
    }
  }
}

float component_scale(const MatrixStage &stage, std::int32_t component) {
  float largest = 0.0f;
  for (std::int64_t code = 0; code < stage.num_codes; ++code) {
    const float value = half_to_float(stage.codebook[code * stage.vector_length + component]);
    largest = std::max(largest, std::fabs(value));
  }
  return largest / 127.0f;
}

void fill_component(const MatrixStage &stage, std::int32_t component, float scale) {
  std::uint8_t *entries = writable(stage.entries);
  for (std::int64_t code = 0; code < stage.num_codes; ++code) {
    const float value = half_to_float(stage.codebook[code * stage.vector_length + component]);
    const float steps = scale > 0.0f ? std::nearbyint(value / scale) : 0.0f;
    const float limited = std::min(127.0f, std::max(-127.0f, steps));
    entries[code * stage.entry_bytes + component] =
        static_cast<std::uint8_t>(static_cast<int>(limited) + kCodeOffset);
  }
}

// The entries by component, for byte permutes; padding is code 0.
void fill_table(const MatrixStage &stage) {
  std::uint8_t *table = writable(stage.table);
  std::fill_n(table, 2 * stage.pairs * kSmallCodes, static_cast<std::uint8_t>(kCodeOffset));
  for (std::int32_t component = 0; component < stage.vector_length; ++component) {
    for (std::int32_t code = 0; code < stage.num_codes; ++code) {
      table[component * kSmallCodes + code] = stage.entries[code * stage.entry_bytes + component];
    }
  }
}

void fill_codebook(const vq_matrix_part &source, std::int32_t index, const MatrixStage &stage) {
  const std::int64_t values = std::int64_t{stage.num_codes} * stage.vector_length;
  std::memcpy(writable(stage.codebook), source.codebooks[index],
              static_cast<std::size_t>(values) * sizeof(std::uint16_t));
  std::fill_n(writable(stage.entries), std::int64_t{stage.num_codes} * stage.entry_bytes,
              static_cast<std::uint8_t>(kCodeOffset));
  auto *lane_scales = reinterpret_cast<float *>(writable(stage.lane_scales));
  for (std::int32_t component = 0; component < stage.vector_length; ++component) {
    const float scale = component_scale(stage, component);
    fill_component(stage, component, scale);
    for (std::int32_t lane = 0; lane < stage.pairs * kPairRows; ++lane) {
      if (stage.lane_rows[lane] >= 0 && stage.lane_rows[lane] % stage.vector_length == component) {
        lane_scales[lane] = scale;
      }
    }
  }
  if (stage.decode == Decode::kVqSmall) {
    fill_table(stage);
  }
}

}  // namespace

std::int32_t check_part(const vq_matrix_part &source, bool is_packed) {
  if (!good_size(source.in_features) || !good_size(source.out_features)) {
    return VQ_ERR_SHAPE;
  }
  switch (source.kind) {
    case VQ_MATRIX_GRID:
    case VQ_MATRIX_DENSE:
      return check_grid(source, is_packed);
    case VQ_MATRIX_LAYERED:
      return check_layered(source, is_packed);
    case VQ_MATRIX_TCQ:
      return check_tcq(source, is_packed);
    case VQ_MATRIX_VQ:
      return check_vq(source, is_packed);
    default:
      return VQ_ERR_SHAPE;
  }
}

std::int64_t packed_bytes(const vq_matrix_part &source) {
  MatrixPart part{};
  Pieces pieces(nullptr);
  place(source, part, pieces);
  return pieces.used();
}

void place_part(const vq_matrix_part &source, std::uint8_t *memory, PackedPart &packed) {
  Pieces pieces(memory);
  place(source, packed.part, pieces);
  if (source.kind == VQ_MATRIX_TCQ) {
    packed.plan = make_plan(source);
    packed.part.stages[0].tcq = packed.plan.get();
  }
}

void fill_part(const vq_matrix_part &source, std::uint8_t *memory, const PackedPart &packed) {
  const MatrixPart &part = packed.part;
  std::memset(memory, 0, static_cast<std::size_t>(packed_bytes(source)));
  if (source.kind == VQ_MATRIX_VQ) {
    for (std::int32_t s = 0; s < part.num_stages; ++s) {
      fill_codebook(source, s, part.stages[s]);
      fill_indices(source, s, part);
    }
    return;
  }
  if (source.kind == VQ_MATRIX_LAYERED) {
    fill_layers(source, part);
    return;
  }
  fill_scales(source, part);
  if (source.kind == VQ_MATRIX_TCQ) {
    fill_tcq(source, part);
  } else if (source.kind == VQ_MATRIX_DENSE) {
    fill_dense(source, part);
  } else {
    fill_grid(source, part);
  }
}

}  // namespace vq
