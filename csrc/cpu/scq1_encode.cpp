// Latents to frames, byte for byte as scq.bitstream writes them.
#include <algorithm>
#include <new>

#include "scq1_model.hpp"

namespace vq::scq1 {
namespace {

using Bytes = std::vector<std::uint8_t>;

// The slots of one symbol.
struct Interval {
  std::uint32_t start;
  std::uint32_t frequency;
};

using Intervals = std::vector<Interval>;

Interval interval(const Table &table, std::int64_t row, std::int32_t symbol) {
  const std::uint32_t *cumulative = table.row(row);
  return {cumulative[symbol], cumulative[symbol + 1] - cumulative[symbol]};
}

void encode_intervals(const Intervals &intervals, Bytes &out) {
  if (intervals.empty()) {
    return;
  }
  std::uint32_t state = 1u << 16;
  std::vector<std::uint16_t> words;
  for (auto at = intervals.rbegin(); at != intervals.rend(); ++at) {
    if (state >> 16 >= at->frequency) {
      words.push_back(static_cast<std::uint16_t>(state & 0xffffu));
      state >>= 16;
    }
    state = (state / at->frequency << 16) + state % at->frequency + at->start;
  }
  for (int shift = 0; shift < 32; shift += 8) {
    out.push_back(static_cast<std::uint8_t>(state >> shift));
  }
  for (auto at = words.rbegin(); at != words.rend(); ++at) {
    out.push_back(static_cast<std::uint8_t>(*at & 255u));
    out.push_back(static_cast<std::uint8_t>(*at >> 8));
  }
}

// A latent as coded by itself: indices in coding order, number of the partition.
struct Solo {
  std::int32_t size;
  std::int32_t index[kMaxSupport];
  std::int32_t partition;
};

class Encoder {
 public:
  explicit Encoder(const Model &model) : model_(model) {}

  void key_tile(const std::vector<Latent> &latents, Grid grid, Bytes &base, Bytes &rest) {
    Neighbours contexts(grid, model_.base_clusters);
    for (std::size_t at = 0; at < latents.size(); ++at) {
      const std::int64_t row = contexts.row(static_cast<std::int64_t>(at));
      const Solo solo = cheapest(latents[at], model_.base, row);
      contexts.set(static_cast<std::int64_t>(at), model_.base_cluster[solo.index[0]]);
      base_.push_back(interval(model_.base, row, solo.index[0]));
      add_solo(solo, rest_);
    }
    flush(base, rest);
  }

  void delta_tile(const std::vector<Latent> &latents, const std::vector<Latent> &reference,
                  Grid grid, Bytes &base, Bytes &rest, std::int32_t *modes) {
    Neighbours contexts(grid, kModes);
    for (std::size_t at = 0; at < latents.size(); ++at) {
      const std::int64_t row = contexts.row(static_cast<std::int64_t>(at));
      const std::int32_t mode = add_change(latents[at], reference[at], row);
      contexts.set(static_cast<std::int64_t>(at), mode);
      ++modes[mode];
    }
    flush(base, rest);
  }

 private:
  void flush(Bytes &base, Bytes &rest) {
    encode_intervals(base_, base);
    encode_intervals(rest_, rest);
    base_.clear();
    rest_.clear();
  }

  std::int64_t cost(const Intervals &intervals) const {
    std::int64_t sum = 0;
    for (const Interval &one : intervals) {
      sum += model_.costs[one.frequency];
    }
    return sum;
  }

  std::int64_t solo_cost(const Solo &solo, const Table &table, std::int64_t row) {
    scratch_.clear();
    add_solo(solo, scratch_);
    return model_.costs[interval(table, row, solo.index[0]).frequency] + cost(scratch_);
  }

  // The form of least cost when its lead is coded by that row; the first of equals.
  Solo cheapest(const Latent &latent, const Table &table, std::int64_t row) {
    Solo best = form(latent, 0);
    if (latent.size == 1 || latent.numerator[1] != latent.numerator[0]) {
      return best;
    }
    std::int64_t least = solo_cost(best, table, row);
    for (std::int32_t i = 1; i < latent.size && latent.numerator[i] == latent.numerator[0]; ++i) {
      const Solo solo = form(latent, i);
      const std::int64_t own = solo_cost(solo, table, row);
      if (own < least) {
        least = own;
        best = solo;
      }
    }
    return best;
  }

