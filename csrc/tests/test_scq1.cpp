// SCQ1 through the C ABI: random models and codes survive the round trip, hostile bytes do no harm.
// Checks are made to fit again after half of the mutations, so that these reach the entropy coder.
// With the sanitizers this is the fuzzer: `test_scq1 10000000` feeds ten million mutated bytes.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "vqkernels.h"

namespace {

using Random = std::mt19937;
using Bytes = std::vector<std::uint8_t>;

int failures = 0;

void expect(bool holds, const std::string &what) {
  if (!holds) {
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    ++failures;
  }
}

std::int32_t below(Random &random, std::int32_t limit) {
  return static_cast<std::int32_t>(random() % static_cast<std::uint32_t>(limit));
}

struct Sizes {
  std::int32_t num_codes, max_support, denominator;
};

// C(n - 1, t - 1), and the number of partitions of n into t parts.
std::int32_t num_compositions(std::int32_t n, std::int32_t t) {
  std::int32_t value = 1;
  for (std::int32_t i = 1; i < t; ++i) value = value * (n - i) / i;
  return value;
}

std::int32_t num_partitions(std::int32_t n, std::int32_t t, std::int32_t most) {
  if (t == 1) return n >= 1 && n <= most ? 1 : 0;
  std::int32_t count = 0;
  for (std::int32_t first = 1; first <= std::min(n, most); ++first) {
    count += num_partitions(n - first, t - 1, first);
  }
  return count;
}

void add_table(std::int32_t rows, std::int32_t alphabet, Random &random,
               std::vector<std::uint16_t> &out) {
  if (alphabet < 2) return;
  for (std::int32_t row = 0; row < rows; ++row) {
    const std::size_t first = out.size();
    std::int32_t left = 65536 - alphabet;
    for (std::int32_t symbol = 0; symbol < alphabet; ++symbol) {
      const std::int32_t extra = below(random, left / 4 + 1);
      out.push_back(static_cast<std::uint16_t>(1 + extra));
      left -= extra;
    }
    out[first + static_cast<std::size_t>(below(random, alphabet))] +=
        static_cast<std::uint16_t>(left);
  }
}

struct World {
  Sizes sizes;
  std::vector<std::uint16_t> base_cluster, other_cluster, frequencies;
  vq_scq1_model *model = nullptr;

