// RAW segments: exact ranks, 64 to a chunk, in mixed-radix integers of many words.
#include <algorithm>

#include "scq1_model.hpp"

namespace vq::scq1 {
namespace {

using Wide = unsigned __int128;

constexpr std::int64_t kChunk = 64;

// A non-negative integer of up to 64 radices below 2^63.
class Integer {
 public:
  void multiply_add(std::uint64_t factor, std::uint64_t addend) {
    Wide carry = addend;
    for (std::size_t i = 0; i < count_; ++i) {
      carry += static_cast<Wide>(words_[i]) * factor;
      words_[i] = static_cast<std::uint64_t>(carry);
      carry >>= 64;
    }
    if (carry != 0) {
      words_[count_++] = static_cast<std::uint64_t>(carry);
    }
  }

  // Divides in place, returns the remainder.
  std::uint64_t divide(std::uint64_t divisor) {
    Wide rest = 0;
    for (std::size_t i = count_; i-- > 0;) {
      const Wide value = rest << 64 | words_[i];
      words_[i] = static_cast<std::uint64_t>(value / divisor);
      rest = value % divisor;
    }
    while (count_ > 0 && words_[count_ - 1] == 0) {
      --count_;
    }
    return static_cast<std::uint64_t>(rest);
  }

  bool is_zero() const { return count_ == 0; }

  // Whole bytes that hold every number below this one; it is at least 1.
  std::size_t bytes_below() const {
    std::size_t top = count_ - 1;
    bool is_power = true;  // of 2^64 times the top word
    for (std::size_t i = 0; i < top; ++i) {
      is_power = is_power && words_[i] == 0;
    }
    std::uint64_t word = words_[top] - (is_power ? 1 : 0);
    std::size_t bytes = top * 8;
    for (; word != 0; word >>= 8) {
      ++bytes;
    }
    return bytes;
  }

  void read(const std::uint8_t *bytes, std::size_t count) {
    count_ = (count + 7) / 8;
    std::fill_n(words_, count_, 0);
    for (std::size_t i = 0; i < count; ++i) {
      words_[i / 8] |= static_cast<std::uint64_t>(bytes[i]) << (8 * (i % 8));
    }
    while (count_ > 0 && words_[count_ - 1] == 0) {
      --count_;
    }
  }

  void write(std::size_t count, std::vector<std::uint8_t> &out) const {
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint64_t word = i / 8 < count_ ? words_[i / 8] : 0;
      out.push_back(static_cast<std::uint8_t>(word >> (8 * (i % 8))));
    }
  }