  // The latent led by the code of slot `lead`.
  Solo form(const Latent &latent, std::int32_t lead) const {
    Solo solo{latent.size, {}, model_.partition_number(latent)};
    std::copy_n(latent.index, latent.size, solo.index);
    std::rotate(solo.index, solo.index + lead, solo.index + lead + 1);
    return solo;
  }

  void add_solo(const Solo &solo, Intervals &out) const {
    const std::int32_t lead = solo.index[0];
    if (model_.support.exists()) {
      out.push_back(interval(model_.support, model_.base_cluster[lead], solo.size - 1));
    }
    if (model_.partition[solo.size].exists()) {
      out.push_back(interval(model_.partition[solo.size], 0, solo.partition));
    }
    for (std::int32_t i = 1; i < solo.size; ++i) {
      out.push_back(interval(model_.other, model_.other_cluster[lead], solo.index[i]));
    }
  }

  // Codes one latent of a delta frame and returns its mode.
  std::int32_t add_change(const Latent &now, const Latent &before, std::int64_t row) {
    const std::int64_t new_row = model_.other_cluster[before.index[0]];
    Intervals changed;
    std::int32_t mode = compare(now, before, changed);
    Solo solo{};
    if (mode != kSkip) {
      solo = cheapest(now, model_.fresh, new_row);
    }
    if (mode == kReweight || mode == kSwap1) {
      const std::int64_t own = mode_cost(row, mode) + cost(changed);
      if (own > mode_cost(row, kNew) + solo_cost(solo, model_.fresh, new_row)) {
        mode = kNew;
      }
    }
    base_.push_back(interval(model_.mode, row, mode));
    if (mode == kNew) {
      base_.push_back(interval(model_.fresh, new_row, solo.index[0]));
      add_solo(solo, rest_);
    } else if (mode != kSkip) {
      rest_.insert(rest_.end(), changed.begin(), changed.end());
    }
    return mode;
  }

  std::int64_t mode_cost(std::int64_t row, std::int32_t mode) const {
    return model_.costs[interval(model_.mode, row, mode).frequency];
  }

  // The simplest mode that is exact, and its enhancement.
  std::int32_t compare(const Latent &now, const Latent &before, Intervals &changed) const {
    if (now.size != before.size) {
      return kNew;
    }
    const std::int32_t size = before.size;
    std::int32_t weights[kMaxSupport] = {};
    bool is_kept[kMaxSupport] = {};
    std::int32_t lost = -1;
    std::int32_t num_lost = 0;
    for (std::int32_t a = 0; a < size; ++a) {
      const std::int32_t *end = now.index + size;
      const std::int32_t *at = std::find(now.index, end, before.index[a]);
      if (at == end) {
        lost = a;
        ++num_lost;
      } else {
        is_kept[at - now.index] = true;
        weights[a] = now.numerator[at - now.index];
      }
    }
    if (num_lost == 0) {
      const bool is_same = std::equal(now.numerator, now.numerator + size, before.numerator) &&
                           std::equal(now.index, now.index + size, before.index);
      if (!is_same) {
        add_weights(model_.reweight[size], before, weights, changed);
      }
      return is_same ? kSkip : kReweight;
    }
    if (num_lost > 1) {
      return kNew;
    }
    const std::int64_t gained = std::find(is_kept, is_kept + size, false) - is_kept;
    weights[lost] = now.numerator[gained];
    if (model_.slot[size].exists()) {
      changed.push_back(interval(model_.slot[size], 0, lost));
    }
    changed.push_back(
        interval(model_.swap, model_.other_cluster[before.index[lost]], now.index[gained]));
    add_weights(model_.swap_weights[size], before, weights, changed);
    return kSwap1;
  }

