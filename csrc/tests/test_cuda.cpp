// The CUDA kernels, run on the CPU thread by thread, against double-precision references: index
// arithmetic, tails, fragments, splits over the inputs, synchronization. Says nothing of speed.
#define VQ_CUDA_EMULATION 1
#include "../cuda/vqkernels.cu"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>

namespace {

std::mt19937 random_engine(1);
int failures = 0;

int uniform(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random_engine);
}

std::vector<__half> normal_halves(std::size_t count, float deviation) {
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<__half> values(count);
  for (auto &value : values) value = __float2half(normal(random_engine));
  return values;
}

std::vector<unsigned> random_words(std::size_t count) {
  std::vector<unsigned> words(count);
  for (auto &word : words) word = static_cast<unsigned>(random_engine());
  return words;
}

// Outputs y[batch][outputs] of weight(output, input) against what a kernel gave.
void check(const std::string &what, const std::vector<__half> &x, int stride, int inputs,
           int outputs, int batch, const std::vector<__half> &y,
           const std::function<double(int, int)> &weight) {
  double error = 0.0, signal = 0.0;
  for (int b = 0; b < batch; ++b) {
    for (int n = 0; n < outputs; ++n) {
      double expected = 0.0;
      for (int k = 0; k < inputs; ++k) {
        expected += weight(n, k) * __half2float(x[static_cast<std::size_t>(b) * stride + k]);
      }
      const double got = __half2float(y[static_cast<std::size_t>(b) * outputs + n]);
      error += (got - expected) * (got - expected);
      signal += expected * expected;
    }
  }
  const double relative = std::sqrt(error / signal);
  if (!(relative < 2e-3)) {
    std::printf("FAILED %s: relative error %g\n", what.c_str(), relative);
    ++failures;
  }
}

using Weight = std::function<double(int, int)>;  // of (output, input)

// Dequantized weights, [outputs][inputs] or [inputs][outputs], against weight(output, input).
void check_weights(const std::string &what, const std::vector<__half> &weights, int inputs,
                   int outputs, bool by_input, const Weight &weight) {
  for (int n = 0; n < outputs; ++n) {
    for (int k = 0; k < inputs; ++k) {
      const double expected = weight(n, k);
      const auto at = by_input ? static_cast<std::size_t>(k) * outputs + n
                               : static_cast<std::size_t>(n) * inputs + k;
      const double got = __half2float(weights[at]);
      if (std::abs(got - expected) <= 1e-3 * std::abs(expected) + 1e-6) continue;
      std::printf("FAILED %s: weight %d %d is %g, not %g\n", what.c_str(), n, k, got, expected);
      ++failures;
      return;
    }
  }
}

struct Workspace {
  Workspace(unsigned splits, std::size_t size, unsigned blocks)
      : partial(splits * size, NAN), counters(blocks, 0u) {}
  std::vector<float> partial;
  std::vector<unsigned> counters;

  void expect_clean(const std::string &what) const {
    for (const unsigned counter : counters) {
      if (counter == 0) continue;
      std::printf("FAILED %s: a counter was left at %u\n", what.c_str(), counter);
      ++failures;
    }
  }
};

// One product by decoded tiles: how many rows, by which kernel, in how many slices of the inputs.
struct Product {
  int rows, tile;
  unsigned splits;
};

unsigned blocks_of(int outputs) {
  return static_cast<unsigned>((outputs + 127) / 128);
}

// The kernels of one format that work on decoded tiles, and how much shared memory they need beside
// the tables.
template <typename Gemm, typename Dequantize>
struct Tiled {
  Gemm by_16, by_32, by_64;
  Dequantize dequantize;
  std::size_t shared_16, shared_32, shared_64, shared_dequantize;
  bool by_input;

  Gemm gemm(int tile) const { return tile == 16 ? by_16 : tile == 32 ? by_32 : by_64; }
  std::size_t shared(int tile) const {
    return tile == 16 ? shared_16 : tile == 32 ? shared_32 : shared_64;
  }
};

#define TILED(FORMAT, ...)                                                                      \
  Tiled<decltype(&vq_##FORMAT##_gemm16), decltype(&vq_##FORMAT##_dequantize)> {                 \
    vq_##FORMAT##_gemm16, vq_##FORMAT##_gemm32, vq_##FORMAT##_gemm64, vq_##FORMAT##_dequantize, \
        vq::Gemm<16, __VA_ARGS__>::kSharedBytes, vq::Gemm<32, __VA_ARGS__>::kSharedBytes,       \
        vq::Gemm<64, __VA_ARGS__>::kSharedBytes, vq::kDequantizeBytes<__VA_ARGS__>,             \
        __VA_ARGS__::kByInput                                                                   \
  }

