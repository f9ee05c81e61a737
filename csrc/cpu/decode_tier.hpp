// Everything of the decode step but the matrix products, written once over `Floats` (16 lanes) and
// `Codes` (loads of cached numbers), which the including source file defines before. Internal
// linkage keeps tiers apart.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "decode_kernels.hpp"

namespace vq {
namespace {

constexpr float kMasked = -3.0e38f;
constexpr float kLargestHalf = 65504.0f;

// Lanes in a fixed order: a tree of four levels.
float sum_lanes(Floats x) {
  float v[16];
  x.store(v);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
}

// e^x to 2 ulp for x in [-87, 88], clamped outside: 2^n * p(r) with n = round(x / ln 2) and the
// Taylor polynomial of degree 6 on |r| <= 0.347 (Cody and Waite's split of ln 2).
Floats exponential(Floats x) {
  const Floats magic = Floats::all(12582912.0f);  // 1.5 * 2^23: adding it rounds
  x = Floats::min(Floats::max(x, Floats::all(-87.0f)), Floats::all(88.0f));
  const Floats shifted = x * Floats::all(1.44269504f) + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * Floats::all(0.693359375f)) - n * Floats::all(-2.12194440e-4f);
  Floats p = Floats::all(1.0f / 720);
  p = p * r + Floats::all(1.0f / 120);
  p = p * r + Floats::all(1.0f / 24);
  p = p * r + Floats::all(1.0f / 6);
  p = p * r + Floats::all(0.5f);
  p = p * r + Floats::all(1.0f);
  p = p * r + Floats::all(1.0f);
  return Floats::scale_by_power(p, shifted);
}

void rms_norm(const float *x, const float *weight, std::int32_t count, float eps, float *y) {
  Floats even = Floats::all(0.0f);
  Floats odd = Floats::all(0.0f);
  std::int32_t i = 0;
  for (; i + 16 < count; i += 32) {
    const Floats a = Floats::load(x + i);
    const Floats b = Floats::load(x + i + 16);
    even = even + a * a;
    odd = odd + b * b;
  }
  if (i < count) {
    const Floats a = Floats::load(x + i);
    even = even + a * a;
  }
  const float mean = sum_lanes(even + odd) / static_cast<float>(count);
  const Floats factor = Floats::all(1.0f / std::sqrt(mean + eps));
  for (i = 0; i < count; i += 16) {
    ((Floats::load(x + i) * factor) * Floats::load(weight + i)).store(y + i);
  }
}

void silu_multiply(const float *gate, const float *up, std::int32_t count, float *y) {
  const Floats one = Floats::all(1.0f);
  for (std::int32_t i = 0; i < count; i += 16) {
    const Floats g = Floats::load(gate + i);
    const Floats sigmoid_inverse = one + exponential(Floats::all(0.0f) - g);
    ((g / sigmoid_inverse) * Floats::load(up + i)).store(y + i);
  }
}

void add(float *x, const float *y, std::int32_t count) {
  std::int32_t i = 0;
  for (; i + 16 <= count; i += 16) (Floats::load(x + i) + Floats::load(y + i)).store(x + i);
  for (; i < count; ++i) x[i] += y[i];
}

// ---- The cache ----

const float *parameters(const std::uint8_t *block, std::int64_t offset) {
  return reinterpret_cast<const float *>(block + offset);
}

// Scores of one block for N queries: each loaded number is used N times, and each query's sums have
// the same order whatever N is. Meanwhile the block `ahead` is fetched.
template <KvFormat format, int N>
void scores_of_block_for(const AttendJob &job, const std::uint8_t *block, const float *query_sums,
                         std::int64_t at, const std::uint8_t *ahead) {
  const KvLayout &layout = *job.layout;
  Floats even[N], odd[N];
  for (int i = 0; i < N; ++i) even[i] = odd[i] = Floats::all(0.0f);
  const std::uint8_t *pair = block;
  const std::int32_t whole = layout.head_dim & ~1;
  for (std::int32_t d = 0; d < whole; d += 2, pair += Codes<format>::kPairBytes) {
    Floats a, b;
    __builtin_prefetch(ahead + (pair - block));
    Codes<format>::load(pair, a, b);
    for (int i = 0; i < N; ++i) {
      even[i] = even[i] + Floats::all(job.queries[i][d]) * a;
      odd[i] = odd[i] + Floats::all(job.queries[i][d + 1]) * b;
    }
  }
  for (int i = 0; i < N; ++i) {
    if (whole < layout.head_dim) {
      Floats a, b;
      Codes<format>::load(pair, a, b);
      even[i] = even[i] + Floats::all(job.queries[i][whole]) * a;
    }
    Floats sum = even[i] + odd[i];
    if (format != KvFormat::kHalf) {
      const float *scale = parameters(block, layout.key_parameters);
      sum = sum * Floats::load(scale);
      if (format == KvFormat::kInt4) {
        sum = sum + Floats::load(scale + 16) * Floats::all(query_sums[i]);
      }
    }
    sum.store(job.scratch + i * job.scratch_stride + at);
  }
}

// Scores to weights that sum to 1 in exact arithmetic once divided by the returned sum; positions
// that the query does not see get weight 0. [begin, end) are whole blocks.
float softmax(float *scores, std::int32_t first, std::int32_t length, std::int32_t begin,
              std::int32_t end) {
  for (std::int32_t i = begin; i < first; ++i) scores[i] = kMasked;
  for (std::int32_t i = length; i < end; ++i) scores[i] = kMasked;
  Floats highest = Floats::all(kMasked);
  for (std::int32_t i = begin; i < end; i += 16) {
    highest = Floats::max(highest, Floats::load(scores + i));
  }
  float lanes[16];
  highest.store(lanes);
  const Floats top = Floats::all(*std::max_element(lanes, lanes + 16));
  for (std::int32_t i = begin; i < end; i += 16) {
    exponential(Floats::load(scores + i) - top).store(scores + i);
  }
  for (std::int32_t i = begin; i < first; ++i) scores[i] = 0.0f;
  for (std::int32_t i = length; i < end; ++i) scores[i] = 0.0f;
  Floats sum = Floats::all(0.0f);
  for (std::int32_t i = first / 16 * 16; i < length; i += 16) sum = sum + Floats::load(scores + i);
  return sum_lanes(sum);
}

struct BlockCursor {
  const KvLayout &layout;
  const std::uint8_t *cache;
  const std::int32_t *pages;
  std::int64_t value_offset;