 private:
  std::size_t count_ = 0;
  std::uint64_t words_[kChunk + 1];
};

// How many of the next limits can be handled as one radix below 2^63, and their product.
struct Group {
  std::int64_t count;
  std::uint64_t product;
};

Group next_group(const std::int64_t *limits, std::int64_t count) {
  Group group{0, 1};
  while (group.count < count) {
    const Wide product = static_cast<Wide>(group.product) *
                         static_cast<std::uint64_t>(limits[group.count]);
    if (group.count > 0 && product >> 63 != 0) {
      break;
    }
    group.product = static_cast<std::uint64_t>(product);
    ++group.count;
  }
  return group;
}

std::size_t chunk_bytes(const std::int64_t *limits, std::int64_t count) {
  Integer product;
  product.multiply_add(0, 1);
  for (std::int64_t at = 0; at < count;) {
    const Group group = next_group(limits + at, count - at);
    product.multiply_add(group.product, 0);
    at += group.count;
  }
  return product.bytes_below();
}

std::size_t segment_bytes(const std::vector<std::int64_t> &limits) {
  const auto total = static_cast<std::int64_t>(limits.size());
  std::size_t bytes = 0;
  for (std::int64_t at = 0; at < total; at += kChunk) {
    bytes += chunk_bytes(limits.data() + at, std::min(kChunk, total - at));
  }
  return bytes;
}

void write_chunk(const std::int64_t *values, const std::int64_t *limits, std::int64_t count,
                 std::vector<std::uint8_t> &out) {
  // Groups from the last to the first, as Horner's rule wants them.
  std::int64_t starts[kChunk];
  std::int64_t num_groups = 0;
  for (std::int64_t at = 0; at < count; at += next_group(limits + at, count - at).count) {
    starts[num_groups++] = at;
  }
  Integer number;
  for (std::int64_t g = num_groups; g-- > 0;) {
    const Group group = next_group(limits + starts[g], count - starts[g]);
    std::uint64_t value = 0;
    for (std::int64_t i = starts[g] + group.count; i-- > starts[g];) {
      value = value * static_cast<std::uint64_t>(limits[i]) + static_cast<std::uint64_t>(values[i]);
    }
    number.multiply_add(group.product, value);
  }
  number.write(chunk_bytes(limits, count), out);
}

void read_chunk(const std::uint8_t *bytes, std::size_t size, const std::int64_t *limits,
                std::int64_t count, std::int64_t *values) {
  Integer number;
  number.read(bytes, size);
  for (std::int64_t at = 0; at < count;) {
    const Group group = next_group(limits + at, count - at);
    std::uint64_t value = number.divide(group.product);
    for (std::int64_t i = at; i < at + group.count; ++i) {
      const auto limit = static_cast<std::uint64_t>(limits[i]);
      values[i] = static_cast<std::int64_t>(value % limit);
      value /= limit;
    }
    at += group.count;
  }
  if (!number.is_zero()) {
    fail(VQ_SCQ1_RANK);
  }
}

void write_segment(const std::vector<std::int64_t> &values, const std::vector<std::int64_t> &limits,
                   std::vector<std::uint8_t> &out) {
  const auto total = static_cast<std::int64_t>(limits.size());
  for (std::int64_t at = 0; at < total; at += kChunk) {
    write_chunk(values.data() + at, limits.data() + at, std::min(kChunk, total - at), out);
  }
}

// `bytes` holds segment_bytes(limits) bytes.
std::vector<std::int64_t> read_segment(const std::uint8_t *bytes,
                                       const std::vector<std::int64_t> &limits) {
  const auto total = static_cast<std::int64_t>(limits.size());
  std::vector<std::int64_t> values(limits.size());
  for (std::int64_t at = 0; at < total; at += kChunk) {
    const std::int64_t count = std::min(kChunk, total - at);
    const std::size_t size = chunk_bytes(limits.data() + at, count);
    read_chunk(bytes, size, limits.data() + at, count, values.data() + at);
    bytes += size;
  }
  return values;
}

std::vector<std::int64_t> base_limits(const Model &model, std::int64_t count) {
  return std::vector<std::int64_t>(static_cast<std::size_t>(count), model.num_codes);
}

std::vector<std::int64_t> rest_limits(const Model &model, const std::vector<std::int32_t> &leads) {
  std::vector<std::int64_t> limits;
  limits.reserve(leads.size());
  for (const std::int32_t lead : leads) {
    std::int64_t sum = 0;
    for (const RankCase &one : model.cases) {
      sum += model.case_ranks(one, lead);
    }
    limits.push_back(sum);
  }
  return limits;
}

std::int64_t subset_rank(const Model &model, const std::int32_t *ascending, std::int32_t count,
                         std::int32_t offset) {
  std::int64_t rank = 0;
  for (std::int32_t m = 0; m < count; ++m) {
    rank += model.choose(ascending[m] - offset, m + 1);
  }
  return rank;
}

// Elements of the subset of that rank, ascending, each plus offset.
void subset_of(const Model &model, std::int64_t rank, std::int32_t count, std::int32_t offset,
               std::int32_t *out) {
  for (std::int32_t m = count; m > 0; --m) {
    const std::int64_t *column = model.choose_column(m);
    const auto element =
        static_cast<std::int32_t>(std::upper_bound(column, column + model.num_codes + 1, rank) -
                                  column) -
        1;
    rank -= column[element];
    out[m - 1] = element + offset;
  }
}

std::int64_t rank_rest(const Model &model, const Latent &latent) {
  const std::int32_t lead = latent.index[0];
  std::int32_t order[kMaxSupport] = {};  // of the other codes, by index
  for (std::int32_t i = 1; i < latent.size; ++i) {
    std::int32_t at = i;
    for (; at > 1 && latent.index[order[at - 1]] > latent.index[i]; --at) {
      order[at] = order[at - 1];
    }
    order[at] = i;
  }
  std::int32_t others[kMaxSupport];
  std::int32_t weights[kMaxSupport];
  std::int32_t below = 0;
  weights[0] = latent.numerator[0];
  for (std::int32_t i = 1; i < latent.size; ++i) {
    others[i - 1] = latent.index[order[i]];
    weights[i] = latent.numerator[order[i]];
    below += others[i - 1] < lead ? 1 : 0;
  }
  std::int64_t first = 0;
  for (const RankCase &one : model.cases) {
    if (one.size == latent.size && one.below == below) {
      const std::int32_t above = latent.size - 1 - below;
      const std::int64_t low = subset_rank(model, others, below, 0);
      const std::int64_t high = subset_rank(model, others + below, above, lead + 1);
      const std::int64_t places = model.choose(model.num_codes - 1 - lead, above);
      return first + (low * places + high) * one.weights.count() +
             one.weights.find(weights, latent.size);
    }
    first += model.case_ranks(one, lead);
  }
  fail(VQ_SCQ1_ASSIGNMENT);
}

Latent unrank_rest(const Model &model, std::int32_t lead, std::int64_t rank) {
  Latent latent;
  latent.index[0] = lead;
  for (const RankCase &one : model.cases) {
    const std::int64_t ranks = model.case_ranks(one, lead);
    if (rank >= ranks) {
      rank -= ranks;
      continue;
    }
    latent.size = one.size;
    const std::int64_t subsets = rank / one.weights.count();
    one.weights.get(static_cast<std::int32_t>(rank % one.weights.count()), one.size,
                    latent.numerator);
    const std::int32_t above = one.size - 1 - one.below;
    const std::int64_t places = model.choose(model.num_codes - 1 - lead, above);
    subset_of(model, subsets / places, one.below, 0, latent.index + 1);
    subset_of(model, subsets % places, above, lead + 1, latent.index + 1 + one.below);
    make_canonical(latent);
    return latent;
  }
  fail(VQ_SCQ1_RANK);
}

}  // namespace

