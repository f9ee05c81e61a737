// One step: rows of all chunks in passes of at most max_rows, every pass through all layers by all
// threads together, with a barrier after each phase and none inside.
//
// Phases of a layer: q/k/v; rotary embedding and cache writes; attention; output projection;
// gate/up; down. What stands before a matrix (residual sum, norm, activation function, rotation,
// quantization) belongs to its phase: in a pass of one row every thread does it for itself, which
// costs less than meeting once more; in a larger one threads share the rows out and meet.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "decode.hpp"
#include "pool.hpp"

namespace vq {
namespace {

// Spinning this long covers any difference between threads that all run; more of it means that one
// does not, and needs the core.
constexpr int kSpinsBeforeYield = 4000;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

std::int64_t now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

float widen_half(std::uint16_t half) {
  const std::uint32_t bits = (half & 0x7fffu) << 13;
  float magnitude;
  std::memcpy(&magnitude, &bits, sizeof magnitude);
  magnitude *= 0x1p112f;
  return (half & 0x8000u) != 0 ? -magnitude : magnitude;
}

float widen_bfloat(std::uint16_t half) {
  const std::uint32_t bits = std::uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Stored>
const Stored *table_row(const vq_decoder_weights &weights, std::int64_t token, std::int32_t count) {
  return static_cast<const Stored *>(weights.embedding) + token * count;
}

// Row `token` of the embedding as float32.
void read_embedding(const vq_decoder_weights &weights, std::int64_t token, std::int32_t count,
                    float *row) {
  switch (weights.embedding_type) {
    case VQ_FLOAT16:
      std::transform(table_row<std::uint16_t>(weights, token, count),
                     table_row<std::uint16_t>(weights, token + 1, count), row, widen_half);
      return;
    case VQ_BFLOAT16:
      std::transform(table_row<std::uint16_t>(weights, token, count),
                     table_row<std::uint16_t>(weights, token + 1, count), row, widen_bfloat);
      return;
    case VQ_INT8: {
      const float scale = weights.embedding_scales[token];
      const auto scaled = [scale](std::int8_t code) { return static_cast<float>(code) * scale; };
      std::transform(table_row<std::int8_t>(weights, token, count),
                     table_row<std::int8_t>(weights, token + 1, count), row, scaled);
      return;
    }
    default:
      std::copy_n(table_row<float>(weights, token, count), count, row);
  }
}

// Element i turns with element i + half.
void rotate_pairs(float *head, const float *cosines, const float *sines, std::int32_t half) {
  for (std::int32_t i = 0; i < half; ++i) {
    const float first = head[i];
    const float second = head[i + half];
    head[i] = first * cosines[i] - second * sines[i];
    head[i + half] = second * cosines[i] + first * sines[i];
  }
}

}  // namespace

const DecodeOps &decode_ops() {
  [[maybe_unused]] const std::int32_t isa = vq_get_isa();
#if defined(VQ_HAVE_AVX512_VNNI)
  if (isa >= VQ_ISA_AVX512_VNNI) return decode_ops_avx512_vnni;
#endif
#if defined(VQ_HAVE_AVX2)
  if (isa >= VQ_ISA_AVX2) return decode_ops_avx2;
#endif
  return decode_ops_baseline;
}

void Barrier::wait(std::int32_t num_threads) {
  if (num_threads == 1) return;
  const std::uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; generation_.load(std::memory_order_acquire) == generation; ++spin) {
    if (spin < kSpinsBeforeYield) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace vq

std::int32_t vq_decoder::check_batch(const vq_decode_batch &batch, std::int32_t num_threads) const {
  if (num_threads > config.num_threads) return VQ_ERR_SHAPE;
  if (batch.num_chunks < 1 || batch.num_chunks > (1 << 20)) return VQ_ERR_SHAPE;
  if (batch.token_ids == nullptr || batch.token_offsets == nullptr || batch.pages == nullptr ||
      batch.page_offsets == nullptr || batch.starts == nullptr || batch.num_logits == nullptr ||
      (batch.logits == nullptr && batch.num_logit_rows != 0)) {
    return VQ_ERR_NULL;
  }
  if (batch.token_offsets[0] != 0 || batch.page_offsets[0] != 0) return VQ_ERR_SHAPE;
  std::int64_t logit_rows = 0;
  for (std::int32_t i = 0; i < batch.num_chunks; ++i) {
    const std::int64_t tokens = std::int64_t{batch.token_offsets[i + 1]} - batch.token_offsets[i];
    const std::int64_t pages = std::int64_t{batch.page_offsets[i + 1]} - batch.page_offsets[i];
    const std::int32_t largest_of = batch.largest_of == nullptr ? 0 : batch.largest_of[i];
    if (tokens < 1 || pages < 1 || batch.num_logits[i] < 0 || batch.num_logits[i] > tokens ||
        largest_of < 0 || largest_of > config.vocab_size) {
      return VQ_ERR_SHAPE;
    }
    const std::int64_t stop = batch.starts[i] + tokens;
    if (batch.starts[i] < 0 || stop > config.num_positions || stop > pages * config.page_size) {
      return VQ_ERR_RANGE;
    }
    logit_rows += batch.num_logits[i];
  }
  if (logit_rows != batch.num_logit_rows) return VQ_ERR_SHAPE;
  const auto beyond = [](std::int32_t limit) {
    return [limit](std::int32_t value) { return value < 0 || value >= limit; };
  };
  const std::int32_t *tokens_end = batch.token_ids + batch.token_offsets[batch.num_chunks];
  const std::int32_t *pages_end = batch.pages + batch.page_offsets[batch.num_chunks];
  const bool bad = std::any_of(batch.token_ids, tokens_end, beyond(config.vocab_size)) ||
                   std::any_of(batch.pages, pages_end, beyond(config.num_pages));
  if (bad) return VQ_ERR_RANGE;
  return VQ_OK;
}

// Fills rows_, spans_ and logit_rows_ from the cursor on, and moves the cursor.
void vq_decoder::plan_pass(const vq_decode_batch &batch, Cursor &cursor) {
  rows_.clear();
  spans_.clear();
  logit_rows_.clear();
  while (cursor.chunk < batch.num_chunks &&
         static_cast<std::int32_t>(rows_.size()) < config.max_rows) {
    const std::int32_t begin = batch.token_offsets[cursor.chunk];
    const std::int32_t tokens = batch.token_offsets[cursor.chunk + 1] - begin;
    const auto first = static_cast<std::int32_t>(rows_.size());
    const std::int32_t count = std::min(tokens - cursor.token, config.max_rows - first);
    spans_.push_back({cursor.chunk, first, first + count});
    for (std::int32_t i = cursor.token; i < cursor.token + count; ++i) {
      rows_.push_back({batch.token_ids[begin + i], batch.starts[cursor.chunk] + i, cursor.chunk});
      if (i >= tokens - batch.num_logits[cursor.chunk]) {
        logit_rows_.push_back(static_cast<std::int32_t>(rows_.size()) - 1);
      }
    }
    cursor.token += count;
    if (cursor.token == tokens) cursor = {cursor.chunk + 1, 0};
  }
}

// One thread's view of the current pass.
struct vq_decoder::Part {
  vq_decoder &decoder;
  const std::int32_t index;
  const std::int32_t count;
  const vq_decoder_config &config;
  const vq::DecodeOps &ops;
  vq::ThreadScratch &scratch;
  const std::int32_t num_rows;
  const bool is_alone;  // one row: every thread works for itself
  std::int64_t clock = 0;

  Part(vq_decoder &owner, std::int32_t part, std::int32_t parts)
      : decoder(owner),
        index(part),
        count(parts),
        config(owner.config),
        ops(*owner.ops_),
        scratch(owner.threads_[static_cast<std::size_t>(part)]),
        num_rows(static_cast<std::int32_t>(owner.rows_.size())),
        is_alone(num_rows == 1) {}

  void run() {
    if (times()) clock = vq::now();
    embed();
    end_phase(VQ_PHASE_EMBED, false);
    for (std::int32_t i = 0; i < config.num_layers; ++i) run_layer(i);
    run_head();
  }

 private:
  bool times() const { return index == 0 && decoder.is_profiling_; }

  void end_phase(vq_decoder_phase phase, bool meet = true) {
    if (meet) decoder.barrier_.wait(count);
    if (!times()) return;
    const std::int64_t end = vq::now();
    decoder.profile.nanoseconds[phase] += end - clock;
    clock = end;
  }

  std::int32_t split(std::int64_t items, std::int32_t part) const {
    return static_cast<std::int32_t>(items * part / count);
  }

  float *residual(std::int32_t row) const {
    return is_alone ? scratch.residual : decoder.residual_.floats() + row * decoder.hidden_stride_;
  }

  // A row is always prepared by the same thread, so nobody waits for this.
  void embed() {
    const std::int32_t begin = is_alone ? 0 : split(num_rows, index);
    const std::int32_t end = is_alone ? 1 : split(num_rows, index + 1);
    const vq_rotation &rotation = decoder.weights_.residual;
    for (std::int32_t row = begin; row < end; ++row) {
      float *x = rotation.size == 0 ? residual(row) : scratch.rotated;
      vq::read_embedding(decoder.weights_, decoder.rows_[row].token, config.hidden_size, x);
      if (rotation.size != 0) ops.rotate(rotation, false, x, residual(row), scratch.space);
    }
  }

  void run_layer(std::int32_t i) {
    const vq::Layer &layer = decoder.layers_[static_cast<std::size_t>(i)];
    const vq_decoder &d = decoder;
    project(layer.qkv, num_rows, d.qkv_.floats(), d.qkv_stride_, [&](std::int32_t row, float *x) {
      if (i > 0) add_update(row);
      normalize(residual(row), layer.input_norm, x);
    });
    end_phase(VQ_PHASE_QKV);
    write_cache(i);
    end_phase(VQ_PHASE_CACHE);
    attend(i);
    end_phase(VQ_PHASE_ATTENTION);
    project(layer.output, num_rows, d.update_.floats(), d.hidden_stride_,
            [&](std::int32_t row, float *x) {
              std::memcpy(x, context(row), sizeof(float) * d.context_stride_);
            });
    end_phase(VQ_PHASE_OUTPUT);
    project(layer.gate_up, num_rows, d.gate_up_.floats(), d.gate_stride_,
            [&](std::int32_t row, float *x) {
              add_update(row);
              normalize(residual(row), layer.post_attention_norm, x);
            });
    end_phase(VQ_PHASE_GATE_UP);
    project(layer.down, num_rows, d.update_.floats(), d.hidden_stride_,
            [&](std::int32_t row, float *x) { activate(row, x); });
    end_phase(VQ_PHASE_DOWN);
  }

  void run_head() {
    const auto wanted = static_cast<std::int32_t>(decoder.logit_rows_.size());
    if (wanted == 0) return;
    const vq_rotation &rotation = decoder.weights_.residual;
    float *logits = decoder.batch_->logits + decoder.first_logit_ * config.vocab_size;
    float *outputs = is_estimating() ? nullptr : logits;
    // Rows change hands here: whoever prepares one may not be who embedded it. The last barrier
    // stands between.
    project(decoder.head_, wanted, outputs, config.vocab_size, [&](std::int32_t i, float *x) {
      const std::int32_t row = decoder.logit_rows_[static_cast<std::size_t>(i)];
      add_update(row);
      const float *hidden = residual(row);
      if (rotation.size != 0) {
        ops.rotate(rotation, true, hidden, scratch.rotated, scratch.space);
        hidden = scratch.rotated;
      }
      normalize(hidden, decoder.final_norm_, x);
    });
    if (is_estimating()) estimate_logits(logits, num_candidates());
    end_phase(VQ_PHASE_HEAD);
  }

  // Whether the logits of the pass but the largest are to be estimates. Not those of several tokens:
  // what each leaves in question takes longer to compute than the lower layer to read.
  bool is_estimating() const {
    const bool can = config.exact == 0 && decoder.head_.shapes[0].is_layered != 0 &&
                     decoder.logit_rows_.size() == 1 && decoder.batch_->largest_of != nullptr;
    return can && num_candidates() > 0;
  }

  // Of the only row of logits: how many may be the largest that is wanted.
  std::int32_t num_candidates() const {
    const auto row = static_cast<std::size_t>(decoder.logit_rows_[0]);
    return decoder.batch_->largest_of[decoder.rows_[row].chunk];
  }

  // Outputs in question stand close together, because low tokens are frequent ones: runs of panels
  // are dealt out in turn.
  void estimate_logits(float *logits, std::int32_t candidates) {
    const vq_matrix &head = *decoder.head_.parts[0];
    const vq::Activations x = inputs_of(decoder.head_, 0, 1);
    const std::int32_t begin = vq::split_begin(head, index, count);
    const std::int32_t end = vq::split_begin(head, index + 1, count);
    vq::multiply_upper(head, x, logits, begin, end);
    decoder.largest_[static_cast<std::size_t>(index)] =
        vq::try_largest(head, x, logits, begin, end, candidates);
    decoder.barrier_.wait(count);
    const float largest =
        *std::max_element(decoder.largest_.begin(), decoder.largest_.begin() + count);
    const std::int32_t panels = decoder.head_.shapes[0].num_panels;
    for (std::int32_t at = index * vq::kMaxCompleted; at < panels; at += count * vq::kMaxCompleted) {
      const std::int32_t stop = std::min(at + vq::kMaxCompleted, panels);
      vq::complete_panels(head, x, logits, at, stop, largest);
    }
  }

  void add_update(std::int32_t row) {
    ops.add(residual(row), decoder.update_.floats() + row * decoder.hidden_stride_,
            config.hidden_size);
  }

  void normalize(const float *x, const float *weight, float *y) {
    ops.rms_norm(x, weight, config.hidden_size, config.rms_norm_eps, y);
  }

  void activate(std::int32_t row, float *x) {
    const float *gate = decoder.gate_up_.floats() + row * decoder.gate_stride_;
    const vq_rotation &rotation = decoder.weights_.down;
    float *product = rotation.size == 0 ? x : scratch.rotated;
    ops.silu_multiply(gate, gate + config.intermediate_size, config.intermediate_size, product);
    if (rotation.size != 0) ops.rotate(rotation, false, product, x, scratch.space);
  }

  float *context(std::int32_t row) const {
    return decoder.context_.floats() + row * decoder.context_stride_;
  }

  // ---- Matrices ----

  // outputs[row] = prepared row times the projection, for `rows` rows. prepare(row, x) writes the
  // input of a row. Without outputs it ends with the input. Ends without a barrier.
  template <class Prepare>
  void project(const vq::Projection &projection, std::int32_t rows, float *outputs,
               std::int64_t stride, Prepare prepare) {
    if (is_alone) {
      prepare(0, scratch.normed);
    } else {
      const std::int32_t end = split(rows, index + 1);
      for (std::int32_t row = split(rows, index); row < end; ++row) {
        float *x = decoder.normed_.floats() + row * decoder.widest_;
        prepare(row, x);
        if (config.exact == 0) quantize_shared(projection, x, row);
      }
      decoder.barrier_.wait(count);
    }
    if (outputs == nullptr) {
      if (is_alone) quantize(projection, 0, scratch.normed, 0, buffers_of(projection, 0));
      return;
    }
    for (std::int32_t i = 0; i < projection.num_parts; ++i) {
      multiply(projection, i, rows, outputs + projection.offsets[i], stride);
    }
  }

  void quantize_shared(const vq::Projection &projection, const float *x, std::int32_t row) {
    for (std::int32_t i = 0; i < projection.num_inputs; ++i) {
      quantize(projection, i, x, row, decoder.shared_[static_cast<std::size_t>(i)].buffers);
    }
  }

  // Row `row` of the buffers from x, for part i.
  void quantize(const vq::Projection &projection, std::int32_t i, const float *x, std::int32_t row,
                const vq::ActivationBuffers &buffers) {
    const vq::MatrixShape &shape = projection.shapes[i];
    const vq_matrix &matrix = *projection.parts[i];
    if (ops.quantize == nullptr || shape.has_parts != 0) {
      note(vq::quantize_rows(matrix, x, decoder.widest_, row, 1, buffers));
      return;
    }
    const std::int32_t in = shape.in_features;
    const vq::ActivationBuffers own{buffers.q + std::int64_t{row} * vq::padded_columns(in),
                                    buffers.scales + std::int64_t{row} * vq::activation_groups(in),
                                    buffers.prefix + std::int64_t{row} * vq::prefix_length(in),
                                    nullptr};
    const float *arranged = vq::arrange_row(matrix, x, scratch.space, buffers.offsets + row);
    if (!ops.quantize(arranged, in, own)) note(VQ_ERR_NONFINITE);
  }

  void multiply(const vq::Projection &projection, std::int32_t i, std::int32_t rows, float *outputs,
                std::int64_t stride) {
    const vq_matrix &matrix = *projection.parts[i];
    const std::int32_t begin = vq::split_begin(matrix, index, count);
    const std::int32_t end = vq::split_begin(matrix, index + 1, count);
    if (config.exact != 0) {
      const float *x = is_alone ? scratch.normed : decoder.normed_.floats();
      note(
          vq::multiply_panels_exact(matrix, x, decoder.widest_, rows, outputs, stride, begin, end));
      return;
    }
    if (is_alone && (i == 0 || projection.num_inputs > 1)) {
      quantize(projection, i, scratch.normed, 0, buffers_of(projection, i));
    }
    vq::multiply_panels(matrix, inputs_of(projection, i, rows), outputs, stride, begin, end);
  }

  // Where the quantized input of part i lies.
  const vq::ActivationBuffers &buffers_of(const vq::Projection &projection, std::int32_t i) const {
    const bool shares = projection.num_inputs == 1;
    return is_alone ? decoder.private_[static_cast<std::size_t>(index)].buffers
                    : decoder.shared_[static_cast<std::size_t>(shares ? 0 : i)].buffers;
  }

  vq::Activations inputs_of(const vq::Projection &projection, std::int32_t i,
                            std::int32_t rows) const {
    const vq::ActivationBuffers &buffers = buffers_of(projection, i);
    const vq::MatrixShape &shape = projection.shapes[i];
    return {buffers.q,
            buffers.scales,
            buffers.prefix,
            shape.has_column_bias != 0 ? buffers.offsets : nullptr,
            rows,
            shape.columns};
  }

  void note(std::int32_t status) {
    if (status != VQ_OK) decoder.status_.store(status, std::memory_order_relaxed);
  }

  // ---- Attention ----

  void write_cache(std::int32_t layer) {
    const std::int32_t heads = config.num_heads + 2 * config.num_kv_heads;
    const std::int64_t items = std::int64_t{num_rows} * heads;
    const std::int32_t end = split(items, index + 1);
    for (std::int32_t item = split(items, index); item < end; ++item) {
      const std::int32_t row = item / heads;
      const std::int32_t head = item % heads;
      float *x = decoder.qkv_.floats() + row * decoder.qkv_stride_ + head * config.head_dim;
      finish_head(layer, row, head, x);
    }
  }

  void finish_head(std::int32_t layer, std::int32_t row, std::int32_t head, float *x) {
    const std::int32_t position = decoder.rows_[static_cast<std::size_t>(row)].position;
    const std::int32_t half = config.head_dim / 2;
    const std::int32_t key_head = head - config.num_heads;
    const std::int32_t value_head = key_head - config.num_kv_heads;
    if (value_head < 0) {
      const std::int64_t at = std::int64_t{position} * half;
      vq::rotate_pairs(x, decoder.weights_.cosines + at, decoder.weights_.sines + at, half);
    }
    if (key_head < 0) {
      for (std::int32_t i = 0; i < config.head_dim; ++i) x[i] *= decoder.query_scale_;
      return;
    }
    const bool is_value = value_head >= 0;
    std::uint8_t *block = cache_block(layer, row, is_value ? value_head : key_head, is_value);
    (is_value ? ops.store_value : ops.store_key)(decoder.kv_, x, position % vq::kKvBlock, block);
  }

  const std::int32_t *pages_of(std::int32_t chunk) const {
    return decoder.batch_->pages + decoder.batch_->page_offsets[chunk];
  }

  std::uint8_t *cache_of(std::int32_t layer, std::int32_t kv_head) const {
    return decoder.cache_.bytes() + layer * decoder.layer_bytes_ + kv_head * decoder.head_bytes_;
  }

  std::uint8_t *cache_block(std::int32_t layer, std::int32_t row, std::int32_t kv_head,
                            bool is_value) const {
    const vq::Row &at = decoder.rows_[static_cast<std::size_t>(row)];
    const vq::KvLayout &kv = decoder.kv_;
    const std::int32_t page = pages_of(at.chunk)[at.position / config.page_size];
    const std::int32_t block = at.position % config.page_size / vq::kKvBlock;
    const std::int64_t offset = is_value
                                    ? kv.blocks_per_page * kv.key_bytes + block * kv.value_bytes
                                    : block * kv.key_bytes;
    return cache_of(layer, kv_head) + page * kv.page_stride + offset;
  }

  // Queries of one key-value head in a span, in order of rows, go in jobs that share what they
  // load. Those of one row are cut into equal runs; else jobs are dealt out in turn, because
  // sequences differ in length and later rows cost more.
  void attend(std::int32_t layer) {
    const std::int32_t group = config.num_heads / config.num_kv_heads;
    const std::int64_t total = std::int64_t{num_rows} * config.num_heads;
    const bool deals = num_rows > 1;
    vq::AttendJob jobs[2];  // the current one and the one before, which waits to know it
    std::int32_t planned = 0;
    const std::int64_t begin = deals ? 0 : split(total, index);
    const std::int64_t end = deals ? total : split(total, index + 1);
    std::int64_t offset = 0;  // of the head's first query among all
    std::int64_t turn = 0;
    for (const vq::Span &span : decoder.spans_) {
      const std::int32_t queries = (span.last - span.first) * group;
      for (std::int32_t kv_head = 0; kv_head < config.num_kv_heads; ++kv_head, offset += queries) {
        const auto first = static_cast<std::int32_t>(std::max<std::int64_t>(begin - offset, 0));
        const auto last = static_cast<std::int32_t>(std::min<std::int64_t>(end - offset, queries));
        for (std::int32_t at = first; at < last; at += vq::kMaxQueries, ++turn) {
          if (deals && turn % count != index) continue;
          vq::AttendJob &job = jobs[planned % 2];
          job = plan_job(layer, span, kv_head, at, std::min(at + vq::kMaxQueries, last));
          if (planned++ > 0) attend_before(jobs[planned % 2], job);
        }
      }
    }
    if (planned > 0) ops.attend(jobs[(planned - 1) % 2]);
  }

  // Jobs of the same keys find them in the cache.
  void attend_before(vq::AttendJob &job, const vq::AttendJob &next) {
    const bool shares_keys = job.cache == next.cache && job.pages == next.pages;
    job.next = shares_keys ? nullptr : &next;
    ops.attend(job);
  }

  vq::AttendJob plan_job(std::int32_t layer, const vq::Span &span, std::int32_t kv_head,
                         std::int32_t first, std::int32_t last) const {
    const std::int32_t group = config.num_heads / config.num_kv_heads;
    vq::AttendJob job{};
    job.layout = &decoder.kv_;
    job.cache = cache_of(layer, kv_head);
    job.pages = pages_of(span.chunk);
    job.num_queries = last - first;
    job.scratch = scratch.scores;
    job.scratch_stride = decoder.scores_stride_;
    for (std::int32_t i = 0; i < job.num_queries; ++i) {
      const std::int32_t row = span.first + (first + i) / group;
      const std::int64_t head = kv_head * group + (first + i) % group;
      job.queries[i] = decoder.qkv_.floats() + row * decoder.qkv_stride_ + head * config.head_dim;
      job.outputs[i] = context(row) + head * config.head_dim;
      job.length[i] = decoder.rows_[static_cast<std::size_t>(row)].position + 1;
      const std::int32_t window = decoder.layers_[static_cast<std::size_t>(layer)].sliding_window;
      job.first[i] = window == 0 ? 0 : std::max(0, job.length[i] - window);
    }
    return job;
  }
};

void vq_decoder::run_part(void *context, std::int32_t index, std::int32_t count) {
  Part(*static_cast<vq_decoder *>(context), index, count).run();
}

std::int32_t vq_decoder::step(const vq_decode_batch &batch, vq_pool *pool) {
  ops_ = &vq::decode_ops();
  batch_ = &batch;
  status_.store(VQ_OK, std::memory_order_relaxed);
  first_logit_ = 0;
  ++profile.steps;
  Cursor cursor{0, 0};
  while (cursor.chunk < batch.num_chunks) {
    plan_pass(batch, cursor);
    if (pool == nullptr) {
      run_part(this, 0, 1);
    } else {
      pool->run(run_part, this);
    }
    first_logit_ += static_cast<std::int64_t>(logit_rows_.size());
  }
  return status_.load(std::memory_order_relaxed);
}
