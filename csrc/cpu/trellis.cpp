// The weight encoders behind the C ABI: checks, scratch memory, and the order of the sweep. The
// loops over rows and states are in the tiers.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "dispatch.hpp"
#include "vqsweep.h"

namespace {

bool in_range(std::int64_t value, std::int64_t low, std::int64_t high) {
  return value >= low && value <= high;
}

bool all_finite(const float *values, std::int64_t count) {
  std::uint32_t bad = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    bad |= static_cast<std::uint32_t>((bits & 0x7f800000u) == 0x7f800000u);
  }
  return bad == 0;
}

std::int32_t check(const vq_sweep *sweep, const void *options, const void *codes) {
  if (sweep == nullptr || options == nullptr || codes == nullptr || sweep->columns == nullptr ||
      sweep->errors == nullptr || sweep->scales == nullptr || sweep->groups == nullptr) {
    return VQ_ERR_NULL;
  }
  if (!in_range(sweep->num_columns, 1, VQ_MAX_FEATURES) ||
      !in_range(sweep->num_rows, 1, VQ_MAX_FEATURES) ||
      (sweep->factor != nullptr && sweep->factor_stride < sweep->num_columns)) {
    return VQ_ERR_SHAPE;
  }
  const std::int64_t count = std::int64_t{sweep->num_columns} * sweep->num_rows;
  return all_finite(sweep->columns, count) ? VQ_OK : VQ_ERR_NONFINITE;
}

std::int32_t check(const vq_trellis *trellis) {
  if (trellis == nullptr || trellis->table == nullptr) {
    return VQ_ERR_NULL;
  }
  const bool fits =
      in_range(trellis->bits, 1, VQ_TRELLIS_MAX_BITS) &&
      in_range(trellis->state_bits, VQ_TRELLIS_MIN_STATE_BITS, VQ_TRELLIS_MAX_STATE_BITS) &&
      in_range(trellis->multiplier, 1, (std::int64_t{1} << trellis->state_bits) - 1) &&
      trellis->multiplier % 2 == 1 && trellis->reserved == 0;
  return fits ? VQ_OK : VQ_ERR_SHAPE;
}

std::int64_t stream_bytes(const vq_trellis &trellis, std::int32_t num_rows) {
  return (std::int64_t{num_rows} * trellis.bits + 7) / 8;
}

std::int8_t level_of(const vq_trellis &trellis, std::uint32_t state) {
  const std::uint32_t mask = (1u << trellis.state_bits) - 1;
  const std::uint32_t hash = (state * static_cast<std::uint32_t>(trellis.multiplier)) & mask;
  return trellis.table[hash >> (trellis.state_bits - 8)];
}

// Feedback inside the block of columns; what comes after the block is the caller's matrix product.
void feed_back(const vq_sweep &sweep, std::int32_t column, const float *values) {
  const std::int64_t rows = sweep.num_rows;
  const float *current = sweep.columns + column * rows;
  float *errors = sweep.errors + column * rows;
  const float *factor =
      sweep.factor == nullptr ? nullptr : sweep.factor + column * sweep.factor_stride;
  const float divisor = factor == nullptr ? 1.0f : factor[column];
  for (std::int64_t r = 0; r < rows; ++r) {
    errors[r] = (current[r] - values[r]) / divisor;
  }
  for (std::int32_t later = column + 1; factor != nullptr && later < sweep.num_columns; ++later) {
    vq::sweep_ops().subtract(factor[later], errors, sweep.columns + later * rows, sweep.num_rows);
  }
}

// Scales of one column, with its own factor if there is one.
class ColumnScales {
 public:
  explicit ColumnScales(const vq_sweep &sweep)
      : sweep_(sweep), scaled_(static_cast<std::size_t>(sweep.num_rows)) {}

  const float *of(std::int32_t column) {
    const float *scales =
        sweep_.scales + std::int64_t{sweep_.groups[column]} * sweep_.num_rows;
    if (sweep_.column_scales == nullptr) {
      return scales;
    }
    for (std::size_t r = 0; r < scaled_.size(); ++r) {
      scaled_[r] = scales[r] * sweep_.column_scales[column];
    }
    return scaled_.data();
  }

 private:
  const vq_sweep &sweep_;
  std::vector<float> scaled_;
};

