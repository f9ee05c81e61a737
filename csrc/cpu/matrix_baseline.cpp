// Portable tier: decodes every format with plain loops, and multiplies tiles with loops that
// compilers turn into SSE2 or NEON code. No target flags; the other tiers borrow its decoder for
// formats that they have no faster one for.
#include "matrix_layered.hpp"
#include "matrix_tile.hpp"

namespace vq {
namespace {

// Sets code (set, row, column) of the blocks of one pair.
inline std::uint8_t *block_of(std::uint8_t *tile, std::int32_t num_blocks, std::int32_t pair,
                              std::int32_t block, std::int32_t set) {
  return tile + ((std::int64_t{pair} * num_blocks + block) * 2 + set) * kBlockBytes;
}

void decode_grid8(const std::uint8_t *codes, std::int32_t num_blocks, std::uint8_t *tile) {
  std::memcpy(tile, codes, static_cast<std::size_t>(num_blocks) * 2 * kBlockBytes);
}

void decode_grid4(const std::uint8_t *codes, std::int32_t num_blocks, std::uint8_t *tile) {
  for (std::int32_t block = 0; block < num_blocks; ++block) {
    for (int i = 0; i < kBlockBytes; ++i) {
      const std::uint8_t byte = codes[block * kBlockBytes + i];
      tile[2 * block * kBlockBytes + i] = byte & 15u;
      tile[(2 * block + 1) * kBlockBytes + i] = static_cast<std::uint8_t>(byte >> 4);
    }
  }
}

void decode_layers(const std::uint8_t *upper, const std::uint8_t *lower, std::int32_t num_blocks,
                   std::uint8_t *tile) {
  for (std::int32_t block = 0; block < num_blocks; ++block) {
    for (int i = 0; i < kBlockBytes; ++i) {
      const std::uint32_t high = upper[block * kBlockBytes + i];
      const std::uint32_t low = lower[block * kBlockBytes + i];
      tile[2 * block * kBlockBytes + i] = static_cast<std::uint8_t>((high << 4) | (low & 15u));
      tile[(2 * block + 1) * kBlockBytes + i] =
          static_cast<std::uint8_t>((high & 0xf0u) | (low >> 4));
    }
  }
}

// 64 bytes of bit pairs: four blocks.
void decode_pairs(const std::uint8_t *codes, std::uint8_t *tile) {
  for (int quarter = 0; quarter < 4; ++quarter) {
    for (int i = 0; i < kBlockBytes; ++i) {
      tile[quarter * kBlockBytes + i] = (codes[i] >> (2 * quarter)) & 3u;
    }
  }
}

void decode_grid2(const std::uint8_t *codes, std::int32_t num_blocks, std::uint8_t *tile) {
  for (std::int32_t block = 0; block < num_blocks; block += 2) {
    decode_pairs(codes + block / 2 * kBlockBytes, tile + block * 2 * kBlockBytes);
  }
}

void decode_grid3(const std::uint8_t *codes, std::int32_t num_blocks, std::uint8_t *tile) {
  for (std::int32_t block = 0; block < num_blocks; block += 4) {
    const std::uint8_t *high = codes + block / 4 * 3 * kBlockBytes;
    std::uint8_t *out = tile + block * 2 * kBlockBytes;
    decode_pairs(high + kBlockBytes, out);
    decode_pairs(high + 2 * kBlockBytes, out + 4 * kBlockBytes);
    for (int bit = 0; bit < 8; ++bit) {
      for (int i = 0; i < kBlockBytes; ++i) {
        out[bit * kBlockBytes + i] |= static_cast<std::uint8_t>(((high[i] >> bit) & 1u) << 2);
      }
    }
  }
}

// The rows of one column of a frame; `before` are its bytes in the frame before.
void decode_column(const TcqPlan &plan, const std::uint8_t *before, const std::uint8_t *here,
                   std::uint8_t *blocks) {
  const std::int32_t rows = kPairRows / plan.frames;
  const std::int32_t bytes = rows * plan.bits / 8;
  std::uint8_t stream[2 + 8 + 4] = {};
  std::memcpy(stream, before + bytes - 2, 2);
  std::memcpy(stream + 2, here, static_cast<std::size_t>(bytes));
  const std::uint32_t mask = (1u << plan.trellis_bits) - 1u;
  for (std::int32_t row = 0; row < rows; ++row) {
    const std::int32_t bit = 16 + (row + 1) * plan.bits - plan.trellis_bits;
    const std::uint8_t *at = stream + bit / 8;
    const std::uint32_t word = at[0] | (std::uint32_t{at[1]} << 8) | (std::uint32_t{at[2]} << 16);
    const std::uint32_t state = (word >> (bit % 8)) & mask;
    const std::uint32_t hash = (state * static_cast<std::uint32_t>(plan.multiplier)) & mask;
    blocks[row * kBlock] = plan.table[hash >> (plan.trellis_bits - plan.index_bits)];
  }
}

// One frame of a block; `set` is its first row set.
void decode_frame(const TcqPlan &plan, const std::uint8_t *before, const std::uint8_t *here,
                  std::uint8_t *set) {
  const std::int32_t bytes = kPairRows / plan.frames * plan.bits / 8;
  for (std::int32_t column = 0; column < kBlock; ++column) {
    decode_column(plan, before + column * bytes, here + column * bytes, set + column);
  }
}

void decode_tcq(const MatrixStage &stage, const std::uint8_t *codes, std::int32_t num_blocks,
                std::uint8_t *tile) {
  const TcqPlan &plan = *stage.tcq;
  const std::int32_t frame_bytes = kBlock * kPairRows / plan.frames * plan.bits / 8;
  for (std::int32_t block = 0; block < num_blocks; ++block) {
    const std::uint8_t *here = codes + std::int64_t{block} * plan.frames * frame_bytes;
    const std::uint8_t *before = here - stage.panel_bytes + (plan.frames - 1) * frame_bytes;
    for (std::int32_t frame = 0; frame < plan.frames; ++frame) {
      decode_frame(plan, before, here, tile + (2 * block + frame) * kBlockBytes);
      before = here;
      here += frame_bytes;
    }
  }
}

// Components 2 * pair and 2 * pair + 1 of 8 index rows.
void decode_vq_small(const MatrixStage &stage, const std::uint8_t *codes, std::int32_t num_blocks,
                     std::uint8_t *tile) {
  for (std::int32_t component = 0; component < 2 * stage.pairs; ++component) {
    const std::uint8_t *table = stage.table + component * 256;
    for (std::int32_t block = 0; block < num_blocks; ++block) {
      std::uint8_t *out = block_of(tile, num_blocks, component / 2, block, component % 2);
      for (int i = 0; i < kBlockBytes; ++i) {
        out[i] = table[codes[block * kBlockBytes + i]];
      }
    }
  }
}

void decode_vq_large(const MatrixStage &stage, const std::uint8_t *codes, std::int32_t num_blocks,
                     std::uint8_t *tile) {
  const std::int32_t entry = stage.entry_bytes;
  for (std::int32_t block = 0; block < num_blocks; ++block) {
    for (std::int32_t i = 0; i < kBlockBytes; ++i) {
      std::uint16_t index;
      std::memcpy(&index, codes + (block * kBlockBytes + i) * 2, sizeof index);
      const std::uint8_t *values = stage.entries + std::int64_t{index} * entry;
      for (std::int32_t component = 0; component < entry; ++component) {
        const std::int32_t row = i / kBlock * entry + component;  // over all row sets
        std::uint8_t *out = block_of(tile, num_blocks, row / kPairRows, block, row / kBlock % 2);
        out[row % kBlock * kBlock + i % kBlock] = values[component];
      }
    }
  }
}

struct Baseline {
  static constexpr int kRows = 4;