  World(Sizes wanted, bool has_tables, Random &random) : sizes(wanted) {
    const std::int32_t clusters = std::min(3, sizes.num_codes);
    for (std::int32_t i = 0; i < sizes.num_codes; ++i) {
      base_cluster.push_back(static_cast<std::uint16_t>(i % clusters));
      other_cluster.push_back(static_cast<std::uint16_t>((i / 2) % clusters));
    }
    const std::int32_t others = *std::max_element(other_cluster.begin(), other_cluster.end()) + 1;
    add_table((clusters + 1) * (clusters + 1), sizes.num_codes, random, frequencies);
    add_table(clusters, sizes.max_support, random, frequencies);
    add_table(25, 4, random, frequencies);
    add_table(others, sizes.num_codes, random, frequencies);
    add_table(others, sizes.num_codes, random, frequencies);
    if (sizes.max_support > 1) add_table(others, sizes.num_codes, random, frequencies);
    for (std::int32_t t = 2; t <= sizes.max_support; ++t) {
      const std::int32_t rows = num_partitions(sizes.denominator, t, sizes.denominator);
      const std::int32_t alphabet = num_compositions(sizes.denominator, t);
      add_table(1, rows, random, frequencies);
      add_table(1, t, random, frequencies);
      add_table(rows, alphabet, random, frequencies);
      add_table(rows, alphabet, random, frequencies);
    }
    vq_scq1_profile profile{sizes.num_codes,      sizes.max_support, sizes.denominator, 0, nullptr,
                            other_cluster.data(), frequencies.data(),
                            static_cast<std::int64_t>(frequencies.size())};
    profile.base_cluster = has_tables ? base_cluster.data() : nullptr;
    expect(vq_scq1_open(&profile, &model) == VQ_OK, "a valid profile opens");
  }
  ~World() { vq_scq1_close(model); }
  World(const World &) = delete;
  World &operator=(const World &) = delete;
};

struct Codes {
  std::vector<std::int64_t> indices, numerators;
};

// Random codes with every slot in canonical order.
Codes random_codes(const Sizes &sizes, std::int64_t count, Random &random) {
  Codes codes;
  for (std::int64_t at = 0; at < count; ++at) {
    const std::int32_t t = 1 + below(random, sizes.max_support);
    std::vector<std::pair<std::int64_t, std::int64_t>> slots;  // -numerator, index
    for (std::int32_t i = 0; i < t; ++i) {
      std::int64_t index = below(random, sizes.num_codes);
      while (std::any_of(slots.begin(), slots.end(),
                         [&](const auto &slot) { return slot.second == index; })) {
        index = (index + 1) % sizes.num_codes;
      }
      slots.emplace_back(-1, index);
    }
    for (std::int32_t rest = sizes.denominator - t; rest > 0; --rest) {
      --slots[static_cast<std::size_t>(below(random, t))].first;
    }
    std::sort(slots.begin(), slots.end());
    for (std::int32_t i = 0; i < sizes.max_support; ++i) {
      const bool is_used = i < t;
      codes.indices.push_back(slots[is_used ? static_cast<std::size_t>(i) : 0].second);
      codes.numerators.push_back(is_used ? -slots[static_cast<std::size_t>(i)].first : 0);
    }
  }
  return codes;
}

struct Packed {
  Bytes bytes;
  std::size_t base_end = 0;
};

Packed pack(const World &world, const Codes &now, const Codes *before, std::int32_t rows,
            std::int32_t columns, std::int32_t tile, std::int32_t entropy) {
  Bytes out(static_cast<std::size_t>(64 + 56 * rows * columns));
  std::int32_t state[7] = {};
  std::int32_t reason = -1;
  vq_scq1_request request{};
  request.indices = now.indices.data();
  request.numerators = now.numerators.data();
  request.reference_indices = before != nullptr ? before->indices.data() : nullptr;
  request.reference_numerators = before != nullptr ? before->numerators.data() : nullptr;
  request.rows = rows;
  request.columns = columns;
  request.width = 300;
  request.height = 7;
  request.tile = tile;
  request.entropy = entropy;
  request.codes = out.data();
  request.capacity = static_cast<std::int64_t>(out.size());
  request.state = state;
  expect(vq_scq1_pack(world.model, &request, &reason) == VQ_OK && reason == VQ_SCQ1_GOOD, "packs");
  out.resize(static_cast<std::size_t>(state[0]));
  return {out, static_cast<std::size_t>(state[1])};
}

std::int32_t unpack(const World &world, const Bytes &bytes, const Codes *before, std::int32_t rows,
                    std::int32_t columns, bool allow_partial, Codes &out, bool &complete) {
  const auto count = static_cast<std::size_t>(rows) * columns * world.sizes.max_support;
  out.indices.assign(count, -7);
  out.numerators.assign(count, -7);
  // A copy of exactly the right size lets the address sanitizer see reads beyond the end.
  std::uint8_t *copy = new std::uint8_t[bytes.size()];
  std::copy(bytes.begin(), bytes.end(), copy);
  std::int32_t state = 0;
  std::int32_t reason = -1;
  const vq_scq1_frame frame{copy,
                            static_cast<std::int64_t>(bytes.size()),
                            rows,
                            columns,
                            before != nullptr ? before->indices.data() : nullptr,
                            before != nullptr ? before->numerators.data() : nullptr,
                            out.indices.data(),
                            out.numerators.data(),
                            &state,
                            allow_partial ? 1 : 0};
  expect(vq_scq1_unpack(world.model, &frame, &reason) == VQ_OK, "unpack returns");
  delete[] copy;
  complete = state == 1;
  return reason;
}

void expect_legal(const World &world, const Codes &codes) {
  const Sizes &sizes = world.sizes;
  for (std::size_t at = 0; at < codes.indices.size(); at += sizes.max_support) {
    std::int64_t sum = 0;
    bool is_legal = true;
    for (std::int32_t i = 0; i < sizes.max_support; ++i) {
      const std::int64_t index = codes.indices[at + i];
      is_legal = is_legal && index >= 0 && index < sizes.num_codes;
      sum += codes.numerators[at + i];
    }
    expect(is_legal && sum == sizes.denominator, "decoded codes are of the model");
  }
}

std::uint16_t crc16(const Bytes &bytes, std::size_t end) {
  std::uint32_t value = 0xffff;
  for (std::size_t i = 0; i < end; ++i) {
    if (i >= 6 && i < 10) continue;
    value ^= static_cast<std::uint32_t>(bytes[i]) << 8;
    for (int bit = 0; bit < 8; ++bit) {
      value = (value & 0x8000u) != 0 ? (value << 1) ^ 0x1021u : value << 1;
    }
    value &= 0xffffu;
  }
  return static_cast<std::uint16_t>(value);
}

void reseal(Bytes &bytes, std::size_t base_end) {
  if (bytes.size() < 10) return;
  const std::uint16_t base = crc16(bytes, std::min(base_end, bytes.size()));
  const std::uint16_t full = crc16(bytes, bytes.size());
  bytes[6] = static_cast<std::uint8_t>(base & 255u);
  bytes[7] = static_cast<std::uint8_t>(base >> 8);
  bytes[8] = static_cast<std::uint8_t>(full & 255u);
  bytes[9] = static_cast<std::uint8_t>(full >> 8);
}

Bytes mutate(const Packed &packed, Random &random) {
  Bytes bytes = packed.bytes;
  for (std::int32_t count = 1 + below(random, 4); count > 0 && !bytes.empty(); --count) {
    const std::size_t at = random() % bytes.size();
    switch (below(random, 8)) {
      case 0:
        bytes.resize(at);
        break;
      case 1:
        bytes.insert(bytes.begin() + static_cast<std::ptrdiff_t>(at),
                     static_cast<std::uint8_t>(random()));
        break;
      case 2:
        bytes[at] = 255;
        break;
      default:
        bytes[at] = static_cast<std::uint8_t>(random());
    }
  }
  if (below(random, 2) == 0) reseal(bytes, packed.base_end);
  return bytes;
}

// Returns how many mutated bytes were fed.
std::int64_t run(const Sizes &sizes, Random &random) {
  const bool has_tables = sizes.num_codes <= 8192;
  const World world(sizes, has_tables, random);
  const std::int32_t rows = 1 + below(random, 12);
  const std::int32_t columns = 1 + below(random, 12);
  const std::int32_t tile = below(random, 2) * (1 + below(random, 5));
  const Codes now = random_codes(sizes, std::int64_t{rows} * columns, random);
  Codes before = random_codes(sizes, std::int64_t{rows} * columns, random);
  for (std::size_t at = 0; at < now.indices.size(); at += sizes.max_support) {
    if (below(random, 2) == 0) {  // half of the latents stay
      for (std::int32_t i = 0; i < sizes.max_support; ++i) {
        before.indices[at + i] = now.indices[at + i];
        before.numerators[at + i] = now.numerators[at + i];
      }
    }
  }
  std::int64_t fed = 0;
  for (std::int32_t kind = has_tables ? 2 : 0; kind >= 0; --kind) {
    const Codes *reference = kind == 2 ? &before : nullptr;
    const std::int32_t entropy = kind == 0 ? VQ_SCQ1_RAW : VQ_SCQ1_RANS;
    const Packed packed = pack(world, now, reference, rows, columns, tile, entropy);
    Codes out;
    bool complete = false;
    expect(unpack(world, packed.bytes, reference, rows, columns, false, out, complete) ==
                   VQ_SCQ1_GOOD &&
               complete && out.indices == now.indices && out.numerators == now.numerators,
           "a frame decodes to what was packed");
    for (int i = 0; i < 40; ++i) {
      const Bytes bytes = mutate(packed, random);
      fed += static_cast<std::int64_t>(bytes.size());
      if (unpack(world, bytes, reference, rows, columns, i % 2 == 0, out, complete) ==
          VQ_SCQ1_GOOD) {
        expect_legal(world, out);
      }
    }
  }
  return fed;
}

}  // namespace

int main(int argc, char **argv) {
  const std::int64_t wanted = argc > 1 ? std::atoll(argv[1]) : 300000;
  const Sizes all[] = {{2, 1, 1},  {5, 1, 4},    {3, 2, 2},   {12, 2, 4},   {24, 3, 4},
                       {16, 4, 8}, {40, 4, 16},  {90, 2, 16}, {256, 2, 8},  {300, 3, 8},
                       {4, 4, 4},  {9000, 4, 16}};
  Random random(1);
  std::int64_t fed = 0;
  while (fed < wanted && failures == 0) {
    for (const Sizes &sizes : all) fed += run(sizes, random);
  }
  std::printf("%s: %lld mutated bytes, %d failures\n", failures == 0 ? "ok" : "FAILED",
              static_cast<long long>(fed), failures);
  return failures == 0 ? 0 : 1;
}