std::uint32_t reversed(std::uint32_t value, std::int32_t num_bits) {
  std::uint32_t out = 0;
  for (std::int32_t i = 0; i < num_bits; ++i) {
    out |= ((value >> i) & 1u) << (num_bits - 1 - i);
  }
  return out;
}

// Quantizes columns by the best path through the trellis.
class TrellisEncoder {
 public:
  TrellisEncoder(const vq_trellis &trellis, std::int32_t num_rows)
      : trellis_(trellis),
        levels_(std::size_t{1} << trellis.state_bits),
        costs_(2 * levels_.size()),
        path_(static_cast<std::size_t>(num_rows)) {
    for (std::size_t state = 0; state < levels_.size(); ++state) {
      levels_[state] = static_cast<float>(
          level_of(trellis, reversed(static_cast<std::uint32_t>(state), trellis.state_bits)));
    }
    job_.levels = levels_.data();
    job_.costs = costs_.data();
    job_.path = path_.data();
    job_.num_rows = num_rows;
    job_.bits = trellis.bits;
    job_.state_bits = trellis.state_bits;
    winners_.resize(static_cast<std::size_t>(job_.winners_per_row() * num_rows));
    job_.winners = winners_.data();
  }

  // The best states from `start` on.
  void search(const float *targets, const float *scales, std::uint16_t start,
              std::uint16_t *states) {
    job_.targets = targets;
    job_.scales = scales;
    job_.start = static_cast<std::uint16_t>(reversed(start, trellis_.state_bits));
    vq::sweep_ops().viterbi(job_);
    for (std::int32_t row = 0; row < job_.num_rows; ++row) {
      states[row] = static_cast<std::uint16_t>(reversed(path_[row], trellis_.state_bits));
    }
  }

  // values: what the stream in `codes` means.
  void encode(const float *targets, const float *scales, float *values, std::uint8_t *codes) {
    job_.targets = targets;
    job_.scales = scales;
    vq::sweep_ops().viterbi(job_);
    for (std::int32_t row = 0; row < job_.num_rows; ++row) {
      values[row] = scales[row] * levels_[path_[row]];
    }
    pack(codes);
  }

 private:
  void pack(std::uint8_t *codes) const {
    std::memset(codes, 0, static_cast<std::size_t>(stream_bytes(trellis_, job_.num_rows)));
    for (std::int32_t row = 0; row < job_.num_rows; ++row) {
      // The newest symbol is the low bits of the reversed state, its first bit the highest.
      const std::uint32_t symbol = reversed(path_[row], trellis_.bits);
      const std::int64_t bit = std::int64_t{row} * trellis_.bits;
      const std::uint32_t shifted = symbol << (bit % 8);
      codes[bit / 8] = static_cast<std::uint8_t>(codes[bit / 8] | shifted);
      if (shifted > 0xff) {
        codes[bit / 8 + 1] = static_cast<std::uint8_t>(shifted >> 8);
      }
    }
  }

  vq_trellis trellis_;
  std::vector<float> levels_;
  std::vector<float> costs_;
  std::vector<std::uint16_t> winners_;
  std::vector<std::uint16_t> path_;
  vq::ViterbiJob job_{};
};

void sweep_trellis(const vq_sweep &sweep, const vq_trellis &trellis, std::uint8_t *codes) {
  TrellisEncoder encoder(trellis, sweep.num_rows);
  ColumnScales scales(sweep);
  std::vector<float> values(static_cast<std::size_t>(sweep.num_rows));
  const std::int64_t bytes = stream_bytes(trellis, sweep.num_rows);
  for (std::int32_t column = 0; column < sweep.num_columns; ++column) {
    const float *targets = sweep.columns + std::int64_t{column} * sweep.num_rows;
    encoder.encode(targets, scales.of(column), values.data(), codes + column * bytes);
    feed_back(sweep, column, values.data());
  }
}

void sweep_grid(const vq_sweep &sweep, const std::uint8_t *zeros, std::int32_t max_code,
                std::uint8_t *codes) {
  ColumnScales scales(sweep);
  std::vector<float> values(static_cast<std::size_t>(sweep.num_rows));
  for (std::int32_t column = 0; column < sweep.num_columns; ++column) {
    const std::int64_t start = std::int64_t{column} * sweep.num_rows;
    const std::int64_t group = std::int64_t{sweep.groups[column]} * sweep.num_rows;
    vq::sweep_ops().round_to_grid({sweep.columns + start, scales.of(column), zeros + group,
                                   values.data(), codes + start, sweep.num_rows,
                                   static_cast<float>(max_code)});
    feed_back(sweep, column, values.data());
  }
}

