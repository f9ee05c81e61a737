// Frames to latents. Every byte string either decodes or ends in a reason; work and memory are
// bounded by the grid and the bytes that are there.
#include <algorithm>
#include <new>

#include "scq1_model.hpp"

namespace vq::scq1 {
namespace {

constexpr std::uint32_t kLower = 1u << 16;

struct Span {
  const std::uint8_t *bytes;
  std::size_t size;
};

// One rANS stream, read symbol by symbol.
class Decoder {
 public:
  explicit Decoder(Span stream) : stream_(stream) {}

  std::int32_t read(const Table &table, std::int64_t row) {
    if (position_ == 0) {
      state_ = take(2);
      state_ |= take(2) << 16;
      if (state_ < kLower) {
        fail(VQ_SCQ1_STREAM);
      }
    }
    const std::uint32_t *cumulative = table.row(row);
    const std::uint32_t slot = state_ & 0xffffu;
    // The last entry not above the slot; the first entry is 0.
    const std::uint32_t *at = cumulative;
    std::int32_t length = table.alphabet;
    while (length > 1) {
      const std::int32_t half = length / 2;
      at = at[half] <= slot ? at + half : at;
      length -= half;
    }
    state_ = (at[1] - at[0]) * (state_ >> 16) + slot - at[0];
    if (state_ < kLower) {
      state_ = state_ << 16 | take(2);
    }
    return static_cast<std::int32_t>(at - cumulative);
  }

  void close() const {
    if (position_ != stream_.size || (position_ != 0 && state_ != kLower)) {
      fail(VQ_SCQ1_STREAM);
    }
  }

 private:
  std::uint32_t take(std::size_t count) {
    if (stream_.size - position_ < count) {
      fail(VQ_SCQ1_STREAM);
    }
    const std::uint8_t *bytes = stream_.bytes + position_;
    position_ += count;
    return static_cast<std::uint32_t>(bytes[0]) | static_cast<std::uint32_t>(bytes[1]) << 8;
  }

  Span stream_;
  std::size_t position_ = 0;
  std::uint32_t state_ = 0;
};

struct Header {
  std::uint8_t flags = 0;
  std::uint16_t base_check = 0;
  std::uint16_t full_check = 0;
  std::uint32_t reference = 0;
  std::int32_t tile = 0;
  std::size_t size = 0;

  bool has(Flag flag) const { return (flags & flag) != 0; }
};

std::uint32_t little(const std::uint8_t *bytes, std::size_t count) {
  std::uint32_t value = 0;
  for (std::size_t i = count; i-- > 0;) {
    value = value << 8 | bytes[i];
  }
  return value;
}

// A varint of at most 5 bytes in its shortest form; moves `position` behind it.
std::uint64_t read_varint(Span codes, std::size_t &position) {
  std::uint64_t value = 0;
  for (std::size_t count = 0; count < 5 && position + count < codes.size; ++count) {
    const std::uint8_t byte = codes.bytes[position + count];
    value |= static_cast<std::uint64_t>(byte & 127u) << (7 * count);
    if (byte < 128) {
      if (count > 0 && byte == 0) {
        fail(VQ_SCQ1_HEADER);
      }
      position += count + 1;
      return value;
    }
  }
  fail(VQ_SCQ1_HEADER);
}

Header parse_header(Span codes) {
  if (codes.size < kFixedBytes || codes.bytes[0] != kMagic || codes.bytes[1] >> 4 != kVersion) {
    fail(VQ_SCQ1_HEADER);
  }
  Header header;
  header.flags = codes.bytes[1] & 15u;
  header.base_check = static_cast<std::uint16_t>(little(codes.bytes + 6, 2));
  header.full_check = static_cast<std::uint16_t>(little(codes.bytes + 8, 2));
  header.size = kFixedBytes;
  if (header.has(kFlagDelta)) {
    if (header.has(kFlagLetterboxed) || !header.has(kFlagRans) || codes.size < kFixedBytes + 4) {
      fail(VQ_SCQ1_HEADER);
    }
    header.reference = little(codes.bytes + kFixedBytes, 4);
    header.size += 4;
  } else {
    for (int side = 0; side < 2; ++side) {
      const std::uint64_t value = read_varint(codes, header.size);
      if (value < 1 || value > 0xffff) {
        fail(VQ_SCQ1_HEADER);
      }
    }
  }
  if (header.has(kFlagTiled)) {
    if (header.size >= codes.size || codes.bytes[header.size] == 0) {
      fail(VQ_SCQ1_HEADER);
    }
    header.tile = codes.bytes[header.size++];
  }
  return header;
}

Latent single_code(const Model &model, std::int32_t lead) {
  Latent latent;
  latent.size = 1;
  latent.index[0] = lead;
  latent.numerator[0] = model.denominator;
  return latent;
}

// What a base layer says of a tile: leads, and in a delta frame modes.
struct Base {
  std::vector<std::int32_t> modes;
  std::vector<std::int32_t> leads;
};

class Reader {
 public:
  Reader(const Model &model, Span codes, Grid grid, std::vector<Latent> reference)
      : model_(model), codes_(codes), grid_(grid), header_(parse_header(codes)),
        reference_(std::move(reference)), is_rans_(header_.has(kFlagRans)),
        is_delta_(header_.has(kFlagDelta)) {}

