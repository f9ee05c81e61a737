// The loops around tiles that every tier shares: decode a panel's columns into a tile that stays in
// the first-level cache, then multiply it with many rows of activations. A tier gives
//   Tier::kRows    activation rows that one call of segment takes
//   Tier::decode   a DecodeTileFn
//   Tier::load_scale  scales and zeros of one segment of a pair, as load_segment_scale
//   Tier::segment  adds one segment of one pair, for a few rows, to their lanes
// in a class of its own unnamed namespace, so that no tier can end up with another one's code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "matrix_half.hpp"
#include "matrix_kernels.hpp"

namespace vq {
namespace {

constexpr std::int32_t kTileBytes = 16384;
constexpr std::int32_t kTileColumns = 1024;
constexpr std::int32_t kBatchRows = 128;
constexpr std::int32_t kBatchFloats = 8192;  // results of a batch chunk, over all pairs

// One segment: columns with one weight scale and one activation scale.
struct SegmentScale {
  alignas(64) float scale[kPairRows];
  alignas(64) std::int32_t zero[kPairRows];
  bool has_small_codes;  // all below 16; only where a tier asks
};

inline void load_segment_scale(const MatrixPart &part, const MatrixStage &stage, std::int32_t panel,
                               std::int32_t pair, std::int32_t segment, SegmentScale &out) {
  if (stage.lane_scales != nullptr) {
    std::memcpy(out.scale, stage.lane_scales + pair * kPairRows, sizeof out.scale);
    std::fill_n(out.zero, kPairRows, stage.zero);
    return;
  }
  const std::int64_t at =
      (std::int64_t{panel} * part.num_groups + segment / part.segments_per_group) * kPairRows;
  for (int lane = 0; lane < kPairRows; ++lane) {
    out.scale[lane] = half_to_float(part.scales[at + lane]);
    out.zero[lane] = part.zeros != nullptr ? part.zeros[at + lane] : stage.zero;
  }
}

inline std::int32_t segment_sum(const Activations &x, std::int64_t row, std::int32_t column,
                                std::int32_t count) {
  const std::int32_t *prefix = x.prefix + row * prefix_length(x.columns);
  return prefix[(column + count) / kPrefixStep] - prefix[column / kPrefixStep];
}

// Writes or adds the lanes of one batch row to y; `first` and `last` stage of the part.
inline void store_lanes(const MatrixJob &job, const MatrixStage &stage, std::int32_t panel,
                        std::int32_t row, const float *lanes, bool first, bool last) {
  const MatrixPart &part = *job.part;
  const std::int32_t base = panel * part.panel_rows;
  const std::int32_t valid = std::min(part.panel_rows, part.rows - base);
  const bool writes = first && part.begins_rows;
  float *y = job.y + row * job.y_stride + part.row_begin + base;
  for (std::int32_t lane = 0; lane < stage.pairs * kPairRows; ++lane) {
    const std::int32_t at = stage.lane_rows[lane];
    if (at >= 0 && at < valid) {
      y[at] = writes ? lanes[lane] : y[at] + lanes[lane];
    }
  }
  if (last && job.x.offsets != nullptr) {
    for (std::int32_t at = 0; at < valid; ++at) {
      y[at] += job.x.offsets[row];
    }
  }
}

template <class Tier>
struct TileLoops {
  // Adds the columns of one decoded tile to lanes [batch][pairs][16].
  static void multiply_tile(const MatrixJob &job, const MatrixStage &stage, std::int32_t panel,
                            std::int32_t column, std::int32_t count, const std::uint8_t *tile,
                            std::int32_t row, std::int32_t batch, float *lanes) {
    const MatrixPart &part = *job.part;
    const std::int32_t stride = padded_columns(job.x.columns);
    const std::int32_t groups = activation_groups(job.x.columns);
    for (std::int32_t pair = 0; pair < stage.pairs; ++pair) {
      const std::uint8_t *blocks = tile + std::int64_t{pair} * (count / kBlock) * 2 * kBlockBytes;
      for (std::int32_t from = 0; from < count; from += part.segment) {
        const std::int32_t length = std::min(part.segment, count - from);
        const std::int32_t at = column + from;
        SegmentScale scale;
        Tier::load_scale(part, stage, panel, pair, at / part.segment, scale);
        for (std::int32_t b = 0; b < batch; b += Tier::kRows) {
          const std::int32_t rows = std::min<std::int32_t>(Tier::kRows, batch - b);
          std::int32_t sums[Tier::kRows];
          float x_scales[Tier::kRows];
          for (std::int32_t i = 0; i < rows; ++i) {
            sums[i] = segment_sum(job.x, row + b + i, at, length);
            x_scales[i] = job.x.scales[std::int64_t{row + b + i} * groups + at / kActivationGroup];
          }
          Tier::segment(blocks + from / kBlock * 2 * kBlockBytes, length / kBlock,
                        job.x.q + std::int64_t{row + b} * stride + at, stride, rows, scale, sums,
                        x_scales, lanes + (std::int64_t{b} * stage.pairs + pair) * kPairRows,
                        stage.pairs * kPairRows);
        }
      }
    }
  }

  static void panel_stage(const MatrixJob &job, const MatrixStage &stage, std::int32_t panel,
                          bool first, bool last) {
    alignas(64) std::uint8_t tile[kTileBytes];
    alignas(64) float lanes[kBatchFloats];
    const std::int32_t chunk = std::min(kBatchRows, kBatchFloats / (stage.pairs * kPairRows));
    const std::int32_t tile_columns = std::min(
        kTileColumns, kTileBytes / (stage.pairs * kPairRows * kActivationGroup) * kActivationGroup);
    for (std::int32_t row = 0; row < job.x.batch; row += chunk) {
      const std::int32_t batch = std::min(chunk, job.x.batch - row);
      std::fill_n(lanes, batch * stage.pairs * kPairRows, 0.0f);
      for (std::int32_t column = 0; column < job.part->columns; column += tile_columns) {
        const std::int32_t count = std::min(tile_columns, job.part->columns - column);
        Tier::decode(stage, panel, column, count, tile);
        multiply_tile(job, stage, panel, column, count, tile, row, batch, lanes);
      }
      for (std::int32_t b = 0; b < batch; ++b) {
        store_lanes(job, stage, panel, row + b, lanes + b * stage.pairs * kPairRows, first, last);
      }
    }
  }

  static void panels(const MatrixJob &job, std::int32_t begin, std::int32_t end) {
    const std::int32_t stages = job.part->num_stages;
    for (std::int32_t panel = begin; panel < end; ++panel) {
      for (std::int32_t s = 0; s < stages; ++s) {
        panel_stage(job, job.part->stages[s], panel, s == 0, s + 1 == stages);
      }
    }
  }
};

}  // namespace
}  // namespace vq