// Runs dequantization and every product of a matrix. `call` invokes a kernel with the arguments
// that name the weights, followed by its own.
template <typename TiledKernels, typename Call>
void test_tiled(const std::string &what, const TiledKernels &kernels, int inputs, int outputs,
                std::size_t table_bytes, const std::vector<Product> &products, const Weight &weight,
                const Call &call) {
  std::vector<__half> weights(static_cast<std::size_t>(outputs) * inputs);
  for (const bool is_late : {false, true}) {
    vq_emulation::copies_are_late = is_late;
    std::fill(weights.begin(), weights.end(), __float2half(NAN));
    vq_emulation::launch(dim3{blocks_of(outputs), is_late ? 2u : 1u}, 256,
                         table_bytes + kernels.shared_dequantize,
                         [&] { call(kernels.dequantize, weights.data()); });
    check_weights(what + " dequantize", weights, inputs, outputs, kernels.by_input, weight);
  }
  const int stride = (inputs + 7) / 8 * 8;
  for (const Product &product : products) {
    auto x = normal_halves(static_cast<std::size_t>(product.rows) * stride, 1.0f);
    for (int row = 0; row < product.rows; ++row) {
      for (int k = inputs; k < stride; ++k) x[static_cast<std::size_t>(row) * stride + k] = {};
    }
    const unsigned row_blocks = static_cast<unsigned>((product.rows - 1) / product.tile + 1);
    const unsigned blocks = blocks_of(outputs) * row_blocks;
    std::vector<__half> first;
    for (const bool is_late : {false, true}) {
      vq_emulation::copies_are_late = is_late;
      std::vector<__half> y(static_cast<std::size_t>(product.rows) * outputs, __float2half(NAN));
      Workspace workspace(product.splits, y.size(), blocks);
      vq_emulation::launch(
          dim3{blocks, product.splits}, 256, table_bytes + kernels.shared(product.tile), [&] {
            call(kernels.gemm(product.tile), x.data(), y.data(), workspace.partial.data(),
                 workspace.counters.data(), product.rows, stride);
          });
      const std::string name = what + " gemm" + std::to_string(product.tile) + " rows " +
                               std::to_string(product.rows) + " splits " +
                               std::to_string(product.splits);
      workspace.expect_clean(name);
      check(name, x, stride, inputs, outputs, product.rows, y, weight);
      if (is_late && std::memcmp(y.data(), first.data(), 2 * y.size()) != 0) {
        std::printf("FAILED %s: two runs differ\n", name.c_str());
        ++failures;
      }
      first = y;
    }
  }
}

using GptqKernel = void (*)(const unsigned *, const __half *, const unsigned char *, int, int, int,
                            const __half *, __half *, float *, unsigned *);

struct GptqCase {
  int bits, batch, inputs, outputs, group_size;
  unsigned splits;
  bool has_zeros;
  std::vector<Product> products;
};

template <typename TiledKernels>
void test_gptq(GptqKernel kernel, const TiledKernels &tiled, const GptqCase &c) {
  const int groups = (c.inputs + c.group_size - 1) / c.group_size;
  const auto size = static_cast<std::size_t>(c.inputs) * c.outputs;
  const auto words = random_words(size * c.bits / 32);
  const auto scales = normal_halves(static_cast<std::size_t>(groups) * c.outputs, 0.1f);
  std::vector<unsigned char> zeros(scales.size());
  for (auto &zero : zeros) zero = static_cast<unsigned char>(uniform(0, (1 << c.bits) - 1));
  const auto x = normal_halves(static_cast<std::size_t>(c.batch) * c.inputs, 1.0f);
  std::vector<__half> y(static_cast<std::size_t>(c.batch) * c.outputs);
  const unsigned blocks = static_cast<unsigned>((c.outputs + 127) / 128);
  Workspace workspace(c.splits, y.size(), blocks);
  const std::size_t shared = std::max<std::size_t>(static_cast<std::size_t>(c.inputs) * 4 * c.batch,
                                                   8u * 128u * 4u * c.batch);
  vq_emulation::launch(dim3{blocks, c.splits}, 256, shared, [&] {
    kernel(words.data(), scales.data(), c.has_zeros ? zeros.data() : nullptr, c.inputs, c.outputs,
           c.group_size, x.data(), y.data(), workspace.partial.data(), workspace.counters.data());
  });
  const std::string what = "gptq bits " + std::to_string(c.bits) + " batch " +
                           std::to_string(c.batch) + " splits " + std::to_string(c.splits);
  workspace.expect_clean(what);
  const auto weight = [&](int n, int k) {
    unsigned code = 0;
    for (int bit = 0; bit < c.bits; ++bit) {
      const int at = k * c.bits + bit;
      const unsigned word = words[static_cast<std::size_t>(at / 32) * c.outputs + n];
      code |= ((word >> (at % 32)) & 1u) << bit;
    }
    const auto group = static_cast<std::size_t>(k / c.group_size) * c.outputs + n;
    const int zero = c.has_zeros ? zeros[group] : 1 << (c.bits - 1);
    return (static_cast<int>(code) - zero) * static_cast<double>(__half2float(scales[group]));
  };
  check(what, x, c.inputs, c.inputs, c.outputs, c.batch, y, weight);
  test_tiled(what, tiled, c.inputs, c.outputs, 0, c.products, weight,
             [&](const auto &run, auto... rest) {
               run(words.data(), scales.data(), c.has_zeros ? zeros.data() : nullptr, c.inputs,
                   c.outputs, c.group_size, rest...);
             });
}