void decode_stream(const vq_trellis &trellis, const std::int8_t *levels, const std::uint8_t *codes,
                   std::int32_t num_rows, std::int8_t *out) {
  std::uint64_t ahead = 0;  // bits not yet read, lowest first
  std::int32_t num_ahead = 0;
  std::uint32_t state = 0;
  const std::uint32_t symbol_mask = (1u << trellis.bits) - 1;
  const std::int32_t shift = trellis.state_bits - trellis.bits;
  for (std::int32_t row = 0; row < num_rows; ++row) {
    if (num_ahead < trellis.bits) {
      ahead |= std::uint64_t{*codes++} << num_ahead;
      num_ahead += 8;
    }
    state = (state >> trellis.bits) | ((static_cast<std::uint32_t>(ahead) & symbol_mask) << shift);
    ahead >>= trellis.bits;
    num_ahead -= trellis.bits;
    out[row] = levels[state];
  }
}

}  // namespace

std::int32_t vq_sweep_trellis(const vq_sweep *sweep, const vq_trellis *trellis,
                              std::uint8_t *codes) {
  std::int32_t status = check(trellis);
  status = status == VQ_OK ? check(sweep, trellis, codes) : status;
  if (status != VQ_OK) {
    return status;
  }
  try {
    sweep_trellis(*sweep, *trellis, codes);
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}

std::int32_t vq_sweep_grid(const vq_sweep *sweep, const std::uint8_t *zeros, std::int32_t max_code,
                           std::uint8_t *codes) {
  const std::int32_t status = check(sweep, zeros, codes);
  if (status != VQ_OK) {
    return status;
  }
  if (!in_range(max_code, 1, 255)) {
    return VQ_ERR_SHAPE;
  }
  try {
    sweep_grid(*sweep, zeros, max_code, codes);
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}

std::int32_t vq_trellis_search(const vq_trellis *trellis, const float *targets,
                               const float *scales, const std::uint16_t *starts,
                               std::int32_t num_streams, std::int32_t length,
                               std::uint16_t *states) {
  const std::int32_t status = check(trellis);
  if (status != VQ_OK) {
    return status;
  }
  if (targets == nullptr || scales == nullptr || starts == nullptr || states == nullptr) {
    return VQ_ERR_NULL;
  }
  if (!in_range(num_streams, 1, VQ_MAX_FEATURES) || !in_range(length, 1, VQ_MAX_FEATURES)) {
    return VQ_ERR_SHAPE;
  }
  if (!all_finite(targets, std::int64_t{num_streams} * length)) {
    return VQ_ERR_NONFINITE;
  }
  const std::uint32_t last = (1u << trellis->state_bits) - 1;
  if (std::any_of(starts, starts + num_streams, [&](std::uint16_t s) { return s > last; })) {
    return VQ_ERR_SHAPE;
  }
  try {
    TrellisEncoder encoder(*trellis, length);
    for (std::int64_t stream = 0; stream < num_streams; ++stream) {
      const std::int64_t at = stream * length;
      encoder.search(targets + at, scales + at, starts[stream], states + at);
    }
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}

std::int32_t vq_trellis_decode(const vq_trellis *trellis, const std::uint8_t *codes,
                               std::int32_t num_columns, std::int32_t num_rows,
                               std::int8_t *levels) {
  const std::int32_t status = check(trellis);
  if (status != VQ_OK) {
    return status;
  }
  if (codes == nullptr || levels == nullptr) {
    return VQ_ERR_NULL;
  }
  if (!in_range(num_columns, 1, VQ_MAX_FEATURES) || !in_range(num_rows, 1, VQ_MAX_FEATURES)) {
    return VQ_ERR_SHAPE;
  }
  try {
    std::vector<std::int8_t> level_by_state(std::size_t{1} << trellis->state_bits);
    for (std::size_t state = 0; state < level_by_state.size(); ++state) {
      level_by_state[state] = level_of(*trellis, static_cast<std::uint32_t>(state));
    }
    const std::int64_t bytes = stream_bytes(*trellis, num_rows);
    for (std::int64_t column = 0; column < num_columns; ++column) {
      decode_stream(*trellis, level_by_state.data(), codes + column * bytes, num_rows,
                    levels + column * num_rows);
    }
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}
