// Times the q4 GEMV of every tier on weights in cache (hot) and from memory (cold: a ring of copies
// larger than any cache). Rounds are interleaved over the tiers; prints the median and the minimum.
// Usage: bench_q4 [num_threads]
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "vqkernels.h"

namespace {

constexpr std::int64_t kColdBytes = std::int64_t{160} << 20;
constexpr int kRounds = 7;
constexpr int kCallsPerRound = 200;

struct Ring {
  std::vector<std::uint8_t> codes;
  std::vector<float> scales;
  std::vector<vq_q4_matrix> matrices;
};

Ring make_ring(std::int32_t out, std::int32_t in, bool cold) {
  vq_q4_sizes sizes;
  vq_q4_get_sizes(in, out, 128, &sizes);
  const std::int64_t copies = cold ? std::max<std::int64_t>(2, kColdBytes / sizes.codes_bytes) : 1;
  Ring ring;
  ring.codes.resize(static_cast<std::size_t>(copies * sizes.codes_bytes));
  ring.scales.assign(static_cast<std::size_t>(copies * sizes.num_scales), 0.01f);
  std::mt19937 random(1);
  for (auto &byte : ring.codes) byte = static_cast<std::uint8_t>(random());
  for (std::int64_t i = 0; i < copies; ++i) {
    ring.matrices.push_back({in, out, 128, 0, ring.codes.data() + i * sizes.codes_bytes,
                             ring.scales.data() + i * sizes.num_scales, nullptr});
  }
  return ring;
}

double time_round_us(const Ring &ring, const std::vector<float> &x, std::vector<float> &y,
                     vq_pool *pool, std::size_t &next) {
  const auto start = std::chrono::steady_clock::now();
  for (int call = 0; call < kCallsPerRound; ++call) {
    vq_q4_gemv(&ring.matrices[next++ % ring.matrices.size()], x.data(), 1, y.data(), pool);
  }
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
  return took.count() / kCallsPerRound;
}

void bench_shape(std::int32_t out, std::int32_t in, bool cold, vq_pool *pool) {
  const Ring ring = make_ring(out, in, cold);
  std::vector<float> x(static_cast<std::size_t>(in)), y(static_cast<std::size_t>(out));
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (auto &value : x) value = normal(random);
  std::vector<std::vector<double>> times(VQ_ISA_AVX512_VNNI + 1);
  std::size_t next = 0;
  for (int round = 0; round < kRounds; ++round) {
    for (std::int32_t isa = VQ_ISA_BASELINE; isa <= VQ_ISA_AVX512_VNNI; ++isa) {
      if (vq_set_isa(isa) == VQ_OK) times[isa].push_back(time_round_us(ring, x, y, pool, next));
    }
  }
  const double bytes = static_cast<double>(ring.codes.size() + sizeof(float) * ring.scales.size()) /
                       static_cast<double>(ring.matrices.size());
  for (std::int32_t isa = VQ_ISA_BASELINE; isa <= VQ_ISA_AVX512_VNNI; ++isa) {
    if (times[isa].empty()) continue;
    std::sort(times[isa].begin(), times[isa].end());
    const double median = times[isa][times[isa].size() / 2];
    std::printf("%6dx%-5d %-4s %-12s median %9.2f us  min %9.2f us  %6.1f GB/s\n", out, in,
                cold ? "cold" : "hot", vq_isa_name(isa), median, times[isa].front(),
                bytes / median / 1e3);
  }
}

}  // namespace

int main(int argc, char **argv) {
  vq_pool *pool = nullptr;
  const std::int32_t num_threads = argc > 1 ? std::atoi(argv[1]) : 1;
  if (vq_pool_create(num_threads, &pool) != VQ_OK) {
    std::fprintf(stderr, "cannot start %d threads\n", num_threads);
    return 1;
  }
  const std::int32_t shapes[][2] = {{576, 1536}, {1536, 576}, {49152, 576}};
  for (const bool cold : {false, true}) {
    for (const auto &shape : shapes) bench_shape(shape[0], shape[1], cold, pool);
  }
  vq_pool_free(pool);
  return 0;
}