  explicit BlockCursor(const AttendJob &job)
      : layout(*job.layout),
        cache(job.cache),
        pages(job.pages),
        value_offset(layout.blocks_per_page * layout.key_bytes) {}
  const std::uint8_t *page(std::int32_t block) const {
    return cache + pages[block / layout.blocks_per_page] * layout.page_stride;
  }
  const std::uint8_t *keys(std::int32_t block) const {
    return page(block) + block % layout.blocks_per_page * layout.key_bytes;
  }
  const std::uint8_t *values(std::int32_t block) const {
    return page(block) + value_offset + block % layout.blocks_per_page * layout.value_bytes;
  }
};

// The keys that a job after this one begins with.
class NextKeys {
 public:
  explicit NextKeys(const AttendJob &job) : cursor_(job.next != nullptr ? *job.next : job) {
    if (job.next == nullptr) return;
    const std::int32_t queries = job.next->num_queries;
    begin_ = *std::min_element(job.next->first, job.next->first + queries) / kKvBlock;
    end_ = (*std::max_element(job.next->length, job.next->length + queries) + kKvBlock - 1) /
           kKvBlock;
  }
  // Number `i` of them, or `otherwise` if there are fewer.
  const std::uint8_t *block(std::int32_t i, const std::uint8_t *otherwise) const {
    return begin_ + i < end_ ? cursor_.keys(begin_ + i) : otherwise;
  }

