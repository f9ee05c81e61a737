// What both directions of the SCQ1 codec share: the profile's combinatorics, the entropy tables,
// grids and tiles. docs/scq1.md is the specification, scq.bitstream the reference implementation.
#pragma once

#include <cstdint>
#include <vector>

#include "vqkernels.h"

namespace vq::scq1 {

constexpr std::int32_t kMaxSupport = VQ_LATTICE_MAX_SUPPORT;
constexpr std::int32_t kModes = 4;
enum Mode : std::int32_t { kSkip, kReweight, kSwap1, kNew };

// Ends a call with a vq_scq1_reason; caught at the C boundary.
struct Failure {
  std::int32_t reason;
};

[[noreturn]] void fail(std::int32_t reason);

// One latent: indices and numerators of `size` codes.
struct Latent {
  std::int32_t size = 0;
  std::int32_t index[kMaxSupport] = {};
  std::int32_t numerator[kMaxSupport] = {};
};

// Heaviest first, ties by lower index.
void make_canonical(Latent &latent);

// Tuples of positive parts in lexicographic order, and their numbers.
class Parts {
 public:
  void add(const std::int32_t *parts, std::int32_t count);
  std::int32_t count() const { return static_cast<std::int32_t>(packed_.size()); }
  // The number-th tuple; number < count().
  void get(std::int32_t number, std::int32_t count, std::int32_t *parts) const;
  // The number of a tuple that is there.
  std::int32_t find(const std::int32_t *parts, std::int32_t count) const;

 private:
  static std::uint32_t pack(const std::int32_t *parts, std::int32_t count);
  std::vector<std::uint32_t> packed_;
};

// Cumulative frequencies, one row after the other; empty if the table does not exist.
struct Table {
  const std::uint32_t *cumulative = nullptr;
  std::int32_t rows = 0;
  std::int32_t alphabet = 0;

  bool exists() const { return cumulative != nullptr; }
  const std::uint32_t *row(std::int64_t number) const {
    return cumulative + number * (alphabet + 1);
  }
};

// A case of the RAW ranking: t codes, u of them with lower indices than the heaviest.
struct RankCase {
  std::int32_t size;
  std::int32_t below;
  Parts weights;
};

struct Model {
  explicit Model(const vq_scq1_profile &profile);

  std::int32_t num_codes;
  std::int32_t max_support;
  std::int32_t denominator;
  Parts compositions[kMaxSupport + 1];
  Parts partitions[kMaxSupport + 1];

  // RAW: choose(x, m) = C(x, m), cases in order.
  std::int64_t choose(std::int64_t x, std::int32_t m) const {
    return choose_[static_cast<std::size_t>(m) * (static_cast<std::size_t>(num_codes) + 1) + x];
  }
  const std::int64_t *choose_column(std::int32_t m) const {
    return choose_.data() + static_cast<std::size_t>(m) * (static_cast<std::size_t>(num_codes) + 1);
  }
  std::vector<RankCase> cases;
  // How many ranks case c has under heaviest index i.
  std::int64_t case_ranks(const RankCase &c, std::int32_t heaviest) const {
    return choose(heaviest, c.below) * choose(num_codes - 1 - heaviest, c.size - 1 - c.below) *
           c.weights.count();
  }

  // rANS; has_tables is false for a model that has none.
  bool has_tables;
  std::int32_t base_clusters;
  std::int32_t other_clusters;
  std::vector<std::uint16_t> base_cluster;
  std::vector<std::uint16_t> other_cluster;
  Table base, support, other, mode, fresh, swap;
  Table partition[kMaxSupport + 1], slot[kMaxSupport + 1];
  Table reweight[kMaxSupport + 1], swap_weights[kMaxSupport + 1];

  // Cost in 1/256 bit by frequency 0..65536.
  const std::int32_t *costs;

  std::int32_t partition_number(const Latent &latent) const {
    return partitions[latent.size].find(latent.numerator, latent.size);
  }

 private:
  void make_choose();
  void make_cases();
  void take_tables(const vq_scq1_profile &profile);
  std::vector<std::int64_t> choose_;
  std::vector<std::uint32_t> cumulative_;
};

struct Grid {
  std::int32_t rows;
  std::int32_t columns;
  std::int64_t size() const { return std::int64_t{rows} * columns; }
};

// A rectangle of a grid; `at` gives raster positions in the whole grid.
struct Tile {
  std::int32_t top, left;
  Grid grid;
  std::int64_t at(std::int64_t position, std::int32_t frame_columns) const {
    return (top + position / grid.columns) * frame_columns + left + position % grid.columns;
  }
};

// side 0: one tile.
std::vector<Tile> split_tiles(Grid grid, std::int32_t side);

// Context rows of a raster scan: the values to the left and above, `outside` beyond the edges.
class Neighbours {
 public:
  Neighbours(Grid grid, std::int32_t outside)
      : columns_(grid.columns), outside_(outside),
        values_(static_cast<std::size_t>(grid.size()), outside) {}

  std::int64_t row(std::int64_t position) const {
    const std::int32_t left = position % columns_ != 0 ? values_[position - 1] : outside_;
    const std::int32_t above = position >= columns_ ? values_[position - columns_] : outside_;
    return std::int64_t{left} * (outside_ + 1) + above;
  }
  void set(std::int64_t position, std::int32_t value) { values_[position] = value; }

 private:
  std::int32_t columns_;
  std::int32_t outside_;
  std::vector<std::int32_t> values_;
};

// Reads caller arrays [N][s] into canonical latents; fails for what the model cannot hold.
std::vector<Latent> read_latents(const Model &model, const std::int64_t *indices,
                                 const std::int64_t *numerators, std::int64_t count);

std::uint16_t crc16(const std::uint8_t *bytes, std::size_t count, std::uint16_t start);
// CRC-16 of bytes 0..5 and 10..end - 1.
std::uint16_t frame_check(const std::uint8_t *codes, std::size_t end);
// CRC-32 that names an assignment.
std::uint32_t fingerprint(const Model &model, const std::vector<Latent> &latents, Grid grid);

// RAW segments of one tile.
std::size_t raw_base_bytes(const Model &model, std::int64_t count);
std::size_t raw_rest_bytes(const Model &model, const std::vector<std::int32_t> &leads);
std::vector<std::int32_t> raw_read_base(const Model &model, const std::uint8_t *bytes,
                                        std::int64_t count);
std::vector<Latent> raw_read_rest(const Model &model, const std::uint8_t *bytes,
                                  const std::vector<std::int32_t> &leads);
void raw_write_base(const Model &model, const std::vector<Latent> &latents,
                    std::vector<std::uint8_t> &out);
void raw_write_rest(const Model &model, const std::vector<Latent> &latents,
                    std::vector<std::uint8_t> &out);

constexpr std::uint8_t kMagic = 0x53;
constexpr std::uint8_t kVersion = 2;
constexpr std::size_t kFixedBytes = 10;
enum Flag : std::uint8_t { kFlagDelta = 1, kFlagRans = 2, kFlagLetterboxed = 4, kFlagTiled = 8 };

}  // namespace vq::scq1

struct vq_scq1_model {
  explicit vq_scq1_model(const vq_scq1_profile &profile) : model(profile) {}
  vq::scq1::Model model;
};