using CodebookKernel = void (*)(const unsigned char *, const __half *, int, int, int, int, int,
                                const __half *, __half *);

struct CodebookCase {
  int v, stages, batch, inputs, outputs, entries;
  unsigned blocks;
  std::vector<Product> products;
};

template <typename TiledKernels>
void test_codebook(CodebookKernel kernel, const TiledKernels &tiled, const CodebookCase &c) {
  const int stride = (c.inputs + 15) / 16 * 16;
  const int rows = c.outputs / c.v;
  std::vector<unsigned char> indices(static_cast<std::size_t>(c.stages) * rows * stride);
  for (auto &index : indices) index = static_cast<unsigned char>(uniform(0, c.entries - 1));
  const auto entries = normal_halves(static_cast<std::size_t>(c.stages) * c.entries * c.v, 0.1f);
  auto x = normal_halves(static_cast<std::size_t>(c.batch) * stride, 1.0f);
  for (int b = 0; b < c.batch; ++b) {
    for (int k = c.inputs; k < stride; ++k) x[static_cast<std::size_t>(b) * stride + k] = __half{};
  }
  std::vector<__half> y(static_cast<std::size_t>(c.batch) * c.outputs);
  const std::size_t pieces = static_cast<std::size_t>(c.stages) * (c.v > 8 ? 2 : 1);
  vq_emulation::launch(dim3{c.blocks}, 256, pieces * c.entries * 128, [&] {
    kernel(indices.data(), entries.data(), c.inputs, stride, c.outputs, c.entries, 0, x.data(),
           y.data());
  });
  const std::string what = "codebook V " + std::to_string(c.v) + " stages " +
                           std::to_string(c.stages) + " batch " + std::to_string(c.batch);
  const auto weight = [&](int n, int k) {
    double sum = 0.0;
    for (int stage = 0; stage < c.stages; ++stage) {
      const auto at = (static_cast<std::size_t>(stage) * rows + n / c.v) * stride + k;
      const auto entry = (static_cast<std::size_t>(stage) * c.entries + indices[at]) * c.v;
      sum += __half2float(entries[entry + n % c.v]);
    }
    return sum;
  };
  check(what, x, stride, c.inputs, c.outputs, c.batch, y, weight);
  test_tiled(what, tiled, c.inputs, c.outputs, pieces * c.entries * 128, c.products, weight,
             [&](const auto &run, auto... rest) {
               run(indices.data(), entries.data(), c.inputs, stride, c.outputs, c.entries, 0,
                   rest...);
             });
}

struct LargeCase {
  int v, stages, batch, num_hot;
  std::vector<Product> products;
};