 private:
  BlockCursor cursor_;
  std::int32_t begin_ = 0;
  std::int32_t end_ = 0;
};

// Cached blocks lie far apart and are in no cache when a token comes. One load per line of many
// blocks in a row keeps as many lines under way as the memory can serve; the arithmetic that
// follows would wait for a few at a time, and prefetch instructions do not change that (Zen 5: 12
// MB of keys and values in 1.3 ms without this, 0.7 ms with it, 0.4 ms from the cache).
constexpr std::int32_t kBlocksAtOnce = 64;

void touch(const std::uint8_t *data, std::int64_t bytes) {
  std::uint64_t all = 0;
  for (std::int64_t i = 0; i < bytes; i += 64) {
    std::uint64_t word;
    std::memcpy(&word, data + i, sizeof word);
    all |= word;
  }
  __asm__ volatile("" : : "r"(all));  // the loads must happen
}

void touch_keys(const BlockCursor &cursor, std::int32_t begin, std::int32_t end) {
  for (std::int32_t i = begin; i < end; ++i) touch(cursor.keys(i), cursor.layout.key_bytes);
}

void touch_values(const BlockCursor &cursor, std::int32_t begin, std::int32_t end) {
  for (std::int32_t i = begin; i < end; ++i) touch(cursor.values(i), cursor.layout.value_bytes);
}

// Outputs of dimensions 32 * t to 32 * t + 31 of N queries: sums over positions in order.
// Meanwhile the next job's keys are fetched.
template <KvFormat format, int N>
void weigh_values(const AttendJob &job, const BlockCursor &cursor, std::int32_t t,
                  std::int32_t begin, std::int32_t end, float (*out)[32]) {
  const NextKeys next(job);
  const KvLayout &layout = *job.layout;
  const std::int64_t row_bytes = std::int64_t{layout.value_pairs} * Codes<format>::kPairBytes;
  Floats low[N], high[N];
  for (int i = 0; i < N; ++i) low[i] = high[i] = Floats::all(0.0f);
  for (std::int32_t block = begin; block < end; ++block) {
    if (t == 0 && (block - begin) % kBlocksAtOnce == 0) {
      touch_values(cursor, block, std::min(block + kBlocksAtOnce, end));
    }
    const std::uint8_t *values = cursor.values(block);
    const float *scale = parameters(values, layout.value_parameters);
    const std::uint8_t *pair = values + t * Codes<format>::kPairBytes;
    const std::uint8_t *ahead = next.block(block - begin, values);
    for (int slot = 0; slot < kKvBlock; ++slot, pair += row_bytes) {
      Floats a, b;
      __builtin_prefetch(ahead + (pair - values));
      Codes<format>::load(pair, a, b);
      if (format == KvFormat::kInt8) {
        a = a * Floats::all(scale[slot]);
        b = b * Floats::all(scale[slot]);
      } else if (format == KvFormat::kInt4) {
        const Floats minimum = Floats::all(scale[16 + slot]);
        a = a * Floats::all(scale[slot]) + minimum;
        b = b * Floats::all(scale[slot]) + minimum;
      }
      const std::int64_t at = std::int64_t{block} * kKvBlock + slot;
      for (int i = 0; i < N; ++i) {
        const Floats weight = Floats::all(job.scratch[i * job.scratch_stride + at]);
        low[i] = low[i] + weight * a;
        high[i] = high[i] + weight * b;
      }
    }
  }
  for (int i = 0; i < N; ++i) {
    low[i].store(out[i]);
    high[i].store(out[i] + 16);
  }
}

template <KvFormat format, int N>
void attend_queries(const AttendJob &job) {
  const KvLayout &layout = *job.layout;
  const BlockCursor cursor(job);
  const std::int32_t first = *std::min_element(job.first, job.first + N);
  const std::int32_t length = *std::max_element(job.length, job.length + N);
  const std::int32_t begin = first / kKvBlock;
  const std::int32_t end = (length + kKvBlock - 1) / kKvBlock;
  float query_sums[N];
  for (int i = 0; i < N; ++i) {
    query_sums[i] = 0.0f;
    if (format == KvFormat::kInt4) {
      for (std::int32_t d = 0; d < layout.head_dim; ++d) query_sums[i] += job.queries[i][d];
    }
  }
  for (std::int32_t block = begin; block < end; ++block) {
    if ((block - begin) % kBlocksAtOnce == 0) {
      touch_keys(cursor, block, std::min(block + kBlocksAtOnce, end));
    }
    scores_of_block_for<format, N>(job, cursor.keys(block), query_sums,
                                   std::int64_t{block} * kKvBlock, cursor.values(block));
  }
  float inverse[N];
  for (int i = 0; i < N; ++i) {
    inverse[i] = 1.0f / softmax(job.scratch + i * job.scratch_stride, job.first[i], job.length[i],
                                begin * kKvBlock, end * kKvBlock);
  }
  for (std::int32_t t = 0; t < layout.value_pairs; ++t) {
    float out[N][32];
    weigh_values<format, N>(job, cursor, t, begin, end, out);
    const std::int32_t count = std::min(32, layout.head_dim - 32 * t);
    for (int i = 0; i < N; ++i) {
      for (std::int32_t d = 0; d < count; ++d) job.outputs[i][32 * t + d] = out[i][d] * inverse[i];
    }
  }
}

// Queries `from` and on of a job as a job of their own.
AttendJob rest_of(const AttendJob &job, std::int32_t from, std::int32_t count) {
  AttendJob part = job;
  part.num_queries = count;
  for (std::int32_t i = 0; i < count; ++i) {
    part.queries[i] = job.queries[from + i];
    part.outputs[i] = job.outputs[from + i];
    part.first[i] = job.first[from + i];
    part.length[i] = job.length[from + i];
  }
  return part;
}

template <KvFormat format>
void attend_format(const AttendJob &job) {
  std::int32_t from = 0;
  for (; from + VQ_DECODE_QUERIES <= job.num_queries; from += VQ_DECODE_QUERIES) {
    attend_queries<format, VQ_DECODE_QUERIES>(rest_of(job, from, VQ_DECODE_QUERIES));
  }
  const std::int32_t rest = job.num_queries - from;
  if (rest == 3) attend_queries<format, 3>(rest_of(job, from, 3));
  if (rest == 2) attend_queries<format, 2>(rest_of(job, from, 2));
  if (rest == 1) attend_queries<format, 1>(rest_of(job, from, 1));
}

void attend(const AttendJob &job) {
  switch (job.layout->format) {
    case KvFormat::kHalf: return attend_format<KvFormat::kHalf>(job);
    case KvFormat::kInt8: return attend_format<KvFormat::kInt8>(job);
    case KvFormat::kInt4: return attend_format<KvFormat::kInt4>(job);
  }
}

// ---- Writing the cache ----

// Binary16, round half to even, saturating: the cache must never hold an infinity, because masked
// positions take part in sums with weight 0. Without branches, so that loops over it vectorize.
std::uint16_t to_half(float x) {
  x = x < kLargestHalf ? x : kLargestHalf;
  x = x > -kLargestHalf ? x : -kLargestHalf;
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  float magnitude;
  std::memcpy(&magnitude, &bits, sizeof magnitude);
  const float shifted = magnitude + 0.5f;  // leaves a multiple of 2^-24 in the low bits
  std::uint32_t tiny;
  std::memcpy(&tiny, &shifted, sizeof tiny);
  const std::uint32_t usual = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  return static_cast<std::uint16_t>(sign | (bits < 0x38800000u ? tiny - 0x3f000000u : usual));
}

void store_half_key(const KvLayout &layout, const float *key, std::int32_t position,
                    std::uint8_t *block) {
  std::uint16_t halves[1024];
  for (std::int32_t d = 0; d < layout.head_dim; ++d) halves[d] = to_half(key[d]);
  auto *column = reinterpret_cast<std::uint16_t *>(block) + position;
  for (std::int32_t d = 0; d < layout.head_dim; ++d) column[16 * d] = halves[d];
}

void store_half_value(const KvLayout &layout, const float *value, std::int32_t position,
                      std::uint8_t *block) {
  auto *row = reinterpret_cast<std::uint16_t *>(block) + position * layout.value_pairs * 32;
  for (std::int32_t d = 0; d < layout.head_dim; ++d) row[d] = to_half(value[d]);
}

// Codes of one vector: number = code * scale + minimum.
struct Grid {
  float scale;
  float minimum;
};

Grid grid_of(KvFormat format, const float *x, std::int32_t count) {
  if (format == KvFormat::kInt8) {
    float amax = 0.0f;
    for (std::int32_t d = 0; d < count; ++d) amax = std::max(amax, std::fabs(x[d]));
    return {amax / 127.0f, 0.0f};
  }
  const float low = *std::min_element(x, x + count);
  const float high = *std::max_element(x, x + count);
  return {(high - low) / 15.0f, low};
}

std::int32_t code_of(KvFormat format, Grid grid, float x) {
  if (!(grid.scale > 1e-30f)) return 0;
  const auto code = static_cast<std::int32_t>(std::nearbyint((x - grid.minimum) / grid.scale));
  return format == KvFormat::kInt8 ? std::clamp(code, -127, 127) : std::clamp(code, 0, 15);
}

// Writes number `lane` of the first or second vector of a pair.
void store_number(KvFormat format, Grid grid, float x, int lane, bool second, std::uint8_t *pair) {
  const std::int32_t code = code_of(format, grid, x);
  if (format == KvFormat::kInt8) {
    pair[(second ? 16 : 0) + lane] = static_cast<std::uint8_t>(code);
    return;
  }
  const int shift = second ? 4 : 0;
  const int kept = pair[lane] & (second ? 0x0f : 0xf0);
  pair[lane] = static_cast<std::uint8_t>(kept | (code << shift));
}

Grid store_grid(const KvLayout &layout, const float *x, std::int32_t position, std::int64_t offset,
                std::uint8_t *block) {
  const Grid grid = grid_of(layout.format, x, layout.head_dim);
  auto *stored = reinterpret_cast<float *>(block + offset);
  stored[position] = grid.scale;
  stored[16 + position] = grid.minimum;
  return grid;
}

void store_key(const KvLayout &layout, const float *key, std::int32_t position,
               std::uint8_t *block) {
  if (layout.format == KvFormat::kHalf) return store_half_key(layout, key, position, block);
  const Grid grid = store_grid(layout, key, position, layout.key_parameters, block);
  for (std::int32_t d = 0; d < layout.head_dim; ++d) {
    std::uint8_t *pair = block + std::int64_t{d / 2} * layout.pair_bytes;
    store_number(layout.format, grid, key[d], position, d % 2 == 1, pair);
  }
}

void store_value(const KvLayout &layout, const float *value, std::int32_t position,
                 std::uint8_t *block) {
  if (layout.format == KvFormat::kHalf) return store_half_value(layout, value, position, block);
  const Grid grid = store_grid(layout, value, position, layout.value_parameters, block);
  std::uint8_t *row = block + std::int64_t{position} * layout.value_pairs * layout.pair_bytes;
  for (std::int32_t d = 0; d < layout.head_dim; ++d) {
    std::uint8_t *pair = row + std::int64_t{d / 32} * layout.pair_bytes;
    store_number(layout.format, grid, value[d], d % 16, d % 32 >= 16, pair);
  }
}

// ---- Rotations ----

// Walsh-Hadamard transform of `size` = 2^power < 16 values in place, unscaled.
void walsh_few(float *x, std::int64_t size) {
  for (std::int64_t half = 1; half < size; half *= 2) {
    for (std::int64_t i = 0; i < size; i += 2 * half) {
      for (std::int64_t j = i; j < i + half; ++j) {
        const float a = x[j];
        const float b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
    }
  }
}

// The same of 16 values and more.
void walsh(float *x, std::int64_t size) {
  if (size < 16) return walsh_few(x, size);
  for (std::int64_t i = 0; i < size; i += 16) {
    const Floats pairs = Floats::load(x + i).butterfly<1>().butterfly<2>();
    pairs.butterfly<4>().butterfly<8>().store(x + i);
  }
  for (std::int64_t half = 16; half < size; half *= 2) {
    for (std::int64_t i = 0; i < size; i += 2 * half) {
      for (std::int64_t j = i; j < i + half; j += 16) {
        const Floats a = Floats::load(x + j);
        const Floats b = Floats::load(x + j + half);
        (a + b).store(x + j);
        (a - b).store(x + j + half);
      }
    }
  }
}

// out = sum over a of x[a] * factors[a], where every element is a run of 2^power.
void mix_run(const vq_rotation &r, const float *factors, const float *x, float *out) {
  const std::int64_t run = std::int64_t{1} << r.power;
  for (std::int64_t b = 0; b < run && run >= 16; b += 16) {
    Floats sum = Floats::all(0.0f);
    for (std::int64_t a = 0; a < r.order; ++a) {
      sum = sum + Floats::load(x + a * run + b) * Floats::all(factors[a]);
    }
    sum.store(out + b);
  }
  for (std::int64_t b = 0; b < run && run < 16; ++b) {
    out[b] = 0.0f;
    for (std::int64_t a = 0; a < r.order; ++a) out[b] += x[a * run + b] * factors[a];
  }
}

// y[c] = sum over a of x[a] * base[a][c] (or base[c][a]).
void mix_runs(const vq_rotation &r, bool inverse, const float *x, float *y) {
  float factors[kMaxRotationOrder];
  for (std::int64_t c = 0; c < r.order; ++c) {
    for (std::int64_t a = 0; a < r.order; ++a) {
      factors[a] = inverse ? r.base[c * r.order + a] : r.base[a * r.order + c];
    }
    mix_run(r, factors, x, y + (c << r.power));
  }
}

void rotate(const vq_rotation &r, bool inverse, const float *x, float *y, float *scratch) {
  const std::int64_t run = std::int64_t{1} << r.power;
  const std::int64_t block = r.order * run;
  const auto scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  for (std::int64_t i = 0; i < r.size; ++i) {
    scratch[i] = inverse ? x[i] : x[i] * static_cast<float>(r.signs[i]);
  }
  for (std::int64_t start = 0; start < r.size; start += block) {
    mix_runs(r, inverse, scratch + start, y + start);
  }
  for (std::int64_t start = 0; start < r.size; start += run) walsh(y + start, run);
  for (std::int64_t i = 0; i < r.size; ++i) {
    y[i] = inverse ? y[i] * scale * static_cast<float>(r.signs[i]) : y[i] * scale;
  }
}

float read_all(const std::uint8_t *data, std::int64_t bytes) {
  Floats sums[4] = {Floats::all(0.0f), Floats::all(0.0f), Floats::all(0.0f), Floats::all(0.0f)};
  const auto *values = reinterpret_cast<const float *>(data);
  const std::int64_t count = bytes / static_cast<std::int64_t>(sizeof(float));
  std::int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    for (int j = 0; j < 4; ++j) sums[j] = sums[j] + Floats::load(values + i + 16 * j);
  }
  for (; i + 16 <= count; i += 16) sums[0] = sums[0] + Floats::load(values + i);
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace
}  // namespace vq
