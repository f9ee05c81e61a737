// Times one product of every packed format, one row of activations or a batch, on weights in cache
// (hot) and from memory (cold: a ring of copies larger than any cache). Rounds are interleaved over
// the formats. Usage: bench_matrix [threads] [cold 0|1] [out] [in] [batch] [name prefix] [tier]
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "vqkernels.h"

namespace {

constexpr std::int64_t kColdBytes = std::int64_t{160} << 20;
constexpr int kRounds = 9;

// codes0 and codes1 are entries of codebooks; a trellis has codes0 levels.
struct Format {
  std::string name;
  std::int32_t kind, bits, vector_length, stages, codes0, codes1;
};

const Format kFormats[] = {
    {"grid2", VQ_MATRIX_GRID, 2, 0, 0, 0, 0},
    {"grid3", VQ_MATRIX_GRID, 3, 0, 0, 0, 0},
    {"grid4", VQ_MATRIX_GRID, 4, 0, 0, 0, 0},
    {"grid8", VQ_MATRIX_GRID, 8, 0, 0, 0, 0},
    {"tcq1", VQ_MATRIX_TCQ, 1, 0, 0, 64, 0},
    {"tcq2", VQ_MATRIX_TCQ, 2, 0, 0, 64, 0},
    {"tcq2-256", VQ_MATRIX_TCQ, 2, 0, 0, 256, 0},
    {"tcq3", VQ_MATRIX_TCQ, 3, 0, 0, 128, 0},
    {"tcq3-256", VQ_MATRIX_TCQ, 3, 0, 0, 256, 0},
    {"tcq4", VQ_MATRIX_TCQ, 4, 0, 0, 256, 0},
    {"vq-k256-v4", VQ_MATRIX_VQ, 0, 4, 1, 256, 0},
    {"vq-k128-v4", VQ_MATRIX_VQ, 0, 4, 1, 128, 0},
    {"vq-k256-v8", VQ_MATRIX_VQ, 0, 8, 1, 256, 0},
    {"vq-k256-k256-v8", VQ_MATRIX_VQ, 0, 8, 2, 256, 256},
    {"vq-k4096-v8", VQ_MATRIX_VQ, 0, 8, 1, 4096, 0},
    {"vq-k65536-v8", VQ_MATRIX_VQ, 0, 8, 1, 65536, 0},
    {"vq-k4096-v4", VQ_MATRIX_VQ, 0, 4, 1, 4096, 0},
    {"vq-k65536-v16", VQ_MATRIX_VQ, 0, 16, 1, 65536, 0},
};

// Random tensors of one layer.
struct Layer {
  std::vector<std::uint8_t> codes;
  std::vector<std::uint16_t> scales, indices[2], codebooks[2];
  std::vector<std::int8_t> table;
  vq_matrix_part part{};
};

std::unique_ptr<Layer> make_layer(const Format &format, std::int32_t out, std::int32_t in) {
  auto layer = std::make_unique<Layer>();
  std::mt19937 random(1);
  const std::int64_t weights = std::int64_t{out} * in;
  vq_matrix_part &part = layer->part;
  part.kind = format.kind;
  part.in_features = in;
  part.out_features = out;
  part.bits = format.bits;
  part.group_size = format.kind == VQ_MATRIX_GRID ? 128 : 0;
  part.codes_are_bytes = 1;
  part.trellis_bits = 12;
  part.multiplier = 2609;
  part.vector_length = format.vector_length;
  part.num_stages = format.stages;
  const std::int32_t sizes[2] = {format.codes0, format.codes1};
  if (format.kind != VQ_MATRIX_VQ) {
    layer->codes.resize(static_cast<std::size_t>(weights + in));
    const unsigned mask = format.kind == VQ_MATRIX_GRID ? (1u << format.bits) - 1u : 255u;
    for (auto &code : layer->codes) code = static_cast<std::uint8_t>(random() & mask);
    layer->scales.assign(static_cast<std::size_t>(out) * ((in + 127) / 128), 0x2000);
    layer->table.resize(256);
    const int repeats = 256 / std::max(format.codes0, 1);
    for (int i = 0; i < 256; ++i) {
      layer->table[i] =
          i % repeats == 0 ? static_cast<std::int8_t>(random()) : layer->table[i - 1];
    }
  }
  for (int s = 0; s < format.stages; ++s) {
    part.num_codes[s] = sizes[s];
    const std::int64_t rows = (out + format.vector_length - 1) / format.vector_length;
    layer->indices[s].resize(static_cast<std::size_t>(rows * in));
    for (auto &index : layer->indices[s]) {
      index = static_cast<std::uint16_t>(random() % static_cast<unsigned>(sizes[s]));
    }
    layer->codebooks[s].resize(static_cast<std::size_t>(sizes[s]) * format.vector_length);
    for (auto &value : layer->codebooks[s]) value = static_cast<std::uint16_t>(random() & 0xa7ff);
    part.indices[s] = layer->indices[s].data();
    part.codebooks[s] = layer->codebooks[s].data();
  }
  part.codes = layer->codes.data();
  part.scales = layer->scales.data();
  part.table = layer->table.data();
  return layer;
}

struct FreeMatrix {
  void operator()(vq_matrix *matrix) const { vq_matrix_free(matrix); }
};

struct Contender {
  const Format *format;
  std::int64_t bytes;
  std::vector<std::unique_ptr<vq_matrix, FreeMatrix>> ring;
  std::vector<double> times;
  std::size_t next = 0;
};

}  // namespace

