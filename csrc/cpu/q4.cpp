// The q4 entry points: argument checks, repacking, and the split of a GEMV over threads.
#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

#include "dispatch.hpp"
#include "pool.hpp"
#include "vqkernels.h"

namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

std::uint32_t nibble(const std::int32_t *words, std::int64_t word, std::int64_t index) {
  return (static_cast<std::uint32_t>(words[word]) >> (4 * index)) & 15u;
}

// One 64-byte chunk: columns 8 * chunk .. + 7 of the `count` valid outputs of a panel.
void pack_chunk(const std::int32_t *qweight_row, std::int64_t count, std::uint8_t *chunk) {
  std::fill_n(chunk, VQ_Q4_CHUNK_BYTES, std::uint8_t{0});
  for (std::int64_t r = 0; r < count; ++r) {
    for (std::int64_t j = 0; j < 4; ++j) {
      const std::uint32_t low = nibble(qweight_row, r, j);
      const std::uint32_t high = nibble(qweight_row, r, j + 4);
      chunk[4 * r + j] = static_cast<std::uint8_t>(low | (high << 4));
    }
  }
}

void pack_group_parameters(const vq_gptq_q4 &source, std::int64_t panel, std::int64_t group,
                           float *scales, std::uint8_t *zeros) {
  const std::int64_t words_per_row = ceil_div(source.out_features, 8);
  for (std::int64_t r = 0; r < VQ_Q4_PANEL; ++r) {
    const std::int64_t n = panel * VQ_Q4_PANEL + r;
    const bool is_output = n < source.out_features;
    scales[r] = is_output ? source.scales[group * source.out_features + n] : 0.0f;
    if (zeros == nullptr) {
      continue;
    }
    std::uint32_t zero = VQ_Q4_SYMMETRIC_ZERO;
    if (is_output && source.qzeros != nullptr) {
      const std::uint32_t stored = nibble(source.qzeros, group * words_per_row + n / 8, n % 8);
      zero = (stored + static_cast<std::uint32_t>(source.zero_offset)) & 15u;
    }
    zeros[r] = static_cast<std::uint8_t>(zero);
  }
}

void pack_panel(const vq_gptq_q4 &source, const vq_q4_sizes &sizes, std::int64_t panel,
                std::uint8_t *codes) {
  const std::int64_t chunks = source.in_features / VQ_Q4_CHUNK;
  const std::int64_t first = panel * VQ_Q4_PANEL;
  const std::int64_t count = std::min<std::int64_t>(VQ_Q4_PANEL, source.out_features - first);
  std::uint8_t *out = codes + panel * (sizes.codes_bytes / sizes.num_panels);
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    pack_chunk(source.qweight + chunk * source.out_features + first, count,
               out + chunk * VQ_Q4_CHUNK_BYTES);
  }
}

// Quantized activations of one call. Kept per thread: a decode step makes hundreds of calls.
struct Scratch {
  std::vector<std::int8_t> q;
  std::vector<float> scales;
  std::vector<std::int32_t> sums;
};

std::int32_t quantize_rows(const vq_q4_matrix &m, std::int64_t num_groups, const float *x,
                           std::int32_t batch, Scratch &scratch) {
  scratch.q.resize(static_cast<std::size_t>(std::int64_t{batch} * m.in_features));
  scratch.scales.resize(static_cast<std::size_t>(batch * num_groups));
  scratch.sums.resize(static_cast<std::size_t>(batch * num_groups));
  for (std::int64_t row = 0; row < batch; ++row) {
    const std::int32_t status = vq_q8_quantize(x + row * m.in_features, m.in_features, m.group_size,
                                               scratch.q.data() + row * m.in_features,
                                               scratch.scales.data() + row * num_groups,
                                               scratch.sums.data() + row * num_groups);
    if (status != VQ_OK) {
      return status;
    }
  }
  return VQ_OK;
}

struct SplitContext {
  const vq::Q4Job *job;
  vq::Q4PanelsFn panels;
  std::int64_t num_panels;
};

void run_part(void *context, std::int32_t index, std::int32_t count) {
  const auto *split = static_cast<const SplitContext *>(context);
  const std::int64_t begin = split->num_panels * index / count;
  const std::int64_t end = split->num_panels * (index + 1) / count;
  split->panels(*split->job, static_cast<std::int32_t>(begin), static_cast<std::int32_t>(end));
}

std::int32_t check_gemv(const vq_q4_matrix *matrix, const float *x, std::int32_t batch,
                        const float *y, const vq_pool *pool) {
  if (matrix == nullptr || x == nullptr || y == nullptr || matrix->codes == nullptr ||
      matrix->scales == nullptr) {
    return VQ_ERR_NULL;
  }
  if (batch < 1 || batch > VQ_MAX_FEATURES || matrix->reserved != 0) {
    return VQ_ERR_SHAPE;
  }
  return pool != nullptr && !pool->owned_by_this_process() ? VQ_ERR_FORKED : VQ_OK;
}

}  // namespace

