#include "lattice_codebook.hpp"

#include <algorithm>
#include <limits>

namespace vq {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Above this many codes the table of separations (64 MiB) is not kept; rows are made when needed.
constexpr std::int32_t kMaxTableCodes = 4096;
// Below the largest word, so that the bound on separations itself and its rounding fit.
constexpr float kMaxBound = 65000.0f;

std::int32_t round_up(std::int32_t count, std::int32_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// No two codes are farther apart than twice the farthest one from the mean; squared.
float widest_separation(const float *codes, std::int32_t num_codes, std::int32_t num_features) {
  std::vector<float> mean(static_cast<std::size_t>(num_features), 0.0f);
  for (std::int32_t j = 0; j < num_codes; ++j) {
    for (std::int32_t f = 0; f < num_features; ++f) {
      mean[f] += codes[static_cast<std::int64_t>(j) * num_features + f] /
                 static_cast<float>(num_codes);
    }
  }
  float widest = 0.0f;
  for (std::int32_t j = 0; j < num_codes; ++j) {
    float sum = 0.0f;
    for (std::int32_t f = 0; f < num_features; ++f) {
      const float difference = codes[static_cast<std::int64_t>(j) * num_features + f] - mean[f];
      sum += difference * difference;
    }
    widest = std::max(widest, sum);
  }
  return 4.0f * widest * 1.001f;
}

}  // namespace

LatticeCodebook::LatticeCodebook(const float *codes, std::int32_t num_codes,
                                 std::int32_t num_features, std::int32_t denominator,
                                 const LatticeOps &ops)
    : codes_(codes), num_codes_(num_codes), num_features_(num_features), denominator_(denominator),
      padded_(round_up(num_codes, kLanes)), stride_(round_up(num_codes, kWords)),
      share_(1.0f / static_cast<float>(denominator)), is_table_(num_codes <= kMaxTableCodes),
      ops_(ops), transposed_(static_cast<std::size_t>(num_features) * padded_, 0.0f) {
  for (std::int32_t j = 0; j < num_codes; ++j) {
    for (std::int32_t f = 0; f < num_features; ++f) {
      transposed_[static_cast<std::size_t>(f) * padded_ + j] = code(j)[f];
    }
  }
  if (!is_table_) {
    return;
  }
  rows_.reset(new float[static_cast<std::size_t>(num_codes) * padded_]);
  made_.assign(static_cast<std::size_t>(num_codes), 0);
  widest_ = widest_separation(codes, num_codes, num_features) * share_;
  const float quantum = widest_ / kMaxBound;
  // Neither quotients by it nor the quantum itself may leave the range of normal floats.
  if (quantum > 1e-30f && quantum < 1e30f) {
    quantum_ = quantum;
    bounds_.reset(new std::uint16_t[static_cast<std::size_t>(num_codes) * stride_]);
  }
}

void LatticeCodebook::make_all_rows() {
  for (std::int32_t i = 0; is_table_ && i < num_codes_; ++i) {
    row(i);
  }
}

const float *LatticeCodebook::row(std::int32_t i) {
  if (made_[i] == 0) {
    make_row(i);
  }
  return rows_.get() + static_cast<std::size_t>(i) * padded_;
}

const std::uint16_t *LatticeCodebook::bounds(std::int32_t i) {
  if (made_[i] == 0) {
    make_row(i);
  }
  return bounds_.get() + static_cast<std::size_t>(i) * stride_;
}

void LatticeCodebook::write_row(std::int32_t i, float *out) const {
  ops_.distances(code(i), transposed_.data(), num_features_, padded_, out);
  for (std::int32_t j = 0; j < num_codes_; ++j) {
    out[j] = out[j] > 0.0f ? out[j] * share_ : -kInfinity;
  }
}

void LatticeCodebook::make_row(std::int32_t i) {
  float *out = rows_.get() + static_cast<std::size_t>(i) * padded_;
  write_row(i, out);
  if (quantum_ > 0.0f) {
    std::uint16_t *bounds = bounds_.get() + static_cast<std::size_t>(i) * stride_;
    const float per_quantum = 1.0f / quantum_;
    for (std::int32_t j = 0; j < num_codes_; ++j) {
      const float ceiling = std::min(std::max(out[j] * per_quantum, 0.0f) + 1.0f, 65535.0f);
      bounds[j] = static_cast<std::uint16_t>(static_cast<std::int32_t>(ceiling));
    }
    std::fill(bounds + num_codes_, bounds + stride_, std::uint16_t{0});
  }
  made_[i] = 1;
}

float LatticeCodebook::between(std::int32_t i, std::int32_t j) const {
  if (is_table_ && made_[i] != 0) {
    return rows_[static_cast<std::size_t>(i) * padded_ + j];
  }
  const float *a = code(i);
  const float *b = code(j);
  float sum = 0.0f;
  for (std::int32_t f = 0; f < num_features_; ++f) {
    const float difference = a[f] - b[f];
    sum = sum + difference * difference;
  }
  return sum > 0.0f ? sum * share_ : -kInfinity;
}

}  // namespace vq
