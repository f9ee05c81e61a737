// The profile of one SCQ1 model: weights, cases, tables, checksums.
#include "scq1_model.hpp"

#include <algorithm>
#include <array>
#include <cmath>

namespace vq::scq1 {
namespace {

constexpr std::uint32_t kTotal = 1u << 16;
constexpr std::int32_t kMaxTableCodes = 8192;

struct Costs {
  std::array<std::int32_t, kTotal + 1> by_frequency;

  Costs() {
    by_frequency[0] = 0;
    for (std::uint32_t f = 1; f <= kTotal; ++f) {
      by_frequency[f] =
          static_cast<std::int32_t>(std::lrint(256.0 * (16.0 - std::log2(static_cast<double>(f)))));
    }
  }
};

const std::int32_t *all_costs() {
  static const Costs costs;
  return costs.by_frequency.data();
}

// Calls use(parts) for every composition of total into count parts, in lexicographic order.
template <typename Use>
void each_composition(std::int32_t total, std::int32_t count, Use use) {
  std::int32_t choices = 1;
  for (std::int32_t i = 1; i < count; ++i) {
    choices *= total;
  }
  for (std::int32_t number = 0; number < choices; ++number) {
    std::int32_t parts[kMaxSupport] = {};
    std::int32_t digits = number;
    std::int32_t rest = total;
    for (std::int32_t i = count - 2; i >= 0; --i) {  // the last free part turns fastest
      parts[i] = 1 + digits % total;
      digits /= total;
      rest -= parts[i];
    }
    parts[count - 1] = rest;
    if (rest >= 1) {
      use(parts);
    }
  }
}

bool descends(const std::int32_t *parts, std::int32_t count) {
  for (std::int32_t i = 1; i < count; ++i) {
    if (parts[i] > parts[i - 1]) {
      return false;
    }
  }
  return true;
}

bool is_led(const std::int32_t *parts, std::int32_t count, std::int32_t below) {
  for (std::int32_t i = 1; i < count; ++i) {
    if (i <= below ? parts[0] <= parts[i] : parts[0] < parts[i]) {
      return false;
    }
  }
  return true;
}

}  // namespace

void fail(std::int32_t reason) {
  throw Failure{reason};
}

void make_canonical(Latent &latent) {
  for (std::int32_t i = 1; i < latent.size; ++i) {
    const std::int32_t index = latent.index[i];
    const std::int32_t numerator = latent.numerator[i];
    std::int32_t at = i;
    for (; at > 0 && (latent.numerator[at - 1] < numerator ||
                      (latent.numerator[at - 1] == numerator && latent.index[at - 1] > index));
         --at) {
      latent.index[at] = latent.index[at - 1];
      latent.numerator[at] = latent.numerator[at - 1];
    }
    latent.index[at] = index;
    latent.numerator[at] = numerator;
  }
}

std::uint32_t Parts::pack(const std::int32_t *parts, std::int32_t count) {
  std::uint32_t packed = 0;
  for (std::int32_t i = 0; i < count; ++i) {
    packed = (packed << 8) | static_cast<std::uint32_t>(parts[i]);
  }
  return packed;
}

void Parts::add(const std::int32_t *parts, std::int32_t count) {
  packed_.push_back(pack(parts, count));
}

void Parts::get(std::int32_t number, std::int32_t count, std::int32_t *parts) const {
  std::uint32_t packed = packed_[number];
  for (std::int32_t i = count - 1; i >= 0; --i) {
    parts[i] = static_cast<std::int32_t>(packed & 255u);
    packed >>= 8;
  }
}

std::int32_t Parts::find(const std::int32_t *parts, std::int32_t count) const {
  const auto at = std::lower_bound(packed_.begin(), packed_.end(), pack(parts, count));
  return static_cast<std::int32_t>(at - packed_.begin());
}

Model::Model(const vq_scq1_profile &profile)
    : num_codes(profile.num_codes), max_support(profile.max_support),
      denominator(profile.denominator), has_tables(profile.base_cluster != nullptr),
      base_clusters(0), other_clusters(0), costs(all_costs()) {
  for (std::int32_t size = 1; size <= max_support; ++size) {
    each_composition(denominator, size, [&](const std::int32_t *parts) {
      compositions[size].add(parts, size);
      if (descends(parts, size)) {
        partitions[size].add(parts, size);
      }
    });
  }
  make_choose();
  make_cases();
  if (has_tables) {
    take_tables(profile);
  }
}

void Model::make_choose() {
  const std::size_t rows = static_cast<std::size_t>(num_codes) + 1;
  choose_.assign(rows * (static_cast<std::size_t>(max_support) + 1), 0);
  std::fill_n(choose_.begin(), rows, 1);
  for (std::int32_t m = 1; m <= max_support; ++m) {
    const std::int64_t *before = choose_column(m - 1);
    std::int64_t *column = choose_.data() + static_cast<std::size_t>(m) * rows;
    for (std::size_t x = 1; x < rows; ++x) {
      column[x] = column[x - 1] + before[x - 1];
    }
  }
}

void Model::make_cases() {
  for (std::int32_t size = 1; size <= max_support; ++size) {
    for (std::int32_t below = 0; below < size; ++below) {
      RankCase found{size, below, {}};
      each_composition(denominator, size, [&](const std::int32_t *parts) {
        if (is_led(parts, size, below)) {
          found.weights.add(parts, size);
        }
      });
      cases.push_back(found);
    }
  }
}

void Model::take_tables(const vq_scq1_profile &profile) {
  if (num_codes > kMaxTableCodes || profile.other_cluster == nullptr ||
      profile.frequencies == nullptr) {
    fail(VQ_SCQ1_TABLES);
  }
  base_cluster.assign(profile.base_cluster, profile.base_cluster + num_codes);
  other_cluster.assign(profile.other_cluster, profile.other_cluster + num_codes);
  base_clusters = *std::max_element(base_cluster.begin(), base_cluster.end()) + 1;
  other_clusters = *std::max_element(other_cluster.begin(), other_cluster.end()) + 1;
  const auto outside = std::int32_t{1} + base_clusters;
  struct Wanted {
    Table *table;
    std::int32_t rows;
    std::int32_t alphabet;
  };
  std::vector<Wanted> wanted = {{&base, outside * outside, num_codes},
                                {&support, base_clusters, max_support},
                                {&mode, (kModes + 1) * (kModes + 1), kModes},
                                {&fresh, other_clusters, num_codes},
                                {&swap, other_clusters, num_codes}};
  if (max_support > 1) {
    wanted.push_back({&other, other_clusters, num_codes});
  }
  for (std::int32_t size = 2; size <= max_support; ++size) {
    const std::int32_t rows = partitions[size].count();
    const std::int32_t alphabet = compositions[size].count();
    wanted.push_back({&partition[size], 1, rows});
    wanted.push_back({&slot[size], 1, size});
    wanted.push_back({&reweight[size], rows, alphabet});
    wanted.push_back({&swap_weights[size], rows, alphabet});
  }
  std::size_t total = 0;
  std::int64_t given = 0;
  for (const Wanted &one : wanted) {
    if (one.alphabet > 1) {
      total += static_cast<std::size_t>(one.rows) * (static_cast<std::size_t>(one.alphabet) + 1);
      given += std::int64_t{one.rows} * one.alphabet;
    }
  }
  if (given != profile.num_frequencies) {
    fail(VQ_SCQ1_TABLES);
  }
  cumulative_.resize(total);
  const std::uint16_t *source = profile.frequencies;
  std::uint32_t *out = cumulative_.data();
  for (const Wanted &one : wanted) {
    if (one.alphabet <= 1) {
      continue;
    }
    *one.table = Table{out, one.rows, one.alphabet};
    for (std::int32_t row = 0; row < one.rows; ++row) {
      std::uint32_t sum = 0;
      *out++ = 0;
      for (std::int32_t symbol = 0; symbol < one.alphabet; ++symbol) {
        const std::uint32_t frequency = *source++;
        sum += frequency;
        if (frequency == 0 || sum > kTotal) {
          fail(VQ_SCQ1_TABLES);
        }
        *out++ = sum;
      }
      if (sum != kTotal) {
        fail(VQ_SCQ1_TABLES);
      }
    }
  }
}

std::vector<Tile> split_tiles(Grid grid, std::int32_t side) {
  const std::int32_t step = side > 0 ? side : std::max({1, grid.rows, grid.columns});
  std::vector<Tile> tiles;
  for (std::int32_t top = 0; top < grid.rows; top += step) {
    for (std::int32_t left = 0; left < grid.columns; left += step) {
      tiles.push_back({top, left,
                       {std::min(step, grid.rows - top), std::min(step, grid.columns - left)}});
    }
  }
  return tiles;
}

std::vector<Latent> read_latents(const Model &model, const std::int64_t *indices,
                                 const std::int64_t *numerators, std::int64_t count) {
  std::vector<Latent> latents(static_cast<std::size_t>(count));
  for (Latent &latent : latents) {
    std::int64_t sum = 0;
    for (std::int32_t i = 0; i < model.max_support; ++i, ++indices, ++numerators) {
      if (*indices < 0 || *indices >= model.num_codes || *numerators < 0 ||
          *numerators > model.denominator) {
        fail(VQ_SCQ1_ASSIGNMENT);
      }
      sum += *numerators;
      if (*numerators > 0) {
        const auto index = static_cast<std::int32_t>(*indices);
        if (std::find(latent.index, latent.index + latent.size, index) !=
            latent.index + latent.size) {
          fail(VQ_SCQ1_ASSIGNMENT);
        }
        latent.index[latent.size] = index;
        latent.numerator[latent.size++] = static_cast<std::int32_t>(*numerators);
      }
    }
    if (sum != model.denominator) {
      fail(VQ_SCQ1_ASSIGNMENT);
    }
    make_canonical(latent);
  }
  return latents;
}

namespace {

struct Crc16Table {
  std::uint16_t values[256];

