// Packed matrices of every format against a scalar reference written here, for every tier this
// machine can run. Needs nothing but the library: the same program proves a build on a machine
// without Python. tests/engine/vqkernels/test_matrix.py covers more shapes.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "vqkernels.h"

namespace {

constexpr std::int32_t kActivationGroup = 128;
constexpr std::uint16_t kHalfScale = 0x2000;  // 2^-7

int failures = 0;

void expect(bool holds, const std::string &what) {
  if (!holds) {
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    ++failures;
  }
}

// One pass of integer weights [out][in] with a scale per row.
struct Stage {
  std::vector<std::int32_t> steps;
  std::vector<float> scales;
};

struct Layer {
  std::string name;
  vq_matrix_part part{};
  std::vector<std::uint8_t> codes;
  std::vector<std::uint16_t> scales, indices[2], codebooks[2];
  std::vector<std::int8_t> table;
  std::vector<Stage> stages;

  void point() {
    part.codes = codes.data();
    part.scales = scales.data();
    part.table = table.data();
    for (int s = 0; s < 2; ++s) {
      part.indices[s] = indices[s].data();
      part.codebooks[s] = codebooks[s].data();
    }
  }
};

Layer start_layer(std::int32_t kind, std::int32_t out, std::int32_t in) {
  Layer layer;
  layer.part.kind = kind;
  layer.part.in_features = in;
  layer.part.out_features = out;
  layer.part.codes_are_bytes = 1;
  layer.scales.assign(static_cast<std::size_t>(out), kHalfScale);
  return layer;
}

std::size_t at(std::int64_t row, std::int64_t column, std::int64_t columns) {
  return static_cast<std::size_t>(row * columns + column);
}

Layer make_grid(std::int32_t bits, std::int32_t out, std::int32_t in, std::mt19937 &random) {
  Layer layer = start_layer(VQ_MATRIX_GRID, out, in);
  layer.name = "grid" + std::to_string(bits);
  layer.part.bits = bits;
  layer.codes.resize(at(in, 0, out));
  Stage stage{std::vector<std::int32_t>(at(out, 0, in)),
              std::vector<float>(static_cast<std::size_t>(out), 0.0078125f)};
  for (std::int32_t k = 0; k < in; ++k) {
    for (std::int32_t n = 0; n < out; ++n) {
      const auto code = static_cast<std::int32_t>(random() & ((1u << bits) - 1u));
      layer.codes[at(k, n, out)] = static_cast<std::uint8_t>(code);
      stage.steps[at(n, k, in)] = code - (1 << (bits - 1));
    }
  }
  layer.stages.push_back(stage);
  return layer;
}

Layer make_layered(std::int32_t out, std::int32_t in, std::mt19937 &random) {
  Layer layer = start_layer(VQ_MATRIX_LAYERED, out, in);
  layer.name = "layered";
  Stage stage{{}, std::vector<float>(static_cast<std::size_t>(out), 0.0078125f)};
  for (std::int32_t i = 0; i < out * in; ++i) {
    layer.codes.push_back(static_cast<std::uint8_t>(random()));
    stage.steps.push_back(static_cast<std::int8_t>(layer.codes.back()));
  }
  layer.stages.push_back(stage);
  return layer;
}

Layer make_tcq(std::int32_t bits, std::int32_t out, std::int32_t in, std::mt19937 &random) {
  constexpr std::int32_t kTrellis = 12;
  Layer layer = start_layer(VQ_MATRIX_TCQ, out, in);
  layer.name = "tcq" + std::to_string(bits);
  layer.part.bits = bits;
  layer.part.trellis_bits = kTrellis;
  layer.part.multiplier = 2609;
  for (int i = 0; i < 256; ++i) layer.table.push_back(static_cast<std::int8_t>(random()));
  const std::int32_t bytes = (out * bits + 7) / 8;
  layer.codes.resize(at(in, 0, bytes));
  for (auto &byte : layer.codes) byte = static_cast<std::uint8_t>(random());
  Stage stage{std::vector<std::int32_t>(at(out, 0, in)),
              std::vector<float>(static_cast<std::size_t>(out), 0.0078125f)};
  for (std::int32_t k = 0; k < in; ++k) {
    std::uint32_t state = 0;
    for (std::int32_t n = 0; n < out; ++n) {
      std::uint32_t symbol = 0;
      for (std::int32_t b = 0; b < bits; ++b) {
        const std::int32_t bit = n * bits + b;
        symbol |= ((layer.codes[at(k, bit / 8, bytes)] >> (bit % 8)) & 1u) << b;
      }
      state = (state >> bits) | (symbol << (kTrellis - bits));
      stage.steps[at(n, k, in)] = layer.table[((state * 2609u) & 0xfffu) >> (kTrellis - 8)];
    }
  }
  layer.stages.push_back(stage);
  return layer;
}

// Codebook entries are step * 2^-10 with a largest step of 127, so that rounding keeps them.
void add_codebook(Layer &layer, int s, std::int32_t num_codes, std::mt19937 &random) {
  const std::int32_t v = layer.part.vector_length;
  const std::int32_t out = layer.part.out_features, in = layer.part.in_features;
  layer.part.num_codes[s] = num_codes;
  std::vector<std::int32_t> steps;
  for (std::int32_t i = 0; i < num_codes * v; ++i) {
    steps.push_back(i < v ? 127 : static_cast<std::int32_t>(random() % 255u) - 127);
    // binary16 of a whole number below 2^11 times 2^-10, by hand: sign, exponent, fraction
    const int magnitude = std::abs(steps.back());
    int exponent = 0;
    const double fraction = magnitude == 0 ? 0.0 : std::frexp(magnitude, &exponent) * 2.0 - 1.0;
    const unsigned bits = magnitude == 0 ? 0u
                                         : (static_cast<unsigned>(exponent - 1 - 10 + 15) << 10) |
                                               static_cast<unsigned>(fraction * 1024.0);
    layer.codebooks[s].push_back(
        static_cast<std::uint16_t>(bits | (steps.back() < 0 ? 0x8000u : 0u)));
  }
  Stage stage{std::vector<std::int32_t>(at(out, 0, in)),
              std::vector<float>(static_cast<std::size_t>(out), 127.0f / 1024.0f / 127.0f)};
  const std::int32_t rows = (out + v - 1) / v;
  for (std::int32_t row = 0; row < rows; ++row) {
    for (std::int32_t k = 0; k < in; ++k) {
      const auto index = static_cast<std::int32_t>(random() % static_cast<unsigned>(num_codes));
      layer.indices[s].push_back(static_cast<std::uint16_t>(index));
      for (std::int32_t i = 0; i < v && row * v + i < out; ++i) {
        stage.steps[at(row * v + i, k, in)] = steps[static_cast<std::size_t>(index * v + i)];
      }
    }
  }
  layer.stages.push_back(stage);
}

Layer make_vq(std::int32_t length, std::vector<std::int32_t> sizes, std::int32_t out,
              std::int32_t in, std::mt19937 &random) {
  Layer layer = start_layer(VQ_MATRIX_VQ, out, in);
  layer.name = "vq" + std::to_string(length) + " of " + std::to_string(sizes[0]);
  layer.part.vector_length = length;
  layer.part.num_stages = static_cast<std::int32_t>(sizes.size());
  for (int s = 0; s < layer.part.num_stages; ++s) {
    add_codebook(layer, s, sizes[static_cast<std::size_t>(s)], random);
  }
  return layer;
}

// One row of activations to int8, by the formula of the header.
void quantize(const std::vector<float> &x, std::vector<std::int8_t> &q,
              std::vector<float> &scales) {
  for (std::size_t begin = 0, g = 0; begin < x.size(); begin += kActivationGroup, ++g) {
    const std::size_t end = std::min<std::size_t>(x.size(), begin + kActivationGroup);
    float largest = 0.0f;
    for (std::size_t k = begin; k < end; ++k) largest = std::max(largest, std::fabs(x[k]));
    scales[g] = largest / 127.0f;
    for (std::size_t k = begin; k < end; ++k) {
      q[k] = static_cast<std::int8_t>(std::nearbyint(x[k] * (127.0f / largest)));
    }
  }
}

// The formula of the header, in its order, one output at a time.
std::vector<float> reference_row(const Layer &layer, const float *x) {
  const std::int32_t in = layer.part.in_features, out = layer.part.out_features;
  const std::int32_t groups = (in + kActivationGroup - 1) / kActivationGroup;
  std::vector<std::int8_t> q(static_cast<std::size_t>(in));
  std::vector<float> x_scales(static_cast<std::size_t>(groups));
  quantize({x, x + in}, q, x_scales);
  std::vector<float> y(static_cast<std::size_t>(out), 0.0f);
  for (std::int32_t n = 0; n < out; ++n) {
    for (std::size_t s = 0; s < layer.stages.size(); ++s) {
      float sum = 0.0f;
      for (std::int32_t g = 0; g < groups; ++g) {
        std::int32_t dot = 0;
        for (std::int32_t k = g * kActivationGroup; k < std::min(in, (g + 1) * kActivationGroup);
             ++k) {
          dot += q[static_cast<std::size_t>(k)] * layer.stages[s].steps[at(n, k, in)];
        }
        sum += static_cast<float>(dot) * (layer.stages[s].scales[static_cast<std::size_t>(n)] *
                                          x_scales[static_cast<std::size_t>(g)]);
      }
      float &result = y[static_cast<std::size_t>(n)];
      result = s == 0 ? sum : result + sum;
    }
  }
  return y;
}

void check_layer(Layer &layer, std::int32_t batch, vq_pool *pool, std::mt19937 &random) {
  layer.point();
  const std::int32_t in = layer.part.in_features, out = layer.part.out_features;
  std::normal_distribution<float> normal;
  std::vector<float> x(at(batch, 0, in)), expected;
  for (auto &value : x) value = normal(random);
  for (std::int32_t row = 0; row < batch; ++row) {
    const auto y = reference_row(layer, x.data() + at(row, 0, in));
    expected.insert(expected.end(), y.begin(), y.end());
  }
  vq_matrix *matrix = nullptr;
  expect(vq_matrix_create(&layer.part, 1, nullptr, nullptr, 0, &matrix) == VQ_OK,
         "pack " + layer.name);
  for (std::int32_t isa = VQ_ISA_BASELINE; isa <= VQ_ISA_AVX512_VBMI; ++isa) {
    if (vq_isa_supported(isa) == 0) continue;
    expect(vq_set_isa(isa) == VQ_OK && vq_get_isa() == isa, "force a supported tier");
    constexpr float kGuard = -12345.0f;
    std::vector<float> y(expected.size() + 1, kGuard);
    expect(vq_matrix_multiply(matrix, x.data(), batch, y.data(), 0, pool) == VQ_OK, "multiply");
    const std::string what = layer.name + " " + std::to_string(out) + "x" + std::to_string(in) +
                             " batch " + std::to_string(batch) + " " + vq_isa_name(isa);
    expect(std::memcmp(y.data(), expected.data(), expected.size() * sizeof(float)) == 0,
           what + " equals the reference bit for bit");
    expect(y.back() == kGuard, what + " writes only its outputs");
  }
  vq_matrix_free(matrix);
}

void test_formats(vq_pool *pool) {
  std::mt19937 random(7);
  const std::int32_t shapes[][3] = {{1, 1, 1}, {33, 300, 1}, {50, 40, 3}, {70, 576, 9}};
  for (const auto &shape : shapes) {
    std::vector<Layer> layers;
    for (const std::int32_t bits : {2, 3, 4, 8}) {
      layers.push_back(make_grid(bits, shape[0], shape[1], random));
    }
    layers.push_back(make_layered(shape[0], shape[1], random));
    for (std::int32_t bits = 1; bits <= 5; ++bits) {
      layers.push_back(make_tcq(bits, shape[0], shape[1], random));
    }
    for (const std::int32_t length : {1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16}) {
      layers.push_back(make_vq(length, {256, 64}, shape[0], shape[1], random));
      layers.push_back(make_vq(length, {1000}, shape[0], shape[1], random));
    }
    for (Layer &layer : layers) check_layer(layer, shape[2], pool, random);
  }
}

void test_bad_arguments() {
  std::mt19937 random(3);
  Layer layer = make_grid(4, 16, 64, random);
  layer.point();
  vq_matrix *matrix = nullptr;
  std::int64_t bytes = 0;
  expect(vq_matrix_get_size(nullptr, 1, &bytes) == VQ_ERR_NULL, "no parts");
  expect(vq_matrix_get_size(&layer.part, 1, nullptr) == VQ_ERR_NULL, "no place for the size");
  expect(vq_matrix_create(&layer.part, 0, nullptr, nullptr, 0, &matrix) == VQ_ERR_SHAPE, "0 parts");
  expect(vq_matrix_create(&layer.part, 1, nullptr, nullptr, 1, &matrix) == VQ_ERR_NULL,
         "packed memory is missing");
  layer.part.bits = 5;
  expect(vq_matrix_create(&layer.part, 1, nullptr, nullptr, 0, &matrix) == VQ_ERR_SHAPE, "5 bits");
  layer.part.bits = 4;
  layer.part.group_size = 48;
  expect(vq_matrix_create(&layer.part, 1, nullptr, nullptr, 0, &matrix) == VQ_ERR_SHAPE,
         "a group that segments do not divide");
  layer.part.group_size = 0;
  vq_matrix_part beside[2] = {layer.part, layer.part};
  beside[1].extends_columns = 1;
  expect(vq_matrix_create(beside, 2, nullptr, nullptr, 0, &matrix) == VQ_ERR_SHAPE,
         "only vectors lie side by side");
  layer.part.extends_columns = 1;
  expect(vq_matrix_create(&layer.part, 1, nullptr, nullptr, 0, &matrix) == VQ_ERR_SHAPE,
         "the first part extends none");
  layer.part.extends_columns = 0;
  layer.part.kind = 9;
  expect(vq_matrix_create(&layer.part, 1, nullptr, nullptr, 0, &matrix) == VQ_ERR_SHAPE, "kind 9");
  layer.part.kind = VQ_MATRIX_GRID;
  std::vector<std::int32_t> order(64, 64);
  const vq_matrix_transform input{order.data(), nullptr, nullptr, nullptr};
  expect(vq_matrix_create(&layer.part, 1, &input, nullptr, 0, &matrix) == VQ_ERR_SHAPE,
         "a permutation out of range");
  expect(vq_matrix_create(&layer.part, 1, nullptr, nullptr, 0, &matrix) == VQ_OK, "a good part");
  std::vector<float> x(64, 1.0f), y(64);
  expect(vq_matrix_multiply(matrix, x.data(), 0, y.data(), 0, nullptr) == VQ_ERR_SHAPE, "batch 0");
  expect(vq_matrix_multiply(matrix, nullptr, 1, y.data(), 0, nullptr) == VQ_ERR_NULL, "no x");
  x[3] = std::numeric_limits<float>::quiet_NaN();
  expect(vq_matrix_multiply(matrix, x.data(), 1, y.data(), 0, nullptr) == VQ_ERR_NONFINITE, "NaN");
  const std::int32_t row = 16;
  expect(vq_matrix_read_rows(matrix, &row, 1, y.data()) == VQ_ERR_SHAPE, "a row out of range");
  vq_matrix_free(matrix);
  vq_matrix_free(nullptr);
}

// Memory that one matrix packed serves another one.
void test_packed_memory_is_reusable() {
  std::mt19937 random(5);
  Layer layer = make_vq(8, {256, 256}, 40, 96, random);
  layer.point();
  std::int64_t bytes = 0;
  expect(vq_matrix_get_size(&layer.part, 1, &bytes) == VQ_OK && bytes % 64 == 0, "size");
  std::vector<std::uint8_t> raw(static_cast<std::size_t>(bytes) + 64);
  std::uint8_t *memory = raw.data() + (64 - reinterpret_cast<std::uintptr_t>(raw.data()) % 64) % 64;
  const std::vector<float> x(96, 0.5f);
  std::vector<float> first(40), second(40);
  vq_matrix *matrix = nullptr;
  expect(vq_matrix_create(&layer.part, 1, nullptr, memory, 0, &matrix) == VQ_OK, "pack");
  expect(vq_matrix_multiply(matrix, x.data(), 1, first.data(), 0, nullptr) == VQ_OK, "multiply");
  vq_matrix_free(matrix);
  layer.part.indices[0] = layer.part.indices[1] = nullptr;
  expect(vq_matrix_create(&layer.part, 1, nullptr, memory, 1, &matrix) == VQ_OK, "reuse");
  expect(vq_matrix_multiply(matrix, x.data(), 1, second.data(), 0, nullptr) == VQ_OK, "multiply");
  expect(first == second, "reused memory gives the same result");
  vq_matrix_free(matrix);
}

void test_pool_is_shared_by_threads(vq_pool *pool) {
  std::mt19937 random(5);
  Layer layer = make_grid(4, 64, 256, random);
  layer.point();
  const std::vector<float> x(256, 0.5f);
  const auto expected = reference_row(layer, x.data());
  vq_matrix *matrix = nullptr;
  expect(vq_matrix_create(&layer.part, 1, nullptr, nullptr, 0, &matrix) == VQ_OK, "pack");
  std::vector<int> wrong(3, 0);
  std::vector<std::thread> callers;
  for (std::size_t caller = 0; caller < wrong.size(); ++caller) {
    callers.emplace_back([&, caller] {
      std::vector<float> y(64);
      for (int call = 0; call < 200; ++call) {
        vq_matrix_multiply(matrix, x.data(), 1, y.data(), 0, pool);
        wrong[caller] += y == expected ? 0 : 1;
      }
    });
  }
  for (auto &caller : callers) caller.join();
  for (const int count : wrong) expect(count == 0, "concurrent calls on one pool");
  vq_matrix_free(matrix);
}

void test_tiers_and_pools_are_refused() {
  vq_pool *pool = nullptr;
  expect(vq_set_isa(99) == VQ_ERR_ISA && vq_set_isa(-2) == VQ_ERR_ISA, "unknown tier");
  expect(vq_set_isa(VQ_ISA_AUTO) == VQ_OK, "automatic tier");
  expect(vq_pool_create(0, &pool) == VQ_ERR_SHAPE && pool == nullptr, "a pool needs a thread");
}

}  // namespace

int main() {
  expect(vq_abi_version() == VQ_ABI_VERSION, "header and library agree");
  vq_pool *pool = nullptr;
  expect(vq_pool_create(3, &pool) == VQ_OK, "create a pool");
  test_formats(nullptr);
  test_formats(pool);
  test_bad_arguments();
  test_packed_memory_is_reusable();
  test_pool_is_shared_by_threads(pool);
  test_tiers_and_pools_are_refused();
  vq_pool_free(pool);
  std::printf("%s: %d failures\n", failures == 0 ? "ok" : "FAILED", failures);
  return failures == 0 ? 0 : 1;
}
