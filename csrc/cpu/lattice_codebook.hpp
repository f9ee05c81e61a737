// A codebook made ready for the lattice search: transposed, and with the table of squared distances
// between its codes, both as floats and as 16-bit upper bounds that rule rows out quickly.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "lattice_kernels.hpp"

namespace vq {

class LatticeCodebook {
 public:
  // Keeps `codes` [num_codes][num_features], which must outlive it.
  LatticeCodebook(const float *codes, std::int32_t num_codes, std::int32_t num_features,
                  std::int32_t denominator, const LatticeOps &ops);

  // Rows of the table are made when first asked for; after this call reading changes nothing, so
  // that threads may share the codebook.
  void make_all_rows();

  bool has_table() const { return is_table_; }
  std::int32_t num_codes() const { return num_codes_; }
  std::int32_t num_features() const { return num_features_; }
  std::int32_t denominator() const { return denominator_; }
  std::int32_t padded() const { return padded_; }
  std::int32_t stride() const { return stride_; }
  const float *transposed() const { return transposed_.data(); }

  // Row of code i, [padded]: |c_i - c_j|^2 / n, -inf for j = i and for copies of c_i. With a table.
  const float *row(std::int32_t i);

  // The same row into `out`, table or not.
  void write_row(std::int32_t i, float *out) const;

  // One entry, by the same operations in the same order.
  float between(std::int32_t i, std::int32_t j) const;

  // What the 16-bit bounds count in; 0 where there are none.
  float quantum() const { return quantum_; }
  // No entry of the table is above it. With a quantum.
  float widest() const { return widest_; }

  // No entry of row i, [stride], is below row(i)[j] / quantum() - 1. With a quantum.
  const std::uint16_t *bounds(std::int32_t i);

 private:
  const float *code(std::int32_t i) const {
    return codes_ + static_cast<std::int64_t>(i) * num_features_;
  }
  void make_row(std::int32_t i);

  const float *codes_;
  std::int32_t num_codes_;
  std::int32_t num_features_;
  std::int32_t denominator_;
  std::int32_t padded_;
  std::int32_t stride_;
  float share_;
  bool is_table_;
  float quantum_ = 0.0f;
  float widest_ = 0.0f;
  const LatticeOps &ops_;
  std::vector<float> transposed_;
  // Not cleared: pages of rows that nobody asks for stay unused.
  std::unique_ptr<float[]> rows_;
  std::unique_ptr<std::uint16_t[]> bounds_;
  std::vector<std::uint8_t> made_;
};

}  // namespace vq