  std::vector<Latent> read(bool has_reference, bool allow_partial, bool &complete) {
    const bool is_whole = frame_check(codes_.bytes, codes_.size) == header_.full_check;
    if (!is_whole && !allow_partial) {
      fail(VQ_SCQ1_CHECK);
    }
    check_model(has_reference);
    tiles_ = split_tiles(grid_, header_.tile);
    find_segments();
    if (base_end_ > codes_.size) {
      fail(VQ_SCQ1_LENGTH);
    }
    if (frame_check(codes_.bytes, base_end_) != header_.base_check) {
      fail(VQ_SCQ1_CHECK);
    }
    read_base();
    complete = true;
    if (!allow_partial) {
      return read_rest();
    }
    try {
      if (is_whole) {
        return read_rest();
      }
    } catch (const Failure &) {
      // A cut frame can match its full check by chance; the base layer is still good.
    }
    complete = false;
    return partial();
  }

 private:
  void check_model(bool has_reference) const {
    if (is_rans_ && !model_.has_tables) {
      fail(VQ_SCQ1_TABLES);
    }
    if (is_delta_ &&
        (!has_reference || fingerprint(model_, reference_, grid_) != header_.reference)) {
      fail(VQ_SCQ1_REFERENCE);
    }
  }

  void find_segments() {
    std::size_t position = header_.size;
    if (is_rans_) {
      for (std::size_t i = 0; i + 1 < 2 * tiles_.size(); ++i) {
        const std::uint64_t length = read_varint(codes_, position);
        (i < tiles_.size() ? base_lengths_ : rest_lengths_).push_back(length);
      }
    } else {
      for (const Tile &tile : tiles_) {
        base_lengths_.push_back(raw_base_bytes(model_, tile.grid.size()));
      }
    }
    base_start_ = position;
    base_end_ = position;
    for (const std::uint64_t length : base_lengths_) {
      base_end_ += length;  // at most 2^35 each: no overflow
    }
  }

  // Cuts the segments of these lengths; they must fit.
  std::vector<Span> cut(std::size_t start, const std::vector<std::uint64_t> &lengths) const {
    std::vector<Span> spans;
    for (const std::uint64_t length : lengths) {
      if (length > codes_.size - start) {
        fail(VQ_SCQ1_LENGTH);
      }
      spans.push_back({codes_.bytes + start, static_cast<std::size_t>(length)});
      start += static_cast<std::size_t>(length);
    }
    return spans;
  }

  void read_base() {
    const std::vector<Span> spans = cut(base_start_, base_lengths_);
    for (std::size_t t = 0; t < tiles_.size(); ++t) {
      bases_.push_back(is_delta_  ? read_delta_base(spans[t], tiles_[t])
                       : is_rans_ ? read_key_base(spans[t], tiles_[t])
                                  : Base{{}, raw_read_base(model_, spans[t].bytes,
                                                           tiles_[t].grid.size())});
    }
  }

  Base read_key_base(Span stream, const Tile &tile) const {
    Neighbours contexts(tile.grid, model_.base_clusters);
    Decoder decoder(stream);
    Base base;
    for (std::int64_t at = 0; at < tile.grid.size(); ++at) {
      const std::int32_t lead = decoder.read(model_.base, contexts.row(at));
      contexts.set(at, model_.base_cluster[lead]);
      base.leads.push_back(lead);
    }
    decoder.close();
    return base;
  }

