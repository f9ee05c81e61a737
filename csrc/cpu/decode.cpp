// Making, checking and freeing a decoder, and the C ABI of it. The step is in decode_step.cpp.
#include "decode.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>

#include "pool.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define VQ_HAVE_MMAP 1
#endif

namespace vq {

Buffer::Buffer(std::int64_t num_bytes)
    : num_bytes_(static_cast<std::size_t>(std::max<std::int64_t>(num_bytes, 64))) {
#if defined(VQ_HAVE_MMAP)
  constexpr int kAccess = PROT_READ | PROT_WRITE;
  void *memory = mmap(nullptr, num_bytes_, kAccess, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  constexpr std::size_t kWorthwhile = std::size_t{8} << 20;
  if (num_bytes_ >= kWorthwhile) madvise(memory, num_bytes_, MADV_HUGEPAGE);  // only advice
#endif
  data_ = static_cast<std::uint8_t *>(memory);
#else
  data_ = static_cast<std::uint8_t *>(::operator new(num_bytes_, std::align_val_t{64}));
  std::memset(data_, 0, num_bytes_);
#endif
}

Buffer::~Buffer() {
  if (data_ == nullptr) return;
#if defined(VQ_HAVE_MMAP)
  munmap(data_, num_bytes_);
#else
  ::operator delete(data_, std::align_val_t{64});
#endif
}

Buffer::Buffer(Buffer &&other) noexcept
    : data_(std::exchange(other.data_, nullptr)), num_bytes_(std::exchange(other.num_bytes_, 0)) {}

Buffer &Buffer::operator=(Buffer &&other) noexcept {
  std::swap(data_, other.data_);
  std::swap(num_bytes_, other.num_bytes_);
  return *this;
}

namespace {

constexpr std::int64_t kFloatBytes = sizeof(float);

std::int64_t round_up(std::int64_t value, std::int64_t step) {
  return (value + step - 1) / step * step;
}

bool in_range(std::int64_t value, std::int64_t low, std::int64_t high) {
  return value >= low && value <= high;
}

// Whether the parts of a projection have `in` columns and together `out` rows.
bool fits(const vq_projection &projection, std::int64_t in, std::int64_t out) {
  std::int64_t rows = 0;
  for (const vq_matrix *part : projection.parts) {
    if (part == nullptr) continue;
    const MatrixShape shape = shape_of(*part);
    if (shape.in_features != in) return false;
    rows += shape.out_features;
  }
  return rows == out;
}

bool fits(const vq_rotation &rotation, std::int32_t size) {
  if (rotation.size == 0) return true;
  if (rotation.size != size || rotation.signs == nullptr || rotation.base == nullptr ||
      !in_range(rotation.order, 1, kMaxRotationOrder) || !in_range(rotation.power, 0, 20)) {
    return false;
  }
  return size % (std::int64_t{rotation.order} << rotation.power) == 0;
}

std::int32_t check_layer(const vq_decoder_config &c, const vq_decoder_layer &layer) {
  if (layer.input_norm == nullptr || layer.post_attention_norm == nullptr) return VQ_ERR_NULL;
  const std::int64_t queries = std::int64_t{c.num_heads} * c.head_dim;
  const std::int64_t qkv = std::int64_t{c.num_heads + 2 * c.num_kv_heads} * c.head_dim;
  const bool good = fits(layer.qkv, c.hidden_size, qkv) &&
                    fits(layer.output, queries, c.hidden_size) &&
                    fits(layer.gate_up, c.hidden_size, std::int64_t{2} * c.intermediate_size) &&
                    fits(layer.down, c.intermediate_size, c.hidden_size) &&
                    layer.sliding_window >= 0 && layer.reserved == 0;
  return good ? VQ_OK : VQ_ERR_SHAPE;
}

std::int32_t check_config(const vq_decoder_config &c) {
  constexpr std::int32_t kMany = 1 << 20;
  const std::int32_t sizes[] = {c.vocab_size, c.hidden_size,  c.intermediate_size, c.num_layers,
                                c.num_heads,  c.num_kv_heads, c.num_positions,     c.num_pages};
  for (const std::int32_t size : sizes) {
    if (!in_range(size, 1, kMany * 8)) return VQ_ERR_SHAPE;
  }
  const bool good = in_range(c.num_layers, 1, 4096) && in_range(c.num_heads, 1, 4096) &&
                    c.num_heads % c.num_kv_heads == 0 && in_range(c.head_dim, 2, 1024) &&
                    c.head_dim % 2 == 0 && in_range(c.page_size, VQ_KV_BLOCK, 1 << 16) &&
                    c.page_size % VQ_KV_BLOCK == 0 &&
                    (c.kv_bits == 16 || c.kv_bits == 8 || c.kv_bits == 4) &&
                    in_range(c.max_rows, 1, 4096) && in_range(c.num_threads, 1, VQ_MAX_THREADS) &&
                    in_range(c.exact, 0, 1) && c.rms_norm_eps >= 0.0f && c.rms_norm_eps < 1.0f;
  return good ? VQ_OK : VQ_ERR_SHAPE;
}

Projection describe(const vq_projection &given) {
  Projection projection{};
  std::int64_t offset = 0;
  bool shares = true;
  for (const vq_matrix *part : given.parts) {
    if (part == nullptr) continue;
    const std::int32_t i = projection.num_parts++;
    projection.parts[i] = part;
    projection.shapes[i] = shape_of(*part);
    projection.offsets[i] = offset;
    offset += projection.shapes[i].out_features;
    shares = shares && projection.shapes[i].has_transform == 0 &&
             projection.shapes[i].has_column_bias == 0;
  }
  projection.num_inputs = shares ? 1 : projection.num_parts;
  return projection;
}

// Columns of the widest activations of a projection.
std::int64_t widest(const Projection &projection) {
  std::int64_t columns = 0;
  for (std::int32_t i = 0; i < projection.num_parts; ++i) {
    columns = std::max<std::int64_t>(columns, projection.shapes[i].columns);
  }
  return columns;
}

ActivationSet make_activations(std::int64_t rows, std::int64_t width) {
  const auto columns = static_cast<std::int32_t>(width);
  const std::int64_t codes = round_up(rows * padded_columns(columns), 64);
  const std::int64_t scales = round_up(rows * activation_groups(columns) * kFloatBytes, 64);
  const std::int64_t prefix = round_up(rows * prefix_length(columns) * kFloatBytes, 64);
  ActivationSet set{{}, Buffer(codes + scales + prefix + rows * kFloatBytes + 64)};
  std::uint8_t *at = set.memory.bytes();
  set.buffers.q = reinterpret_cast<std::int8_t *>(at);
  set.buffers.scales = reinterpret_cast<float *>(at + codes);
  set.buffers.prefix = reinterpret_cast<std::int32_t *>(at + codes + scales);
  set.buffers.offsets = reinterpret_cast<float *>(at + codes + scales + prefix);
  return set;
}

std::int32_t owned_status(const vq_pool *pool) {
  return pool != nullptr && !pool->owned_by_this_process() ? VQ_ERR_FORKED : VQ_OK;
}

}  // namespace
}  // namespace vq

std::int32_t vq_decoder::check(const vq_decoder_config &c, const vq_decoder_weights &weights) {
  if (weights.layers == nullptr || weights.final_norm == nullptr || weights.head == nullptr ||
      weights.embedding == nullptr || weights.cosines == nullptr || weights.sines == nullptr) {
    return VQ_ERR_NULL;
  }
  if (weights.embedding_type == VQ_INT8 && weights.embedding_scales == nullptr) return VQ_ERR_NULL;
  std::int32_t status = vq::check_config(c);
  for (std::int32_t i = 0; status == VQ_OK && i < c.num_layers; ++i) {
    status = vq::check_layer(c, weights.layers[i]);
  }
  if (status != VQ_OK) return status;
  const vq_projection head{{weights.head, nullptr, nullptr}};
  const bool good = vq::fits(head, c.hidden_size, c.vocab_size) &&
                    vq::fits(weights.residual, c.hidden_size) &&
                    vq::fits(weights.down, c.intermediate_size) && weights.reserved == 0 &&
                    vq::in_range(weights.embedding_type, VQ_FLOAT32, VQ_INT8);
  return good ? VQ_OK : VQ_ERR_SHAPE;
}

vq_decoder::vq_decoder(const vq_decoder_config &given, const vq_decoder_weights &weights)
    : config(given), weights_(weights) {
  lay_out_cache();
  load_layers(weights);
  reserve_scratch();
}

void vq_decoder::lay_out_cache() {
  const vq_decoder_config &c = config;
  kv_.format = static_cast<vq::KvFormat>(c.kv_bits);
  kv_.head_dim = c.head_dim;
  kv_.key_pairs = (c.head_dim + 1) / 2;
  kv_.value_pairs = (c.head_dim + 31) / 32;
  kv_.pair_bytes = 4 * c.kv_bits;
  kv_.blocks_per_page = c.page_size / VQ_KV_BLOCK;
  const std::int64_t parameters = c.kv_bits == 16 ? 0 : 2 * vq::kKvBlock * vq::kFloatBytes;
  kv_.key_parameters = vq::round_up(std::int64_t{kv_.key_pairs} * kv_.pair_bytes, 64);
  kv_.value_parameters = std::int64_t{vq::kKvBlock} * kv_.value_pairs * kv_.pair_bytes;
  kv_.key_bytes = kv_.key_parameters + parameters;
  kv_.value_bytes = kv_.value_parameters + parameters;
  head_bytes_ = kv_.blocks_per_page * (kv_.key_bytes + kv_.value_bytes);
  layer_bytes_ = c.num_kv_heads * head_bytes_;
  page_bytes = c.num_layers * layer_bytes_;
  kv_.page_stride = page_bytes;
  cache_ = vq::Buffer(page_bytes * c.num_pages);
}

// A padded copy that lives as long as the decoder; nullptr for nullptr.
const float *vq_decoder::keep(const float *values, std::int64_t count) {
  if (values == nullptr) return nullptr;
  kept_.emplace_back(vq::round_up(count, 16) * vq::kFloatBytes);
  std::memcpy(kept_.back().bytes(), values, static_cast<std::size_t>(count * vq::kFloatBytes));
  return kept_.back().floats();
}

void vq_decoder::load_layers(const vq_decoder_weights &weights) {
  const vq_decoder_config &c = config;
  for (std::int32_t i = 0; i < c.num_layers; ++i) {
    const vq_decoder_layer &given = weights.layers[i];
    layers_.push_back({keep(given.input_norm, c.hidden_size),
                       keep(given.post_attention_norm, c.hidden_size), vq::describe(given.qkv),
                       vq::describe(given.output), vq::describe(given.gate_up),
                       vq::describe(given.down), given.sliding_window});
  }
  head_ = vq::describe({{weights.head, nullptr, nullptr}});
  widest_columns_ = vq::widest(head_);
  for (const vq::Layer &layer : layers_) {
    for (const vq::Projection *projection :
         {&layer.qkv, &layer.output, &layer.gate_up, &layer.down}) {
      widest_columns_ = std::max(widest_columns_, vq::widest(*projection));
    }
  }
  final_norm_ = keep(weights.final_norm, c.hidden_size);
  weights_.layers = nullptr;  // the caller's array may go
  weights_.final_norm = nullptr;
}

void vq_decoder::reserve_scratch() {
  const vq_decoder_config &c = config;
  const std::int64_t rows = c.max_rows;
  const std::int64_t queries = std::int64_t{c.num_heads} * c.head_dim;
  hidden_stride_ = vq::round_up(c.hidden_size, 16);
  // Vectors may run over the end of a row into the next one, and over the last by one vector.
  inner_stride_ = vq::round_up(c.intermediate_size, 16) + 16;
  gate_stride_ = vq::round_up(2 * std::int64_t{c.intermediate_size}, 16) + 16;
  qkv_stride_ = vq::round_up(queries + 2 * std::int64_t{c.num_kv_heads} * c.head_dim, 16);
  context_stride_ = vq::round_up(queries, 16);
  widest_ = std::max({hidden_stride_, inner_stride_, context_stride_});
  query_scale_ = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  const auto floats = [](std::int64_t count) { return vq::Buffer((count + 16) * vq::kFloatBytes); };
  residual_ = floats(rows * hidden_stride_);
  normed_ = floats(rows * widest_);
  qkv_ = floats(rows * qkv_stride_);
  context_ = floats(rows * context_stride_);
  gate_up_ = floats(rows * gate_stride_);
  update_ = floats(rows * hidden_stride_);
  for (std::int32_t i = 0; i < VQ_MAX_PARTS; ++i) {
    shared_.push_back(vq::make_activations(rows, widest_columns_));
  }
  scores_stride_ = vq::round_up(c.num_positions, vq::kKvBlock);
  const std::int64_t scores = vq::kMaxQueries * scores_stride_;
  for (std::int32_t t = 0; t < c.num_threads; ++t) {
    vq::ThreadScratch scratch{floats(hidden_stride_ + 3 * widest_ + scores), {}, {}, {}, {}, {}};
    scratch.residual = scratch.memory.floats();
    scratch.normed = scratch.residual + hidden_stride_;
    scratch.rotated = scratch.normed + widest_;
    scratch.space = scratch.rotated + widest_;
    scratch.scores = scratch.space + widest_;
    threads_.push_back(std::move(scratch));
    private_.push_back(vq::make_activations(1, widest_columns_));
  }
  rows_.reserve(static_cast<std::size_t>(rows));
  spans_.reserve(static_cast<std::size_t>(rows));
  logit_rows_.reserve(static_cast<std::size_t>(rows));
  largest_.resize(static_cast<std::size_t>(c.num_threads));
}

void vq_decoder::copy_page(std::int32_t source, std::int32_t target) {
  std::memcpy(cache_.bytes() + target * page_bytes, cache_.bytes() + source * page_bytes,
              static_cast<std::size_t>(page_bytes));
}

void vq_decoder::take_profile(vq_decoder_profile &taken) {
  taken = profile;
  profile = {};
  is_profiling_ = true;
}

std::int32_t vq_decoder_create(const vq_decoder_config *config, const vq_decoder_weights *weights,
                               vq_decoder **decoder) {
  if (config == nullptr || weights == nullptr || decoder == nullptr) return VQ_ERR_NULL;
  *decoder = nullptr;
  const std::int32_t status = vq_decoder::check(*config, *weights);
  if (status != VQ_OK) return status;
  try {
    *decoder = new vq_decoder(*config, *weights);
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}

void vq_decoder_free(vq_decoder *decoder) {
  delete decoder;
}

std::int32_t vq_decoder_step(vq_decoder *decoder, const vq_decode_batch *batch, vq_pool *pool) {
  if (decoder == nullptr || batch == nullptr) return VQ_ERR_NULL;
  std::int32_t status = vq::owned_status(pool);
  if (status == VQ_OK) {
    status = decoder->check_batch(*batch, pool == nullptr ? 1 : pool->num_threads());
  }
  return status == VQ_OK ? decoder->step(*batch, pool) : status;
}

std::int32_t vq_decoder_copy_page(vq_decoder *decoder, std::int32_t source, std::int32_t target) {
  if (decoder == nullptr) return VQ_ERR_NULL;
  const std::int32_t last = decoder->config.num_pages - 1;
  if (!vq::in_range(source, 0, last) || !vq::in_range(target, 0, last)) return VQ_ERR_RANGE;
  decoder->copy_page(source, target);
  return VQ_OK;
}

std::int64_t vq_decoder_page_bytes(const vq_decoder *decoder) {
  return decoder == nullptr ? 0 : decoder->page_bytes;
}

std::int32_t vq_decoder_take_profile(vq_decoder *decoder, vq_decoder_profile *profile) {
  if (decoder == nullptr || profile == nullptr) return VQ_ERR_NULL;
  decoder->take_profile(*profile);
  return VQ_OK;
}

namespace {

struct ReadJob {
  const vq::DecodeOps *ops;
  const std::uint8_t *data;
  std::int64_t num_lines;
  std::atomic<float> *sum;
};

void read_part(void *context, std::int32_t index, std::int32_t count) {
  const auto *job = static_cast<const ReadJob *>(context);
  const std::int64_t begin = job->num_lines * index / count;
  const std::int64_t end = job->num_lines * (index + 1) / count;
  const float sum = job->ops->read_all(job->data + 64 * begin, 64 * (end - begin));
  float before = job->sum->load();
  while (!job->sum->compare_exchange_weak(before, before + sum)) {
  }
}

}  // namespace

std::int32_t vq_read_all(const void *data, std::int64_t num_bytes, vq_pool *pool, float *checksum) {
  if (data == nullptr || checksum == nullptr) return VQ_ERR_NULL;
  if (num_bytes < 0 || num_bytes % 64 != 0) return VQ_ERR_SHAPE;
  const std::int32_t status = vq::owned_status(pool);
  if (status != VQ_OK) return status;
  std::atomic<float> sum{0.0f};
  ReadJob job{&vq::decode_ops(), static_cast<const std::uint8_t *>(data), num_bytes / 64, &sum};
  if (pool == nullptr) {
    read_part(&job, 0, 1);
  } else {
    pool->run(read_part, &job);
  }
  *checksum = sum.load();
  return VQ_OK;
}
