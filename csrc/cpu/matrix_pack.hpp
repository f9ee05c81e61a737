// From the tensors of a checkpoint to the packed layouts of matrix_kernels.hpp.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "matrix_kernels.hpp"

namespace vq {

// VQ_OK, or what is wrong with the numbers and pointers of a part. With is_packed, the arrays that
// packing alone reads may be missing.
std::int32_t check_part(const vq_matrix_part &source, bool is_packed);

// A part and the small tables that belong to it; `part` points into `plan` and the packed memory.
struct PackedPart {
  MatrixPart part{};
  std::unique_ptr<TcqPlan> plan;
};

// Bytes that place_part takes from packed memory, a multiple of 64.
std::int64_t packed_bytes(const vq_matrix_part &source);

// Fills in the description of the part at `memory`; writes nothing there.
void place_part(const vq_matrix_part &source, std::uint8_t *memory, PackedPart &packed);

// Writes the packed memory of a placed part.
void fill_part(const vq_matrix_part &source, std::uint8_t *memory, const PackedPart &packed);

}  // namespace vq
