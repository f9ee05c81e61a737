// The C ABI against a scalar reference written here, for every tier this machine can run.
// Needs nothing but the library: the same program proves a build on a machine without Python.
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

int failures = 0;

void expect(bool holds, const std::string &what) {
  if (!holds) {
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    ++failures;
  }
}

struct Layer {
  std::int32_t in_features, out_features, group_size;
  bool has_zeros;
  std::vector<std::int32_t> qweight, qzeros;
  std::vector<float> scales;
  vq_q4_sizes sizes{};
  std::vector<std::uint8_t> codes, packed_zeros;
  std::vector<float> packed_scales;

  std::int64_t words_per_row() const { return (out_features + 7) / 8; }
  int code(std::int64_t k, std::int64_t n) const {
    return static_cast<int>(
        (static_cast<std::uint32_t>(qweight[k / 8 * out_features + n]) >> (4 * (k % 8))) & 15u);
  }
  int zero(std::int64_t g, std::int64_t n) const {
    if (!has_zeros) {
      return 8;
    }
    const auto word = static_cast<std::uint32_t>(qzeros[g * words_per_row() + n / 8]);
    return static_cast<int>(((word >> (4 * (n % 8))) + 1) & 15u);
  }
  vq_gptq_q4 source() const {
    return {in_features,    out_features,
            group_size,     1,
            qweight.data(), has_zeros ? qzeros.data() : nullptr,
            scales.data()};
  }
  vq_q4_matrix matrix() const {
    return {in_features,
            out_features,
            group_size,
            0,
            codes.data(),
            packed_scales.data(),
            has_zeros ? packed_zeros.data() : nullptr};
  }
};

Layer make_layer(std::int32_t in, std::int32_t out, std::int32_t group, bool has_zeros,
                 std::mt19937 &random) {
  Layer layer{in, out, group, has_zeros, {}, {}, {}, {}, {}, {}, {}};
  expect(vq_q4_get_sizes(in, out, group, &layer.sizes) == VQ_OK, "sizes of a valid shape");
  layer.qweight.resize(static_cast<std::size_t>(in / 8) * out);
  layer.qzeros.resize(static_cast<std::size_t>(layer.sizes.num_groups * layer.words_per_row()));
  layer.scales.resize(static_cast<std::size_t>(layer.sizes.num_groups) * out);
  for (auto &word : layer.qweight) word = static_cast<std::int32_t>(random());
  for (auto &word : layer.qzeros) word = static_cast<std::int32_t>(random());
  std::uniform_real_distribution<float> uniform(0.001f, 0.02f);
  for (auto &scale : layer.scales) scale = uniform(random);
  layer.codes.resize(static_cast<std::size_t>(layer.sizes.codes_bytes));
  layer.packed_scales.resize(static_cast<std::size_t>(layer.sizes.num_scales));
  layer.packed_zeros.resize(static_cast<std::size_t>(layer.sizes.num_scales));
  const vq_gptq_q4 source = layer.source();
  expect(vq_q4_pack_gptq(&source, layer.codes.data(), layer.packed_scales.data(),
                         layer.packed_zeros.data()) == VQ_OK,
         "pack a valid layer");
  return layer;
}

// The formula of the header, in its order, one output at a time.
std::vector<float> reference_row(const Layer &layer, const float *x) {
  const auto groups = static_cast<std::size_t>(layer.sizes.num_groups);
  std::vector<std::int8_t> q(static_cast<std::size_t>(layer.in_features));
  std::vector<float> x_scales(groups), y(static_cast<std::size_t>(layer.out_features), 0.0f);
  std::vector<std::int32_t> sums(groups);
  expect(vq_q8_quantize(x, layer.in_features, layer.group_size, q.data(), x_scales.data(),
                        sums.data()) == VQ_OK,
         "quantize finite activations");
  for (std::int32_t n = 0; n < layer.out_features; ++n) {
    for (std::int64_t g = 0; g < layer.sizes.num_groups; ++g) {
      std::int32_t dot = 0;
      for (std::int64_t k = g * layer.group_size;
           k < std::min<std::int64_t>(layer.in_features, (g + 1) * layer.group_size); ++k) {
        dot += q[static_cast<std::size_t>(k)] * (layer.code(k, n) - layer.zero(g, n));
      }
      const float scale = layer.scales[g * layer.out_features + n] * x_scales[g];
      y[n] += static_cast<float>(dot) * scale;
    }
  }
  return y;
}