template <typename TiledKernels>
void test_large(CodebookKernel kernel, const TiledKernels &tiled, const LargeCase &c) {
  const int inputs = 70, stride = 80, rows = 137 / c.v, outputs = rows * c.v, num_entries = 700;
  std::vector<std::uint16_t> indices(static_cast<std::size_t>(c.stages) * rows * stride);
  for (auto &index : indices) index = static_cast<std::uint16_t>(uniform(0, num_entries - 1));
  const auto entries = normal_halves(static_cast<std::size_t>(c.stages) * num_entries * c.v, 0.1f);
  auto x = normal_halves(static_cast<std::size_t>(c.batch) * stride, 1.0f);
  for (int b = 0; b < c.batch; ++b) {
    for (int k = inputs; k < stride; ++k) x[static_cast<std::size_t>(b) * stride + k] = __half{};
  }
  std::vector<__half> y(static_cast<std::size_t>(c.batch) * outputs);
  const auto call = [&](const auto &run, auto... rest) {
    run(reinterpret_cast<const unsigned char *>(indices.data()), entries.data(), inputs, stride,
        outputs, num_entries, c.num_hot, rest...);
  };
  const auto hot_bytes = static_cast<std::size_t>(c.stages) * c.num_hot * c.v * 2;
  vq_emulation::launch(dim3{1}, 256, hot_bytes, [&] { call(kernel, x.data(), y.data()); });
  const auto weight = [&](int n, int k) {
    double sum = 0.0;
    for (int stage = 0; stage < c.stages; ++stage) {
      const auto at = (static_cast<std::size_t>(stage) * rows + n / c.v) * stride + k;
      const auto entry = static_cast<std::size_t>(stage) * num_entries + indices[at];
      sum += __half2float(entries[entry * c.v + n % c.v]);
    }
    return sum;
  };
  const std::string what = "large V " + std::to_string(c.v) + " stages " + std::to_string(c.stages);
  check(what, x, stride, inputs, outputs, c.batch, y, weight);
  test_tiled(what, tiled, inputs, outputs, (hot_bytes + 127) / 128 * 128, c.products, weight, call);
}

using TrellisKernel = void (*)(const unsigned *, const signed char *, const __half *, int, int, int,
                               int, unsigned, int, const __half *, __half *, float *, unsigned *);

struct TrellisCase {
  int bits, batch, inputs, outputs, group_size, trellis_bits;
  unsigned splits;
  std::vector<Product> products;
};

template <typename TiledKernels>
void test_trellis(TrellisKernel kernel, const TiledKernels &tiled, const TrellisCase &c) {
  const int words_per_lane = c.bits == 3 ? 3 : 1;
  const int rows_per_lane = 32 * words_per_lane / c.bits;
  const int lanes = (c.outputs + rows_per_lane - 1) / rows_per_lane;
  const int stride = (lanes * words_per_lane + 3) / 4 * 4;
  const auto streams = random_words(static_cast<std::size_t>(c.inputs) * stride);
  std::vector<signed char> table(256);
  for (auto &entry : table) entry = static_cast<signed char>(uniform(-127, 127));
  const int groups = (c.inputs + c.group_size - 1) / c.group_size;
  const auto scales = normal_halves(static_cast<std::size_t>(groups) * c.outputs, 0.01f);
  const auto x = normal_halves(static_cast<std::size_t>(c.batch) * c.inputs, 1.0f);
  std::vector<__half> y(static_cast<std::size_t>(c.batch) * c.outputs);
  const unsigned blocks = static_cast<unsigned>((lanes + 31) / 32);
  Workspace workspace(c.splits, y.size(), blocks);
  const unsigned multiplier = 40503u;
  const auto call = [&](const auto &run, auto... rest) {
    run(streams.data(), table.data(), scales.data(), c.inputs, c.outputs, stride, c.group_size,
        multiplier << (32 - c.trellis_bits), c.trellis_bits, rest...);
  };
  vq_emulation::launch(dim3{blocks, c.splits}, 256, 32768u + 64u * 4u * c.batch, [&] {
    call(kernel, x.data(), y.data(), workspace.partial.data(), workspace.counters.data());
  });
  const std::string what = "trellis bits " + std::to_string(c.bits) + " batch " +
                           std::to_string(c.batch) + " splits " + std::to_string(c.splits);
  workspace.expect_clean(what);
  const auto weight = [&](int n, int k) {
    unsigned state = 0;
    for (int i = 0; i < c.trellis_bits; ++i) {
      const int at = (n + 1) * c.bits - c.trellis_bits + i;
      if (at < 0) continue;
      const unsigned word = streams[static_cast<std::size_t>(k) * stride + at / 32];
      state |= ((word >> (at % 32)) & 1u) << i;
    }
    const unsigned hash = (state * multiplier) & ((1u << c.trellis_bits) - 1u);
    const auto group = static_cast<std::size_t>(k / c.group_size) * c.outputs + n;
    return table[hash >> (c.trellis_bits - 8)] * static_cast<double>(__half2float(scales[group]));
  };
  check(what, x, c.inputs, c.inputs, c.outputs, c.batch, y, weight);
  test_tiled(what, tiled, c.inputs, c.outputs, 32768, c.products, weight, call);
}

}  // namespace

