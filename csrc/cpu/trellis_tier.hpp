// The encoders of one tier, written once over `Lanes` (16 floats), which the including source file
// includes before. Everything has internal linkage, so no tier can leak into another. No FMA: each
// operation rounds on its own, so all tiers agree bit for bit.
//
// Viterbi: after row r, the cost of a state is the least cost of its 2^bits predecessors plus
// (target - scale * level)^2. Among equal predecessors the lowest wins, and among equal last states;
// "lowest" in the bit-reversed numbering.
#pragma once

#include "rounding.hpp"
#include "trellis_kernels.hpp"

namespace vq {
namespace {

constexpr float kUnreachable = 1e30f;
constexpr std::int32_t kRenormalizeRows = 32;  // costs stay small enough for float32

// The least of kCount vectors that lie `stride` apart, by a knock-out of neighbours; each match
// leaves a mask of the lanes that the second one wins.
template <int kCount>
Lanes knock_out(const float *costs, std::int64_t stride, std::uint16_t *winners) {
  Lanes best[kCount / 2];
  for (int i = 0; i < kCount / 2; ++i) {
    const Lanes first = Lanes::load(costs + 2 * i * stride);
    const Lanes second = Lanes::load(costs + (2 * i + 1) * stride);
    winners[i] = static_cast<std::uint16_t>(second.below(first));
    best[i] = lesser(second, first);
  }
  winners += kCount / 2;
  for (int width = kCount / 4; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i) {
      winners[i] = static_cast<std::uint16_t>(best[2 * i + 1].below(best[2 * i]));
      best[i] = lesser(best[2 * i + 1], best[2 * i]);
    }
    winners += width;
  }
  return best[0];
}

// Which of kCount predecessors won in one lane.
template <int kCount>
std::int64_t winner(const std::uint16_t *winners, int lane) {
  std::int64_t index = 0;
  const std::uint16_t *level = winners + kCount - 2;
  for (int width = 1; width < kCount; width *= 2) {
    index = 2 * index + ((level[index] >> lane) & 1);
    level -= 2 * width;
  }
  return index;
}

template <int kBits>
void advance(const ViterbiJob &job, std::int32_t row, const float *before, float *after) {
  constexpr int kCount = 1 << kBits;
  const std::int64_t groups = job.num_states() >> kBits;
  std::uint16_t *winners = job.winners + row * job.winners_per_row();
  const Lanes target = Lanes::all(job.targets[row]);
  const Lanes scale = Lanes::all(job.scales[row]);
  for (std::int64_t g = 0; g < groups; g += kSweepLanes) {
    const Lanes least = knock_out<kCount>(before + g, groups, winners);
    winners += kCount - 1;
    const float *levels = job.levels + (g << kBits);
    float *costs = after + (g << kBits);
    for (int j = 0; j < kCount; ++j) {
      const Lanes error = target - scale * Lanes::load(levels + j * kSweepLanes);
      (spread<kBits>(least, j) + error * error).store(costs + j * kSweepLanes);
    }
  }
}

float least_of(const float *costs, std::int64_t count) {
  Lanes least = Lanes::load(costs);
  for (std::int64_t s = kSweepLanes; s < count; s += kSweepLanes) {
    least = lesser(Lanes::load(costs + s), least);
  }
  float lanes[kSweepLanes];
  least.store(lanes);
  for (int i = 1; i < kSweepLanes; ++i) {
    lanes[0] = lanes[i] < lanes[0] ? lanes[i] : lanes[0];
  }
  return lanes[0];
}

void renormalize(float *costs, std::int64_t count) {
  const Lanes base = Lanes::all(least_of(costs, count));
  for (std::int64_t s = 0; s < count; s += kSweepLanes) {
    (Lanes::load(costs + s) - base).store(costs + s);
  }
}

template <int kBits>
void trace_back(const ViterbiJob &job, const float *costs) {
  constexpr int kCount = 1 << kBits;
  const std::int64_t groups = job.num_states() >> kBits;
  const float least = least_of(costs, job.num_states());
  std::int64_t state = 0;
  while (least < costs[state]) {
    ++state;
  }
  for (std::int32_t row = job.num_rows - 1; row >= 0; --row) {
    job.path[row] = static_cast<std::uint16_t>(state);
    const std::int64_t group = state >> kBits;
    const std::uint16_t *winners = job.winners + row * job.winners_per_row() +
                                   group / kSweepLanes * (kCount - 1);
    state = winner<kCount>(winners, static_cast<int>(group % kSweepLanes)) * groups + group;
  }
}

template <int kBits>
void find_path(const ViterbiJob &job) {
  const std::int64_t count = job.num_states();
  float *before = job.costs;
  float *after = job.costs + count;
  for (std::int64_t s = 0; s < count; ++s) {
    before[s] = kUnreachable;
  }
  before[job.start] = 0.0f;
  for (std::int32_t row = 0; row < job.num_rows; ++row) {
    advance<kBits>(job, row, before, after);
    if ((row + 1) % kRenormalizeRows == 0) {
      renormalize(after, count);
    }
    float *other = before;
    before = after;
    after = other;
  }
  trace_back<kBits>(job, before);
}

void viterbi(const ViterbiJob &job) {
  switch (job.bits) {
    case 1:
      return find_path<1>(job);
    case 2:
      return find_path<2>(job);
    case 3:
      return find_path<3>(job);
    case 4:
      return find_path<4>(job);
    default:
      return find_path<5>(job);
  }
}

void round_block(const GridJob &job, std::int32_t row) {
  float zeros[kSweepLanes];
  for (int i = 0; i < kSweepLanes; ++i) {
    zeros[i] = static_cast<float>(job.zeros[row + i]);
  }
  const Lanes zero = Lanes::load(zeros);
  const Lanes scale = Lanes::load(job.scales + row);
  const Lanes magic = Lanes::all(kRoundMagic);
  const Lanes lowest = Lanes::all(0.0f) - zero;
  const Lanes highest = Lanes::all(job.max_code) - zero;
  const Lanes steps = lesser(Lanes::load(job.targets + row) / scale, highest);
  const Lanes clipped = Lanes::all(0.0f) - lesser(Lanes::all(0.0f) - steps, zero);
  const Lanes rounded = (clipped + magic) - magic;
  (rounded * scale).store(job.values + row);
  (rounded - lowest).store(zeros);
  for (int i = 0; i < kSweepLanes; ++i) {
    job.codes[row + i] = static_cast<std::uint8_t>(zeros[i]);
  }
}

// The rows after the last whole block, padded.
void round_rest(const GridJob &job, std::int32_t row) {
  float targets[kSweepLanes] = {};
  float scales[kSweepLanes];
  float values[kSweepLanes];
  std::uint8_t zeros[kSweepLanes] = {};
  std::uint8_t codes[kSweepLanes];
  const std::int32_t count = job.num_rows - row;
  for (int i = 0; i < kSweepLanes; ++i) {
    targets[i] = i < count ? job.targets[row + i] : 0.0f;
    scales[i] = i < count ? job.scales[row + i] : 1.0f;
    zeros[i] = i < count ? job.zeros[row + i] : std::uint8_t{0};
  }
  round_block({targets, scales, zeros, values, codes, kSweepLanes, job.max_code}, 0);
  for (int i = 0; i < count; ++i) {
    job.values[row + i] = values[i];
    job.codes[row + i] = codes[i];
  }
}

void round_to_grid(const GridJob &job) {
  std::int32_t row = 0;
  for (; row + kSweepLanes <= job.num_rows; row += kSweepLanes) {
    round_block(job, row);
  }
  if (row < job.num_rows) {
    round_rest(job, row);
  }
}

void subtract(float factor, const float *x, float *y, std::int32_t count) {
  const Lanes factors = Lanes::all(factor);
  std::int32_t i = 0;
  for (; i + kSweepLanes <= count; i += kSweepLanes) {
    (Lanes::load(y + i) - factors * Lanes::load(x + i)).store(y + i);
  }
  for (; i < count; ++i) {
    y[i] = y[i] - factor * x[i];
  }
}

}  // namespace
}  // namespace vq