  Crc16Table() {
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      std::uint32_t value = byte << 8;
      for (int bit = 0; bit < 8; ++bit) {
        value = (value & 0x8000u) != 0 ? (value << 1) ^ 0x1021u : value << 1;
      }
      values[byte] = static_cast<std::uint16_t>(value);
    }
  }
};

struct Crc32Table {
  std::uint32_t values[256];

  Crc32Table() {
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      std::uint32_t value = byte;
      for (int bit = 0; bit < 8; ++bit) {
        value = (value & 1u) != 0 ? (value >> 1) ^ 0xedb88320u : value >> 1;
      }
      values[byte] = value;
    }
  }
};

class Crc32 {
 public:
  void add(std::uint32_t byte) {
    static const Crc32Table table;
    value_ = table.values[(value_ ^ byte) & 255u] ^ (value_ >> 8);
  }
  void add16(std::uint32_t value) {
    add(value & 255u);
    add(value >> 8 & 255u);
  }
  std::uint32_t value() const { return ~value_; }

 private:
  std::uint32_t value_ = ~0u;
};

}  // namespace

std::uint16_t crc16(const std::uint8_t *bytes, std::size_t count, std::uint16_t start) {
  static const Crc16Table table;
  std::uint32_t value = start;
  for (std::size_t i = 0; i < count; ++i) {
    value = ((value << 8) ^ table.values[(value >> 8 ^ bytes[i]) & 255u]) & 0xffffu;
  }
  return static_cast<std::uint16_t>(value);
}

std::uint16_t frame_check(const std::uint8_t *codes, std::size_t end) {
  return crc16(codes + kFixedBytes, end - kFixedBytes, crc16(codes, 6, 0xffff));
}

std::uint32_t fingerprint(const Model &model, const std::vector<Latent> &latents, Grid grid) {
  Crc32 crc;
  crc.add16(static_cast<std::uint32_t>(grid.rows));
  crc.add16(static_cast<std::uint32_t>(grid.columns));
  for (const Latent &latent : latents) {
    for (std::int32_t i = 0; i < model.max_support; ++i) {
      const bool is_used = i < latent.size;
      crc.add16(static_cast<std::uint32_t>(latent.index[is_used ? i : 0]));
      crc.add(static_cast<std::uint32_t>(is_used ? latent.numerator[i] : 0));
    }
  }
  return crc.value();
}

}  // namespace vq::scq1