  Base read_delta_base(Span stream, const Tile &tile) const {
    Neighbours contexts(tile.grid, kModes);
    Decoder decoder(stream);
    Base base;
    for (std::int64_t at = 0; at < tile.grid.size(); ++at) {
      const std::int32_t mode = decoder.read(model_.mode, contexts.row(at));
      contexts.set(at, mode);
      std::int32_t lead = before(tile, at).index[0];
      if (mode == kNew) {
        lead = decoder.read(model_.fresh, model_.other_cluster[lead]);
      }
      base.modes.push_back(mode);
      base.leads.push_back(lead);
    }
    decoder.close();
    return base;
  }

  const Latent &before(const Tile &tile, std::int64_t at) const {
    return reference_[static_cast<std::size_t>(tile.at(at, grid_.columns))];
  }

  std::vector<Latent> read_rest() const {
    const std::vector<Span> spans = cut(base_end_, all_rest_lengths());
    std::vector<Latent> all(static_cast<std::size_t>(grid_.size()));
    for (std::size_t t = 0; t < tiles_.size(); ++t) {
      const std::vector<Latent> part =
          is_rans_ ? read_rans_rest(spans[t], t)
                   : raw_read_rest(model_, spans[t].bytes, bases_[t].leads);
      place(t, part, all);
    }
    return all;
  }

  // The lengths of all enhancements, which must end where the frame ends.
  std::vector<std::uint64_t> all_rest_lengths() const {
    std::vector<std::uint64_t> lengths = rest_lengths_;
    if (!is_rans_) {
      for (const Base &base : bases_) {
        lengths.push_back(raw_rest_bytes(model_, base.leads));
      }
    }
    std::uint64_t sum = 0;
    for (const std::uint64_t length : lengths) {
      sum += length;
    }
    const std::uint64_t there = codes_.size - base_end_;
    if (sum > there || (!is_rans_ && sum != there)) {
      fail(VQ_SCQ1_LENGTH);
    }
    if (is_rans_) {
      lengths.push_back(there - sum);
    }
    return lengths;
  }

  std::vector<Latent> read_rans_rest(Span stream, std::size_t t) const {
    Decoder decoder(stream);
    std::vector<Latent> latents;
    const Base &base = bases_[t];
    latents.reserve(base.leads.size());
    for (std::size_t at = 0; at < base.leads.size(); ++at) {
      Latent latent = is_delta_ && base.modes[at] != kNew
                          ? read_change(decoder, base.modes[at],
                                        before(tiles_[t], static_cast<std::int64_t>(at)))
                          : read_solo(decoder, base.leads[at]);
      make_canonical(latent);
      latents.push_back(latent);
    }
    decoder.close();
    return latents;
  }

  Latent read_solo(Decoder &decoder, std::int32_t lead) const {
    Latent latent;
    std::int32_t size = 1;
    if (model_.support.exists()) {
      size += decoder.read(model_.support, model_.base_cluster[lead]);
    }
    std::int32_t number = 0;
    if (model_.partition[size].exists()) {
      number = decoder.read(model_.partition[size], 0);
    }
    latent.index[latent.size++] = lead;
    while (latent.size < size) {
      const std::int32_t code = decoder.read(model_.other, model_.other_cluster[lead]);
      refuse_twice(latent, code);
      latent.index[latent.size++] = code;
    }
    model_.partitions[size].get(number, size, latent.numerator);
    return latent;
  }

  Latent read_change(Decoder &decoder, std::int32_t mode, const Latent &before) const {
    Latent latent = before;
    if (mode == kSkip) {
      return latent;
    }
    const std::int32_t row = model_.partition_number(before);
    const Table *weights = &model_.reweight[before.size];
    if (mode == kSwap1) {
      std::int32_t slot = 0;
      if (model_.slot[before.size].exists()) {
        slot = decoder.read(model_.slot[before.size], 0);
      }
      const std::int32_t code =
          decoder.read(model_.swap, model_.other_cluster[before.index[slot]]);
      refuse_twice(before, code);
      latent.index[slot] = code;
      weights = &model_.swap_weights[before.size];
    } else if (!weights->exists()) {
      fail(VQ_SCQ1_STATE);
    }
    const std::int32_t number = weights->exists() ? decoder.read(*weights, row) : 0;
    model_.compositions[before.size].get(number, before.size, latent.numerator);
    return latent;
  }

  static void refuse_twice(const Latent &latent, std::int32_t code) {
    if (std::find(latent.index, latent.index + latent.size, code) != latent.index + latent.size) {
      fail(VQ_SCQ1_STATE);
    }
  }

