// The CUDA kernels, run on the CPU thread by thread, against double-precision references: index
// arithmetic, tails, splits over the inputs, synchronization. Says nothing of speed.
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

// Dequantized [outputs][inputs] weights against the same weight(output, input).
void check_weights(const std::string &what, const std::vector<__half> &weights, int inputs,
                   int outputs, const std::function<double(int, int)> &weight) {
  for (int n = 0; n < outputs; ++n) {
    for (int k = 0; k < inputs; ++k) {
      const double expected = weight(n, k);
      const double got = __half2float(weights[static_cast<std::size_t>(n) * inputs + k]);
      if (std::abs(got - expected) <= 1e-3 * std::abs(expected) + 1e-6) continue;
      std::printf("FAILED %s: weight %d %d is %g, not %g\n", what.c_str(), n, k, got, expected);
      ++failures;
      return;
    }
  }
}

unsigned blocks_for(long long threads) { return static_cast<unsigned>((threads + 255) / 256); }

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

using GptqKernel = void (*)(const unsigned *, const __half *, const unsigned char *, const __half *,
                            __half *, float *, unsigned *, int, int, int);

struct GptqCase {
  int bits, batch, inputs, outputs, group_size;
  unsigned splits;
  bool has_zeros;
};

using GptqDequantize = void (*)(const unsigned *, const __half *, const unsigned char *, __half *,
                                int, int, int);