std::size_t raw_base_bytes(const Model &model, std::int64_t count) {
  const std::int64_t whole = count / kChunk;
  std::size_t bytes = 0;
  if (whole > 0) {
    bytes = static_cast<std::size_t>(whole) * segment_bytes(base_limits(model, kChunk));
  }
  return bytes + segment_bytes(base_limits(model, count % kChunk));
}

std::size_t raw_rest_bytes(const Model &model, const std::vector<std::int32_t> &leads) {
  return segment_bytes(rest_limits(model, leads));
}

std::vector<std::int32_t> raw_read_base(const Model &model, const std::uint8_t *bytes,
                                        std::int64_t count) {
  const std::vector<std::int64_t> values = read_segment(bytes, base_limits(model, count));
  return std::vector<std::int32_t>(values.begin(), values.end());
}

std::vector<Latent> raw_read_rest(const Model &model, const std::uint8_t *bytes,
                                  const std::vector<std::int32_t> &leads) {
  const std::vector<std::int64_t> ranks = read_segment(bytes, rest_limits(model, leads));
  std::vector<Latent> latents;
  latents.reserve(leads.size());
  for (std::size_t i = 0; i < leads.size(); ++i) {
    latents.push_back(unrank_rest(model, leads[i], ranks[i]));
  }
  return latents;
}

void raw_write_base(const Model &model, const std::vector<Latent> &latents,
                    std::vector<std::uint8_t> &out) {
  std::vector<std::int64_t> values;
  values.reserve(latents.size());
  for (const Latent &latent : latents) {
    values.push_back(latent.index[0]);
  }
  write_segment(values, base_limits(model, static_cast<std::int64_t>(values.size())), out);
}

void raw_write_rest(const Model &model, const std::vector<Latent> &latents,
                    std::vector<std::uint8_t> &out) {
  std::vector<std::int64_t> values;
  std::vector<std::int32_t> leads;
  for (const Latent &latent : latents) {
    values.push_back(rank_rest(model, latent));
    leads.push_back(latent.index[0]);
  }
  write_segment(values, rest_limits(model, leads), out);
}

}  // namespace vq::scq1