  static void decode(const MatrixStage &stage, std::int32_t panel, std::int32_t column,
                     std::int32_t count, std::uint8_t *tile) {
    decode_tile_baseline(stage, panel, column, count, tile);
  }

  static void load_scale(const MatrixPart &part, const MatrixStage &stage, std::int32_t panel,
                         std::int32_t pair, std::int32_t segment, SegmentScale &out) {
    load_segment_scale(part, stage, panel, pair, segment, out);
  }

  // Adds eight columns to the sums of one row set.
  static void add_block(const std::uint8_t *block, const std::int8_t *x, std::int32_t *sums) {
    for (int r = 0; r < kBlock; ++r) {
      std::int32_t sum = 0;
      for (int c = 0; c < kBlock; ++c) {
        sum += std::int32_t{block[r * kBlock + c]} * x[c];
      }
      sums[r] += sum;
    }
  }

  static void segment(const std::uint8_t *blocks, std::int32_t num_blocks, const std::int8_t *x,
                      std::int64_t x_stride, std::int32_t rows, const SegmentScale &scale,
                      const std::int32_t *sums, const float *x_scales, float *lanes,
                      std::int64_t lanes_stride) {
    for (std::int32_t i = 0; i < rows; ++i) {
      std::int32_t dots[kPairRows] = {};
      for (std::int32_t block = 0; block < num_blocks; ++block) {
        const std::int8_t *values = x + i * x_stride + block * kBlock;
        add_block(blocks + 2 * block * kBlockBytes, values, dots);
        add_block(blocks + (2 * block + 1) * kBlockBytes, values, dots + kBlock);
      }
      for (int lane = 0; lane < kPairRows; ++lane) {
        const std::int32_t exact = dots[lane] - scale.zero[lane] * sums[i];
        lanes[i * lanes_stride + lane] +=
            static_cast<float>(exact) * (scale.scale[lane] * x_scales[i]);
      }
    }
  }
};

}  // namespace

void decode_tile_baseline(const MatrixStage &stage, std::int32_t panel, std::int32_t column,
                          std::int32_t count, std::uint8_t *tile) {
  const std::int32_t blocks = count / kBlock;
  const std::uint8_t *codes = stage.codes + panel * stage.panel_bytes;
  switch (stage.decode) {
    case Decode::kGrid2:
      return decode_grid2(codes + std::int64_t{column} * 4, blocks, tile);
    case Decode::kGrid3:
      return decode_grid3(codes + std::int64_t{column} * 6, blocks, tile);
    case Decode::kGrid4:
      return decode_grid4(codes + std::int64_t{column} * 8, blocks, tile);
    case Decode::kGrid8:
      return decode_grid8(codes + std::int64_t{column} * 16, blocks, tile);
    case Decode::kLayers: {
      const std::int64_t at = panel * stage.panel_bytes + std::int64_t{column} * 8;
      return decode_layers(stage.codes + at, stage.lower + at, blocks, tile);
    }
    case Decode::kTcq:
      return decode_tcq(stage, codes + std::int64_t{column} * 2 * stage.tcq->bits, blocks, tile);
    case Decode::kVqSmall:
      return decode_vq_small(stage, codes + std::int64_t{column} * 8, blocks, tile);
    default:
      return decode_vq_large(stage, codes + std::int64_t{column} * 16, blocks, tile);
  }
}

const MatrixOps matrix_ops_baseline = {TileLoops<Baseline>::panels,
                                       decode_tile_baseline,
                                       {layered_largest, layered_estimate}};

}  // namespace vq