void test_gptq(GptqKernel kernel, GptqDequantize dequantize, const GptqCase &c) {
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
  const std::size_t shared = std::max<std::size_t>(
      static_cast<std::size_t>(c.inputs) * 4 * c.batch, 8u * 128u * 4u * c.batch);
  vq_emulation::launch(dim3{blocks, c.splits}, 256, shared, [&] {
    kernel(words.data(), scales.data(), c.has_zeros ? zeros.data() : nullptr, x.data(), y.data(),
           workspace.partial.data(), workspace.counters.data(), c.inputs, c.outputs, c.group_size);
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
  std::vector<__half> weights(size);
  vq_emulation::launch(dim3{blocks_for(c.inputs / 32 * static_cast<long long>(c.outputs))}, 256, 0,
                       [&] {
                         dequantize(words.data(), scales.data(),
                                    c.has_zeros ? zeros.data() : nullptr, weights.data(),
                                    c.inputs, c.outputs, c.group_size);
                       });
  check_weights(what, weights, c.inputs, c.outputs, weight);
}

using CodebookKernel = void (*)(const unsigned char *, const __half *, const __half *, __half *,
                                int, int, int, int);

struct CodebookCase {
  int v, stages, batch, inputs, outputs, entries;
  unsigned blocks;
};

void test_codebook(CodebookKernel kernel, const CodebookCase &c) {
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
    kernel(indices.data(), entries.data(), x.data(), y.data(), c.inputs, stride, c.outputs,
           c.entries);
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
  std::vector<__half> weights(static_cast<std::size_t>(c.outputs) * c.inputs);
  vq_emulation::launch(dim3{blocks_for(static_cast<long long>(rows) * c.inputs)}, 256, 0, [&] {
    vq_codebook_dequantize(indices.data(), entries.data(), weights.data(), c.inputs, stride,
                           c.outputs, c.entries, c.v, c.stages);
  });
  check_weights(what, weights, c.inputs, c.outputs, weight);
}

using LargeKernel = void (*)(const unsigned char *, const __half *, const __half *, __half *, int,
                             int, int, int, int);

void test_large(LargeKernel kernel, int v, int batch, int num_hot) {
  const int inputs = 70, stride = 80, outputs = 5 * v, num_entries = 700;
  std::vector<std::uint16_t> indices(static_cast<std::size_t>(5) * stride);
  for (auto &index : indices) index = static_cast<std::uint16_t>(uniform(0, num_entries - 1));
  const auto entries = normal_halves(static_cast<std::size_t>(num_entries) * v, 0.1f);
  auto x = normal_halves(static_cast<std::size_t>(batch) * stride, 1.0f);
  for (int b = 0; b < batch; ++b) {
    for (int k = inputs; k < stride; ++k) x[static_cast<std::size_t>(b) * stride + k] = __half{};
  }
  std::vector<__half> y(static_cast<std::size_t>(batch) * outputs);
  vq_emulation::launch(dim3{1}, 256, static_cast<std::size_t>(num_hot) * v * 2, [&] {
    kernel(reinterpret_cast<const unsigned char *>(indices.data()), entries.data(), x.data(),
           y.data(), inputs, stride, outputs, num_entries, num_hot);
  });
  const auto weight = [&](int n, int k) {
    const auto entry = indices[static_cast<std::size_t>(n / v) * stride + k];
    return static_cast<double>(
        __half2float(entries[static_cast<std::size_t>(entry) * v + n % v]));
  };
  const std::string what = "large V " + std::to_string(v);
  check(what, x, stride, inputs, outputs, batch, y, weight);
  std::vector<__half> weights(static_cast<std::size_t>(outputs) * inputs);
  vq_emulation::launch(dim3{blocks_for(5LL * inputs)}, 256, 0, [&] {
    vq_large_dequantize(reinterpret_cast<const unsigned char *>(indices.data()), entries.data(),
                        weights.data(), inputs, stride, outputs, num_entries, v, 1);
  });
  check_weights(what, weights, inputs, outputs, weight);
}

using TrellisKernel = void (*)(const unsigned *, const signed char *, const __half *,
                               const __half *, __half *, float *, unsigned *, int, int, int, int,
                               unsigned, int);

struct TrellisCase {
  int bits, batch, inputs, outputs, group_size, trellis_bits;
  unsigned splits;
};

using TrellisDequantize = void (*)(const unsigned *, const signed char *, const __half *, __half *,
                                   int, int, int, int, unsigned, int);

void test_trellis(TrellisKernel kernel, TrellisDequantize dequantize, const TrellisCase &c) {
  const int words_per_lane = c.bits == 3 ? 3 : 1;
  const int rows_per_lane = 32 * words_per_lane / c.bits;
  const int lanes = (c.outputs + rows_per_lane - 1) / rows_per_lane;
  const int stride = lanes * words_per_lane;
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
  vq_emulation::launch(dim3{blocks, c.splits}, 256, 32768u + 64u * 4u * c.batch, [&] {
    kernel(streams.data(), table.data(), scales.data(), x.data(), y.data(),
           workspace.partial.data(), workspace.counters.data(), c.inputs, c.outputs, stride,
           c.group_size, multiplier << (32 - c.trellis_bits), c.trellis_bits);
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
  std::vector<__half> weights(static_cast<std::size_t>(c.outputs) * c.inputs);
  vq_emulation::launch(dim3{blocks_for(static_cast<long long>(lanes) * c.inputs)}, 256, 0, [&] {
    dequantize(streams.data(), table.data(), scales.data(), weights.data(), c.inputs, c.outputs,
               stride, c.group_size, multiplier << (32 - c.trellis_bits), c.trellis_bits);
  });
  check_weights(what, weights, c.inputs, c.outputs, weight);
}

}  // namespace

int main() {
  test_gptq(vq_gptq2_b1, vq_gptq2_dequantize, {2, 1, 160, 132, 64, 1, true});
  test_gptq(vq_gptq3_b1, vq_gptq3_dequantize, {3, 1, 160, 132, 64, 1, true});
  test_gptq(vq_gptq3_b2, vq_gptq3_dequantize, {3, 2, 96, 4, 32, 2, false});
  test_gptq(vq_gptq4_b1, vq_gptq4_dequantize, {4, 1, 576, 68, 128, 3, true});
  test_gptq(vq_gptq4_b4, vq_gptq4_dequantize, {4, 4, 64, 260, 64, 1, false});
  // More slices than tiles.
  test_gptq(vq_gptq4_b2, vq_gptq4_dequantize, {4, 2, 32, 8, 32, 2, true});
  test_gptq(vq_gptq8_b1, vq_gptq8_dequantize, {8, 1, 96, 36, 96, 1, true});

  test_codebook(vq_codebook4x1_b1, {4, 1, 1, 100, 76, 256, 2});
  test_codebook(vq_codebook8x1_b2, {8, 1, 2, 33, 24, 64, 1});
  test_codebook(vq_codebook8x2_b1, {8, 2, 1, 600, 88, 256, 1});
  test_large(vq_large8_b1, 8, 1, 100);
  test_large(vq_large4_b2, 4, 2, 0);

  test_trellis(vq_trellis1_b1, vq_trellis1_dequantize, {1, 1, 70, 70, 70, 12, 1});
  test_trellis(vq_trellis2_b1, vq_trellis2_dequantize, {2, 1, 100, 530, 64, 12, 3});
  test_trellis(vq_trellis2_b2, vq_trellis2_dequantize, {2, 2, 40, 33, 32, 16, 1});
  test_trellis(vq_trellis3_b1, vq_trellis3_dequantize, {3, 1, 65, 97, 32, 10, 2});
  test_trellis(vq_trellis4_b1, vq_trellis4_dequantize, {4, 1, 130, 300, 128, 14, 1});
  std::printf(failures == 0 ? "all kernels agree\n" : "%d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