  std::vector<Latent> partial() const {
    std::vector<Latent> all(static_cast<std::size_t>(grid_.size()));
    for (std::size_t t = 0; t < tiles_.size(); ++t) {
      const Base &base = bases_[t];
      std::vector<Latent> part;
      for (std::size_t at = 0; at < base.leads.size(); ++at) {
        part.push_back(is_delta_ && base.modes[at] != kNew
                           ? before(tiles_[t], static_cast<std::int64_t>(at))
                           : single_code(model_, base.leads[at]));
      }
      place(t, part, all);
    }
    return all;
  }

  void place(std::size_t t, const std::vector<Latent> &part, std::vector<Latent> &all) const {
    for (std::size_t at = 0; at < part.size(); ++at) {
      all[static_cast<std::size_t>(tiles_[t].at(static_cast<std::int64_t>(at), grid_.columns))] =
          part[at];
    }
  }

  const Model &model_;
  Span codes_;
  Grid grid_;
  Header header_;
  std::vector<Latent> reference_;
  bool is_rans_;
  bool is_delta_;
  std::vector<Tile> tiles_;
  std::vector<std::uint64_t> base_lengths_;
  std::vector<std::uint64_t> rest_lengths_;
  std::size_t base_start_ = 0;
  std::size_t base_end_ = 0;
  std::vector<Base> bases_;
};

void write_latents(const Model &model, const std::vector<Latent> &latents, std::int64_t *indices,
                   std::int64_t *numerators) {
  for (const Latent &latent : latents) {
    for (std::int32_t i = 0; i < model.max_support; ++i) {
      const bool is_used = i < latent.size;
      *indices++ = latent.index[is_used ? i : 0];
      *numerators++ = is_used ? latent.numerator[i] : 0;
    }
  }
}

bool is_profile(const vq_scq1_profile &profile) {
  const std::int32_t n = profile.denominator;
  return profile.num_codes >= 2 && profile.num_codes <= VQ_LATTICE_MAX_CODES &&
         profile.max_support >= 1 && profile.max_support <= VQ_LATTICE_MAX_SUPPORT && n >= 1 &&
         n <= VQ_LATTICE_MAX_DENOMINATOR && (n & (n - 1)) == 0 && profile.max_support <= n &&
         profile.max_support <= profile.num_codes && profile.reserved == 0;
}

}  // namespace
}  // namespace vq::scq1

std::int32_t vq_scq1_open(const vq_scq1_profile *profile, vq_scq1_model **model) {
  if (profile == nullptr || model == nullptr) {
    return VQ_ERR_NULL;
  }
  if (!vq::scq1::is_profile(*profile)) {
    return VQ_ERR_SHAPE;
  }
  try {
    *model = new vq_scq1_model(*profile);
  } catch (const vq::scq1::Failure &) {
    return VQ_ERR_SHAPE;
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}

void vq_scq1_close(vq_scq1_model *model) {
  delete model;
}

std::int32_t vq_scq1_unpack(const vq_scq1_model *model, const vq_scq1_frame *frame,
                            std::int32_t *reason) {
  using namespace vq::scq1;
  if (model == nullptr || frame == nullptr || reason == nullptr || frame->codes == nullptr ||
      frame->indices == nullptr || frame->numerators == nullptr ||
      (frame->reference_indices == nullptr) != (frame->reference_numerators == nullptr)) {
    return VQ_ERR_NULL;
  }
  const Grid grid{frame->rows, frame->columns};
  if (grid.rows < 0 || grid.columns < 0 || grid.rows > 0xffff || grid.columns > 0xffff ||
      grid.size() > VQ_MAX_FEATURES || frame->num_bytes < 0) {
    return VQ_ERR_SHAPE;
  }
  *reason = VQ_SCQ1_GOOD;
  frame->state[0] = 0;
  try {
    std::vector<Latent> reference;
    const bool has_reference = frame->reference_indices != nullptr;
    if (has_reference) {
      reference = read_latents(model->model, frame->reference_indices,
                               frame->reference_numerators, grid.size());
    }
    bool complete = false;
    Reader reader(model->model, {frame->codes, static_cast<std::size_t>(frame->num_bytes)}, grid,
                  std::move(reference));
    const std::vector<Latent> latents =
        reader.read(has_reference, frame->allow_partial != 0, complete);
    write_latents(model->model, latents, frame->indices, frame->numerators);
    frame->state[0] = complete ? 1 : 0;
  } catch (const Failure &failure) {
    *reason = failure.reason;
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}
