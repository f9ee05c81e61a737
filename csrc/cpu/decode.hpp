// A decoder: its weights by address, its paged cache, the scratch of one step, and the plan that
// the threads of a step follow. Knows the interface of packed matrices (matrix.hpp), no format.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "decode_kernels.hpp"
#include "matrix.hpp"
#include "vqdecoder.h"

namespace vq {

// The operations of the current tier.
const DecodeOps &decode_ops();

// Zeroed memory on 64-byte boundaries, in huge pages where the system has them. Untouched pages of
// it cost nothing.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t num_bytes);  // throws std::bad_alloc
  ~Buffer();
  Buffer(Buffer &&other) noexcept;
  Buffer &operator=(Buffer &&other) noexcept;
  Buffer(const Buffer &) = delete;
  Buffer &operator=(const Buffer &) = delete;

  std::uint8_t *bytes() const { return data_; }
  float *floats() const { return reinterpret_cast<float *>(data_); }

 private:
  std::uint8_t *data_ = nullptr;
  std::size_t num_bytes_ = 0;
};

// All threads of a step meet here between two phases. Spins, then lets other threads run.
class Barrier {
 public:
  void wait(std::int32_t num_threads);

 private:
  alignas(64) std::atomic<std::int32_t> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> generation_{0};
};

// One token of a pass.
struct Row {
  std::int32_t token;
  std::int32_t position;
  std::int32_t chunk;
};

// Rows [first, last) of a pass that belong to one chunk.
struct Span {
  std::int32_t chunk;
  std::int32_t first;
  std::int32_t last;
};

// A projection with what a step needs to know of it.
struct Projection {
  const vq_matrix *parts[VQ_MAX_PARTS];
  MatrixShape shapes[VQ_MAX_PARTS];
  std::int64_t offsets[VQ_MAX_PARTS];  // of the outputs in a row
  std::int32_t num_parts;
  std::int32_t num_inputs;  // sets of quantized activations: 1 unless a part has a transform
};

struct Layer {
  const float *input_norm;
  const float *post_attention_norm;
  Projection qkv, output, gate_up, down;
  std::int32_t sliding_window;
};

// Quantized rows of one input, for the whole pass or (one row) for one thread.
struct ActivationSet {
  ActivationBuffers buffers;
  Buffer memory;
};

// Where a thread works when a pass has one row: everything is computed by every thread for itself,
// which is cheaper than meeting.
struct ThreadScratch {
  Buffer memory;
  float *residual;  // [hidden]
  float *normed;    // [widest input]
  float *rotated;   // [widest input]
  float *space;     // [widest input]
  float *scores;    // of attention
};

}  // namespace vq

struct vq_decoder {
 public:
  vq_decoder(const vq_decoder_config &config, const vq_decoder_weights &weights);

  static std::int32_t check(const vq_decoder_config &config, const vq_decoder_weights &weights);
  std::int32_t check_batch(const vq_decode_batch &batch, std::int32_t num_threads) const;
  std::int32_t step(const vq_decode_batch &batch, vq_pool *pool);
  void copy_page(std::int32_t source, std::int32_t target);
  void take_profile(vq_decoder_profile &taken);

  const vq_decoder_config config;
  vq_decoder_profile profile{};
  std::int64_t page_bytes = 0;

 private:
  struct Part;  // one thread's view of a pass
  struct Cursor {
    std::int32_t chunk;
    std::int32_t token;  // of the chunk, the next one to compute
  };
  static void run_part(void *context, std::int32_t index, std::int32_t count);

  void lay_out_cache();
  void load_layers(const vq_decoder_weights &weights);
  void reserve_scratch();
  const float *keep(const float *values, std::int64_t count);
  void plan_pass(const vq_decode_batch &batch, Cursor &cursor);

  vq_decoder_weights weights_;
  std::vector<vq::Buffer> kept_;
  std::vector<vq::Layer> layers_;
  vq::Projection head_{};
  const float *final_norm_ = nullptr;
  vq::KvLayout kv_{};
  std::int64_t head_bytes_ = 0;
  std::int64_t layer_bytes_ = 0;
  vq::Buffer cache_;

  // Scratch of a pass of several rows, [max_rows][...] each.
  std::int64_t hidden_stride_ = 0, inner_stride_ = 0, qkv_stride_ = 0, gate_stride_ = 0;
  std::int64_t context_stride_ = 0, scores_stride_ = 0, widest_ = 0;
  std::int64_t widest_columns_ = 0;  // of quantized activations
  float query_scale_ = 1.0f;
  bool is_profiling_ = false;
  vq::Buffer residual_, normed_, qkv_, context_, gate_up_, update_;
  std::vector<vq::ActivationSet> shared_;   // VQ_MAX_PARTS of max_rows rows
  std::vector<vq::ActivationSet> private_;  // per thread, one row
  std::vector<vq::ThreadScratch> threads_;

  // The current pass.
  const vq::DecodeOps *ops_ = nullptr;
  const vq_decode_batch *batch_ = nullptr;
  std::int64_t first_logit_ = 0;  // of the pass, in the caller's array
  std::vector<vq::Row> rows_;
  std::vector<vq::Span> spans_;
  std::vector<std::int32_t> logit_rows_;  // rows of the pass that want logits
  std::vector<float> largest_;            // by thread, of an estimated row
  vq::Barrier barrier_;
  std::atomic<std::int32_t> status_{VQ_OK};
};