void check_layer(const Layer &layer, std::int32_t batch, vq_pool *pool, std::mt19937 &random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<std::size_t>(batch) * layer.in_features);
  for (auto &value : x) value = normal(random);
  x[0] = 0.0f;
  std::vector<float> expected;
  for (std::int32_t row = 0; row < batch; ++row) {
    const auto y = reference_row(layer, x.data() + std::int64_t{row} * layer.in_features);
    expected.insert(expected.end(), y.begin(), y.end());
  }
  const vq_q4_matrix matrix = layer.matrix();
  for (std::int32_t isa = VQ_ISA_BASELINE; isa <= VQ_ISA_AVX512_VNNI; ++isa) {
    if (vq_isa_supported(isa) == 0) continue;
    expect(vq_set_isa(isa) == VQ_OK && vq_get_isa() == isa, "force a supported tier");
    constexpr float kGuard = -12345.0f;
    std::vector<float> y(expected.size() + 1, kGuard);
    expect(vq_q4_gemv(&matrix, x.data(), batch, y.data(), pool) == VQ_OK, "gemv");
    const std::string what =
        std::string(vq_isa_name(isa)) + " " + std::to_string(layer.out_features) + "x" +
        std::to_string(layer.in_features) + " group " + std::to_string(layer.group_size);
    expect(std::memcmp(y.data(), expected.data(), expected.size() * sizeof(float)) == 0,
           what + " equals the reference bit for bit");
    expect(y.back() == kGuard, what + " writes only its outputs");
  }
}

void test_shapes(vq_pool *pool) {
  std::mt19937 random(7);
  const std::int32_t shapes[][3] = {{8, 1, 8},       {576, 33, 128},  {576, 16, 576},
                                    {1536, 15, 128}, {64, 48, 128},   {72, 17, 32},
                                    {1032, 5, 128},  {2048, 40, 2048}};
  for (const auto &shape : shapes) {
    for (const bool has_zeros : {false, true}) {
      const Layer layer = make_layer(shape[0], shape[1], shape[2], has_zeros, random);
      check_layer(layer, 1, pool, random);
      check_layer(layer, 3, pool, random);
    }
  }
}

// All codes 15 and all activations at the limit: the largest sums the 16-bit partials must hold.
void test_extreme_values_do_not_overflow() {
  std::mt19937 random(1);
  Layer layer = make_layer(4096, 16, 4096, false, random);
  for (auto &word : layer.qweight) word = -1;
  const vq_gptq_q4 source = layer.source();
  vq_q4_pack_gptq(&source, layer.codes.data(), layer.packed_scales.data(), nullptr);
  const vq_q4_matrix matrix = layer.matrix();
  for (const float sign : {1.0f, -1.0f}) {
    const std::vector<float> x(4096, sign);
    const auto expected = reference_row(layer, x.data());
    for (std::int32_t isa = VQ_ISA_BASELINE; isa <= VQ_ISA_AVX512_VNNI; ++isa) {
      if (vq_set_isa(isa) != VQ_OK) continue;
      std::vector<float> y(16);
      expect(vq_q4_gemv(&matrix, x.data(), 1, y.data(), nullptr) == VQ_OK, "gemv of extremes");
      expect(y == expected, std::string(vq_isa_name(isa)) + " keeps extreme sums exact");
    }
  }
}