  void add_weights(const Table &table, const Latent &before, const std::int32_t *weights,
                   Intervals &changed) const {
    if (table.exists()) {
      const std::int32_t number = model_.compositions[before.size].find(weights, before.size);
      changed.push_back(interval(table, model_.partition_number(before), number));
    }
  }

  const Model &model_;
  Intervals base_;
  Intervals rest_;
  Intervals scratch_;
};

void write_varint(std::uint64_t value, Bytes &out) {
  for (; value > 127; value >>= 7) {
    out.push_back(static_cast<std::uint8_t>((value & 127u) | 128u));
  }
  out.push_back(static_cast<std::uint8_t>(value));
}

struct Frame {
  Bytes bytes;
  std::size_t base_end = 0;
  bool is_rans = false;
};

Bytes start_header(const vq_scq1_request &request, std::uint8_t flags) {
  flags = static_cast<std::uint8_t>(flags | (request.tile > 0 ? kFlagTiled : 0));
  Bytes out(kFixedBytes, 0);
  out[0] = kMagic;
  out[1] = static_cast<std::uint8_t>(kVersion << 4 | flags);
  std::copy_n(request.model_hash, 4, out.begin() + 2);
  return out;
}

void end_header(const vq_scq1_request &request, Bytes &out) {
  if (request.tile > 0) {
    out.push_back(static_cast<std::uint8_t>(request.tile));
  }
}

Bytes key_header(const vq_scq1_request &request, bool is_rans) {
  Bytes out = start_header(
      request, static_cast<std::uint8_t>((request.letterboxed != 0 ? kFlagLetterboxed : 0) |
                                         (is_rans ? kFlagRans : 0)));
  write_varint(static_cast<std::uint64_t>(request.width), out);
  write_varint(static_cast<std::uint64_t>(request.height), out);
  end_header(request, out);
  return out;
}

Frame join(Bytes header, const std::vector<Bytes> &bases, const std::vector<Bytes> &rests,
           bool is_rans) {
  Frame frame{std::move(header), 0, is_rans};
  if (is_rans) {
    for (const Bytes &base : bases) {
      write_varint(base.size(), frame.bytes);
    }
    for (std::size_t i = 0; i + 1 < rests.size(); ++i) {
      write_varint(rests[i].size(), frame.bytes);
    }
  }
  for (const Bytes &base : bases) {
    frame.bytes.insert(frame.bytes.end(), base.begin(), base.end());
  }
  frame.base_end = frame.bytes.size();
  for (const Bytes &rest : rests) {
    frame.bytes.insert(frame.bytes.end(), rest.begin(), rest.end());
  }
  const std::uint16_t checks[2] = {frame_check(frame.bytes.data(), frame.base_end),
                                   frame_check(frame.bytes.data(), frame.bytes.size())};
  for (std::size_t i = 0; i < 2; ++i) {
    frame.bytes[6 + 2 * i] = static_cast<std::uint8_t>(checks[i] & 255u);
    frame.bytes[7 + 2 * i] = static_cast<std::uint8_t>(checks[i] >> 8);
  }
  return frame;
}

std::vector<Latent> take(const std::vector<Latent> &latents, const Tile &tile,
                         std::int32_t columns) {
  std::vector<Latent> part;
  for (std::int64_t at = 0; at < tile.grid.size(); ++at) {
    part.push_back(latents[static_cast<std::size_t>(tile.at(at, columns))]);
  }
  return part;
}

Frame pack_key(const Model &model, const vq_scq1_request &request,
               const std::vector<Latent> &latents, Grid grid, bool is_rans) {
  const std::vector<Tile> tiles = split_tiles(grid, request.tile);
  std::vector<Bytes> bases(tiles.size());
  std::vector<Bytes> rests(tiles.size());
  Encoder encoder(model);
  for (std::size_t t = 0; t < tiles.size(); ++t) {
    const std::vector<Latent> part = take(latents, tiles[t], grid.columns);
    if (is_rans) {
      encoder.key_tile(part, tiles[t].grid, bases[t], rests[t]);
    } else {
      raw_write_base(model, part, bases[t]);
      raw_write_rest(model, part, rests[t]);
    }
  }
  return join(key_header(request, is_rans), bases, rests, is_rans);
}

Frame pack_delta(const Model &model, const vq_scq1_request &request,
                 const std::vector<Latent> &latents, const std::vector<Latent> &reference,
                 Grid grid) {
  const std::vector<Tile> tiles = split_tiles(grid, request.tile);
  std::vector<Bytes> bases(tiles.size());
  std::vector<Bytes> rests(tiles.size());
  Encoder encoder(model);
  for (std::size_t t = 0; t < tiles.size(); ++t) {
    encoder.delta_tile(take(latents, tiles[t], grid.columns),
                       take(reference, tiles[t], grid.columns), tiles[t].grid, bases[t], rests[t],
                       request.state + 3);
  }
  Bytes header = start_header(request, kFlagDelta | kFlagRans);
  const std::uint32_t name = fingerprint(model, reference, grid);
  for (int shift = 0; shift < 32; shift += 8) {
    header.push_back(static_cast<std::uint8_t>(name >> shift));
  }
  end_header(request, header);
  return join(std::move(header), bases, rests, true);
}

Frame pack(const Model &model, const vq_scq1_request &request, Grid grid) {
  const std::vector<Latent> latents =
      read_latents(model, request.indices, request.numerators, grid.size());
  if (request.entropy != VQ_SCQ1_RAW && !model.has_tables &&
      (request.entropy == VQ_SCQ1_RANS || request.reference_indices != nullptr)) {
    fail(VQ_SCQ1_TABLES);
  }
  if (request.reference_indices != nullptr) {
    const std::vector<Latent> reference = read_latents(
        model, request.reference_indices, request.reference_numerators, grid.size());
    return pack_delta(model, request, latents, reference, grid);
  }
  if (request.entropy == VQ_SCQ1_RAW || !model.has_tables) {
    return pack_key(model, request, latents, grid, false);
  }
  Frame rans = pack_key(model, request, latents, grid, true);
  if (request.entropy == VQ_SCQ1_RANS) {
    return rans;
  }
  Frame raw = pack_key(model, request, latents, grid, false);
  return raw.bytes.size() < rans.bytes.size() ? raw : rans;
}

bool is_request(const vq_scq1_request &request) {
  return request.rows >= 0 && request.columns >= 0 && request.rows <= 0xffff &&
         request.columns <= 0xffff &&
         std::int64_t{request.rows} * request.columns <= VQ_MAX_FEATURES && request.tile >= 0 &&
         request.tile <= 255 && request.entropy >= VQ_SCQ1_AUTO &&
         request.entropy <= VQ_SCQ1_RANS && request.capacity >= 0 &&
         (request.reference_indices != nullptr ||
          (request.width >= 1 && request.width <= 0xffff && request.height >= 1 &&
           request.height <= 0xffff));
}

}  // namespace
}  // namespace vq::scq1

std::int32_t vq_scq1_pack(const vq_scq1_model *model, const vq_scq1_request *request,
                          std::int32_t *reason) {
  using namespace vq::scq1;
  if (model == nullptr || request == nullptr || reason == nullptr || request->indices == nullptr ||
      request->numerators == nullptr || request->codes == nullptr || request->state == nullptr ||
      (request->reference_indices == nullptr) != (request->reference_numerators == nullptr)) {
    return VQ_ERR_NULL;
  }
  if (!is_request(*request)) {
    return VQ_ERR_SHAPE;
  }
  *reason = VQ_SCQ1_GOOD;
  std::fill_n(request->state, 7, 0);
  try {
    const Frame frame = pack(model->model, *request, {request->rows, request->columns});
    if (frame.bytes.size() > static_cast<std::size_t>(request->capacity)) {
      return VQ_ERR_SHAPE;
    }
    std::copy(frame.bytes.begin(), frame.bytes.end(), request->codes);
    request->state[0] = static_cast<std::int32_t>(frame.bytes.size());
    request->state[1] = static_cast<std::int32_t>(frame.base_end);
    request->state[2] = frame.is_rans ? 1 : 0;
  } catch (const Failure &failure) {
    *reason = failure.reason;
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}