int main(int argc, char **argv) {
  const auto argument = [&](int i, int value) { return argc > i ? std::atoi(argv[i]) : value; };
  const std::int32_t threads = argument(1, 1);
  const bool cold = argument(2, 0) != 0;
  const std::int32_t out = argument(3, 4096), in = argument(4, 4096), batch = argument(5, 1);
  const std::string prefix = argc > 6 ? argv[6] : "";
  if (argc > 7) vq_set_isa(std::atoi(argv[7]));
  vq_pool *pool = nullptr;
  if (vq_pool_create(threads, &pool) != VQ_OK) return 1;
  std::vector<Contender> contenders;
  for (const Format &format : kFormats) {
    if (format.name.compare(0, prefix.size(), prefix) != 0) continue;
    const auto layer = make_layer(format, out, in);
    contenders.emplace_back();
    Contender &contender = contenders.back();
    contender.format = &format;
    vq_matrix_get_size(&layer->part, 1, &contender.bytes);
    const std::int64_t copies = cold ? std::max<std::int64_t>(2, kColdBytes / contender.bytes) : 1;
    for (std::int64_t i = 0; i < copies; ++i) {
      vq_matrix *matrix = nullptr;
      if (vq_matrix_create(&layer->part, 1, nullptr, nullptr, 0, &matrix) != VQ_OK) return 1;
      contender.ring.emplace_back(matrix);
    }
  }
  std::vector<float> x(static_cast<std::size_t>(in) * batch),
      y(static_cast<std::size_t>(out) * batch);
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (auto &value : x) value = normal(random);
  for (int round = 0; round < kRounds; ++round) {
    for (Contender &contender : contenders) {
      const int calls =
          static_cast<int>(std::max<double>(3.0, 1e8 / (static_cast<double>(out) * in * batch)));
      const auto start = std::chrono::steady_clock::now();
      for (int call = 0; call < calls; ++call) {
        vq_matrix_multiply(contender.ring[contender.next++ % contender.ring.size()].get(), x.data(),
                           batch, y.data(), 0, pool);
      }
      const std::chrono::duration<double, std::micro> took =
          std::chrono::steady_clock::now() - start;
      contender.times.push_back(took.count() / calls);
    }
  }
  for (Contender &contender : contenders) {
    std::sort(contender.times.begin(), contender.times.end());
    const double median = contender.times[contender.times.size() / 2];
    const double weights = static_cast<double>(out) * in * batch;
    std::printf(
        "%-16s %6dx%-5d b%-3d %-4s T%d median %9.2f us  min %9.2f us  %6.1f Gw/s  %5.1f GB/s\n",
        contender.format->name.c_str(), out, in, batch, cold ? "cold" : "hot", threads, median,
        contender.times.front(), weights / contender.times.front() / 1e3,
        static_cast<double>(contender.bytes) / contender.times.front() / 1e3);
  }
  contenders.clear();
  vq_pool_free(pool);
  return 0;
}