void test_bad_arguments() {
  std::mt19937 random(3);
  const Layer layer = make_layer(16, 16, 8, true, random);
  vq_q4_matrix matrix = layer.matrix();
  std::vector<float> x(16, 1.0f), y(16);
  vq_q4_sizes sizes;
  vq_pool *pool = nullptr;
  expect(vq_q4_get_sizes(12, 16, 8, &sizes) == VQ_ERR_SHAPE, "in_features must be whole chunks");
  expect(vq_q4_get_sizes(16, 0, 8, &sizes) == VQ_ERR_SHAPE, "out_features must be positive");
  expect(vq_q4_get_sizes(16, 16, 12, &sizes) == VQ_ERR_SHAPE, "group_size must be whole chunks");
  expect(vq_q4_get_sizes(16, 16, 8, nullptr) == VQ_ERR_NULL, "sizes must not be NULL");
  expect(vq_q4_gemv(nullptr, x.data(), 1, y.data(), nullptr) == VQ_ERR_NULL, "matrix is NULL");
  expect(vq_q4_gemv(&matrix, x.data(), 0, y.data(), nullptr) == VQ_ERR_SHAPE, "batch is 0");
  x[3] = std::numeric_limits<float>::quiet_NaN();
  expect(vq_q4_gemv(&matrix, x.data(), 1, y.data(), nullptr) == VQ_ERR_NONFINITE, "NaN");
  x[3] = -std::numeric_limits<float>::infinity();
  expect(vq_q4_gemv(&matrix, x.data(), 1, y.data(), nullptr) == VQ_ERR_NONFINITE, "infinity");
  expect(vq_set_isa(99) == VQ_ERR_ISA && vq_set_isa(-2) == VQ_ERR_ISA, "unknown tier");
  expect(vq_set_isa(VQ_ISA_AUTO) == VQ_OK, "automatic tier");
  expect(vq_pool_create(0, &pool) == VQ_ERR_SHAPE && pool == nullptr, "a pool needs a thread");
  vq_gptq_q4 source = layer.source();
  source.zero_offset = 2;
  expect(vq_q4_pack_gptq(&source, nullptr, nullptr, nullptr) == VQ_ERR_NULL, "pack into NULL");
  std::vector<std::uint8_t> codes(layer.codes.size()), zeros(layer.packed_zeros.size());
  std::vector<float> scales(layer.packed_scales.size());
  expect(vq_q4_pack_gptq(&source, codes.data(), scales.data(), zeros.data()) == VQ_ERR_ZERO_OFFSET,
         "zero_offset is checked");
}

void test_pool_is_shared_by_threads(vq_pool *pool) {
  std::mt19937 random(5);
  const Layer layer = make_layer(256, 64, 128, false, random);
  const vq_q4_matrix matrix = layer.matrix();
  const std::vector<float> x(256, 0.5f);
  const auto expected = reference_row(layer, x.data());
  std::vector<int> wrong(3, 0);
  std::vector<std::thread> callers;
  for (std::size_t caller = 0; caller < wrong.size(); ++caller) {
    callers.emplace_back([&, caller] {
      std::vector<float> y(64);
      for (int call = 0; call < 200; ++call) {
        vq_q4_gemv(&matrix, x.data(), 1, y.data(), pool);
        wrong[caller] += y == expected ? 0 : 1;
      }
    });
  }
  for (auto &caller : callers) caller.join();
  for (const int count : wrong) expect(count == 0, "concurrent calls on one pool");
}

}  // namespace

int main() {
  expect(vq_abi_version() == VQ_ABI_VERSION, "header and library agree");
  vq_pool *pool = nullptr;
  expect(vq_pool_create(3, &pool) == VQ_OK, "create a pool");
  test_shapes(nullptr);
  test_shapes(pool);
  test_extreme_values_do_not_overflow();
  test_bad_arguments();
  test_pool_is_shared_by_threads(pool);
  vq_pool_free(pool);
  std::printf("%s: %d failures\n", failures == 0 ? "ok" : "FAILED", failures);
  return failures == 0 ? 0 : 1;
}