std::int32_t vq_abi_version(void) {
  return VQ_ABI_VERSION;
}

const char *vq_status_text(std::int32_t status) {
  switch (status) {
    case VQ_OK:
      return "ok";
    case VQ_ERR_NULL:
      return "a required pointer is NULL";
    case VQ_ERR_SHAPE:
      return "a size is out of range or not a multiple of 8";
    case VQ_ERR_ISA:
      return "this build or this CPU cannot run the instruction-set tier";
    case VQ_ERR_NONFINITE:
      return "an activation is NaN or infinite";
    case VQ_ERR_MEMORY:
      return "memory or threads could not be allocated";
    case VQ_ERR_FORKED:
      return "the thread pool was created before a fork; create it in the child process";
    case VQ_ERR_ZERO_OFFSET:
      return "zero_offset must be 0 (gptq_v2) or 1 (gptq)";
    default:
      return "unknown status";
  }
}

std::int32_t vq_q4_get_sizes(std::int32_t in_features, std::int32_t out_features,
                             std::int32_t group_size, vq_q4_sizes *sizes) {
  if (sizes == nullptr) {
    return VQ_ERR_NULL;
  }
  const bool in_range = in_features >= 1 && in_features <= VQ_MAX_FEATURES && out_features >= 1 &&
                        out_features <= VQ_MAX_FEATURES && group_size >= 1 &&
                        group_size <= VQ_Q4_MAX_GROUP;
  if (!in_range || in_features % VQ_Q4_CHUNK != 0 || group_size % VQ_Q4_CHUNK != 0) {
    return VQ_ERR_SHAPE;
  }
  sizes->num_groups = ceil_div(in_features, group_size);
  sizes->num_panels = ceil_div(out_features, VQ_Q4_PANEL);
  sizes->codes_bytes = sizes->num_panels * (in_features / VQ_Q4_CHUNK) * VQ_Q4_CHUNK_BYTES;
  sizes->num_scales = sizes->num_panels * sizes->num_groups * VQ_Q4_PANEL;
  return VQ_OK;
}

std::int32_t vq_q4_pack_gptq(const vq_gptq_q4 *source, std::uint8_t *codes, float *scales,
                             std::uint8_t *zeros) {
  if (source == nullptr || source->qweight == nullptr || source->scales == nullptr ||
      codes == nullptr || scales == nullptr || (source->qzeros != nullptr && zeros == nullptr)) {
    return VQ_ERR_NULL;
  }
  if (source->zero_offset != 0 && source->zero_offset != 1) {
    return VQ_ERR_ZERO_OFFSET;
  }
  vq_q4_sizes sizes;
  const std::int32_t status =
      vq_q4_get_sizes(source->in_features, source->out_features, source->group_size, &sizes);
  if (status != VQ_OK) {
    return status;
  }
  for (std::int64_t panel = 0; panel < sizes.num_panels; ++panel) {
    pack_panel(*source, sizes, panel, codes);
    for (std::int64_t group = 0; group < sizes.num_groups; ++group) {
      const std::int64_t at = (panel * sizes.num_groups + group) * VQ_Q4_PANEL;
      pack_group_parameters(*source, panel, group, scales + at,
                            zeros != nullptr ? zeros + at : nullptr);
    }
  }
  return VQ_OK;
}

std::int32_t vq_q4_gemv(const vq_q4_matrix *matrix, const float *x, std::int32_t batch, float *y,
                        vq_pool *pool) {
  std::int32_t status = check_gemv(matrix, x, batch, y, pool);
  vq_q4_sizes sizes;
  if (status == VQ_OK) {
    status = vq_q4_get_sizes(matrix->in_features, matrix->out_features, matrix->group_size, &sizes);
  }
  if (status != VQ_OK) {
    return status;
  }
  static thread_local Scratch scratch;
  try {
    status = quantize_rows(*matrix, sizes.num_groups, x, batch, scratch);
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  if (status != VQ_OK) {
    return status;
  }
  const vq::Q4Job job{matrix,
                      scratch.q.data(),
                      scratch.scales.data(),
                      scratch.sums.data(),
                      y,
                      batch,
                      static_cast<std::int32_t>(sizes.num_groups)};
  SplitContext split{&job, vq::q4_panels(), sizes.num_panels};
  if (pool == nullptr || pool->num_threads() == 1) {
    run_part(&split, 0, 1);
  } else {
    pool->run(run_part, &split);
  }
  return VQ_OK;
}