int main() {
  const auto gptq2 = TILED(gptq2, vq::GptqTiles<2>);
  const auto gptq3 = TILED(gptq3, vq::GptqTiles<3>);
  const auto gptq4 = TILED(gptq4, vq::GptqTiles<4>);
  const auto gptq8 = TILED(gptq8, vq::GptqTiles<8>);
  test_gptq(vq_gptq2_b1, gptq2, {2, 1, 160, 132, 64, 1, true, {{9, 16, 1}, {33, 32, 2}}});
  test_gptq(vq_gptq3_b1, gptq3, {3, 1, 160, 132, 64, 1, true, {{17, 16, 2}, {65, 64, 1}}});
  test_gptq(vq_gptq3_b2, gptq3, {3, 2, 96, 4, 32, 2, false, {{130, 64, 1}}});
  test_gptq(vq_gptq4_b1, gptq4, {4, 1, 576, 68, 128, 3, true, {{9, 16, 4}, {100, 64, 3}}});
  test_gptq(vq_gptq4_b4, gptq4, {4, 4, 64, 260, 64, 1, false, {{40, 32, 1}, {16, 16, 1}}});
  // More slices than tiles.
  test_gptq(vq_gptq4_b2, gptq4, {4, 2, 32, 8, 32, 2, true, {{9, 16, 2}}});
  test_gptq(vq_gptq8_b1, gptq8, {8, 1, 96, 36, 96, 1, true, {{9, 16, 1}, {64, 64, 2}}});

  const auto codebook4x1 = TILED(codebook4x1, vq::SmallTiles<4, 1>);
  const auto codebook8x1 = TILED(codebook8x1, vq::SmallTiles<8, 1>);
  const auto codebook8x2 = TILED(codebook8x2, vq::SmallTiles<8, 2>);
  test_codebook(vq_codebook4x1_b1, codebook4x1,
                {4, 1, 1, 100, 76, 256, 2, {{9, 16, 1}, {33, 32, 2}, {65, 64, 1}}});
  test_codebook(vq_codebook8x1_b2, codebook8x1,
                {8, 1, 2, 33, 24, 64, 1, {{23, 16, 1}, {32, 32, 1}, {130, 64, 1}}});
  test_codebook(vq_codebook8x2_b1, codebook8x2,
                {8, 2, 1, 600, 136, 256, 1, {{9, 16, 3}, {17, 32, 4}, {70, 64, 2}}});
  const auto large4x1 = TILED(large4x1, vq::LargeTiles<4, 1>);
  const auto large8x1 = TILED(large8x1, vq::LargeTiles<8, 1>);
  const auto large8x2 = TILED(large8x2, vq::LargeTiles<8, 2>);
  test_large(vq_large8x1_b1, large8x1, {8, 1, 1, 100, {{9, 16, 1}, {33, 32, 2}, {65, 64, 1}}});
  test_large(vq_large4x1_b2, large4x1, {4, 1, 2, 0, {{20, 32, 1}, {64, 64, 1}}});
  test_large(vq_large4x1_b1, large4x1, {4, 1, 1, 101, {{16, 16, 2}}});
  test_large(vq_large8x2_b2, large8x2, {8, 2, 2, 77, {{9, 16, 1}, {20, 32, 2}, {65, 64, 1}}});

  const auto trellis1 = TILED(trellis1, vq::TrellisTiles<1>);
  const auto trellis2 = TILED(trellis2, vq::TrellisTiles<2>);
  const auto trellis3 = TILED(trellis3, vq::TrellisTiles<3>);
  const auto trellis4 = TILED(trellis4, vq::TrellisTiles<4>);
  test_trellis(vq_trellis1_b1, trellis1, {1, 1, 70, 170, 70, 12, 1, {{9, 16, 1}, {33, 32, 2}}});
  test_trellis(vq_trellis2_b1, trellis2, {2, 1, 100, 530, 64, 12, 3, {{9, 16, 2}}});
  test_trellis(vq_trellis2_b2, trellis2, {2, 2, 40, 33, 32, 16, 1, {{65, 64, 1}, {40, 32, 1}}});
  test_trellis(vq_trellis3_b1, trellis3, {3, 1, 165, 97, 32, 10, 2, {{9, 16, 3}, {77, 64, 1}}});
  test_trellis(vq_trellis4_b1, trellis4, {4, 1, 130, 300, 48, 14, 1, {{31, 32, 1}, {9, 16, 1}}});
  std::printf(failures == 0 ? "all kernels agree\n" : "%d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
