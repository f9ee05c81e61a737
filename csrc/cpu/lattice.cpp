// Lattice search: per latent, the best convex combinations of at most 4 codes with weights k/n.
//
// With weights that sum to one, |z - sum w_i c_i|^2 = sum w_i |z - c_i|^2 - sum_{i<j} w_i w_j
// |c_i - c_j|^2, so every state costs a few multiply-adds on distances: K per latent and a K x K
// table per codebook. Pairs are scanned whole for the nearest codes as the heavier one; supports of
// 3 and 4 grow from the best supports found so far, by the code that helps most, and then take the
// best of all weights for that support.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.hpp"
#include "lattice_codebook.hpp"
#include "vqkernels.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int32_t kMaxSupport = VQ_LATTICE_MAX_SUPPORT;
constexpr std::int32_t kExtensions = 4;  // codes tried per support that grows
constexpr std::int32_t kBins = 64;       // of the coarse ranking of codes by distance
constexpr float kRounding = 4e-6f;       // more than all roundings of an error, over its terms
constexpr float kQuanta = 3.0f;           // that words and their scales are off by together
constexpr float kLeastWidth = 1e-30f;    // of all bins; a quotient by less may overflow
constexpr std::int32_t kSorted = vq::kLanes;  // pairs are scanned for these nearest codes first

struct State {
  float error = kInfinity;
  std::int32_t size = 0;
  std::int32_t index[kMaxSupport] = {};
  std::int32_t numerator[kMaxSupport] = {};
  // Both arrays packed, 16 and 8 bits to an entry; equal for equal states only.
  std::uint64_t codes = 0;
  std::uint32_t shares = 0;
};

// Heaviest code first, ties by lower index.
void make_canonical(State &state) {
  for (std::int32_t i = 1; i < state.size; ++i) {
    const std::int32_t index = state.index[i];
    const std::int32_t numerator = state.numerator[i];
    std::int32_t at = i;
    for (; at > 0 && (state.numerator[at - 1] < numerator ||
                      (state.numerator[at - 1] == numerator && state.index[at - 1] > index));
         --at) {
      state.index[at] = state.index[at - 1];
      state.numerator[at] = state.numerator[at - 1];
    }
    state.index[at] = index;
    state.numerator[at] = numerator;
  }
  state.codes = 0;
  state.shares = 0;
  for (std::int32_t i = 0; i < state.size; ++i) {
    state.codes = state.codes << 16 | static_cast<std::uint64_t>(state.index[i]);
    state.shares = state.shares << 8 | static_cast<std::uint32_t>(state.numerator[i]);
  }
}

bool holds(const State &state, std::int32_t index) {
  return std::find(state.index, state.index + state.size, index) != state.index + state.size;
}

bool same_support(const State &a, const State &b) {
  return a.size == b.size &&
         std::all_of(a.index, a.index + a.size, [&](std::int32_t i) { return holds(b, i); });
}

bool same_state(const State &a, const State &b) {
  return a.codes == b.codes && a.shares == b.shares;
}

// The best states so far, best first; equal errors keep their order of arrival.
class Best {
 public:
  Best(std::int32_t capacity, bool one_per_support)
      : capacity_(static_cast<std::size_t>(capacity)), one_per_support_(one_per_support) {
    states_.reserve(capacity_ + 1);
  }

  void clear() { states_.clear(); }
  const std::vector<State> &states() const { return states_; }
  float worst() const { return states_.size() < capacity_ ? kInfinity : states_.back().error; }

  void add(const State &state) {
    if (capacity_ == 0 || !(state.error < worst())) {
      return;
    }
    const auto twin = std::find_if(states_.begin(), states_.end(), [&](const State &other) {
      return one_per_support_ ? same_support(other, state) : same_state(other, state);
    });
    if (twin != states_.end()) {
      if (!(state.error < twin->error)) {
        return;
      }
      states_.erase(twin);
    }
    const auto at = std::upper_bound(
        states_.begin(), states_.end(), state.error,
        [](float error, const State &other) { return error < other.error; });
    states_.insert(at, state);
    if (states_.size() > capacity_) {
      states_.pop_back();
    }
  }

 private:
  std::size_t capacity_;
  bool one_per_support_;
  std::vector<State> states_;
};

// All compositions of n into `size` positive parts, and their coefficients for EvaluateJob.
struct Compositions {
  std::int32_t count = 0;
  std::int32_t padded = 0;
  std::vector<std::int32_t> parts;   // [count][kMaxSupport]
  std::vector<float> coefficients;  // [terms][padded]; the padding can never win
};

// The `number`-th choice of all parts but the last, which takes the rest; false if there is none.
bool choose_parts(std::int32_t number, std::int32_t denominator, std::int32_t size,
                  std::int32_t *parts) {
  std::int32_t rest = denominator;
  for (std::int32_t slot = 0; slot < size - 1; ++slot) {
    parts[slot] = 1 + number % denominator;
    number /= denominator;
    rest -= parts[slot];
  }
  parts[size - 1] = rest;
  return rest >= 1;
}

Compositions make_compositions(std::int32_t denominator, std::int32_t size) {
  Compositions out;
  std::int32_t choices = 1;
  for (std::int32_t slot = 1; slot < size; ++slot) {
    choices *= denominator;
  }
  for (std::int32_t number = 0; number < choices; ++number) {
    std::int32_t parts[kMaxSupport] = {};
    if (choose_parts(number, denominator, size, parts)) {
      out.parts.insert(out.parts.end(), parts, parts + kMaxSupport);
      ++out.count;
    }
  }
  out.padded = (out.count + vq::kLanes - 1) / vq::kLanes * vq::kLanes;
  const std::int32_t terms = size + size * (size - 1) / 2;
  out.coefficients.assign(static_cast<std::size_t>(terms) * out.padded, 0.0f);
  const float n = static_cast<float>(denominator);
  for (std::int32_t c = 0; c < out.count; ++c) {
    const std::int32_t *part = out.parts.data() + c * kMaxSupport;
    float *column = out.coefficients.data() + c;
    std::int32_t term = 0;
    for (std::int32_t a = 0; a < size; ++a) {
      column[term++ * out.padded] = static_cast<float>(part[a]) / n;
    }
    for (std::int32_t b = 1; b < size; ++b) {
      for (std::int32_t a = 0; a < b; ++a) {
        // Separations come divided by n.
        column[term++ * out.padded] = -static_cast<float>(part[a] * part[b]) / n;
      }
    }
  }
  return out;
}

class Search {
 public:
  Search(const vq_lattice_job &job, vq::LatticeCodebook &codes)
      : job_(job), ops_(vq::lattice_ops()), codes_(codes), padded_(codes.padded()),
        scratch_(codes.has_table() ? 0 : static_cast<std::size_t>(kMaxSupport) * padded_),
        distances_(static_cast<std::size_t>(padded_)),
        mixed_(static_cast<std::size_t>(job.max_support > 2 ? padded_ : 0)),
        keys_(static_cast<std::size_t>(job.num_codes)), listed_(static_cast<std::size_t>(padded_)),
        bins_(static_cast<std::size_t>(padded_)), best_(job.count, false),
        beam_(job.max_support > 2 ? job.beam : 0, true), grown_(beam_),
        extensions_(kExtensions, true) {
    for (std::int32_t size = 2; size <= job.max_support; ++size) {
      compositions_[size] = make_compositions(job.denominator, size);
    }
    
    for (std::int32_t w = 0; w < job.denominator / 2; ++w) {
      heavy_[w] = heavy_codes(job, w);
    }
    if (job.max_support > 1 && codes.quantum() > 0.0f) {
      const std::size_t words = static_cast<std::size_t>(job.denominator / 2) * codes.stride();
      caps_.assign(words, 0);
      floors_.assign(words, 0);
    }
  }

  void run() {
    for (std::int32_t row = 0; row < job_.num_latents; ++row) {
      search_latent(job_.latents + static_cast<std::int64_t>(row) * job_.num_features);
      write(row);
    }
  }

 private:
  // The heavier a code of a good pair, the nearer it is. On latents of trained models 99 % of the
  // best pairs have their heavier code within these shares of the codes: all at weights up to
  // 9/16, 1/2 at 5/8, 1/8 at 3/4, 1/32 at 7/8.
  static std::int32_t heavy_codes(const vq_lattice_job &job, std::int32_t weight) {
    if (job.exact != 0) {
      return job.num_codes;
    }
    const std::int32_t keep = job.denominator - job.denominator / 2 + weight;
    const std::int32_t halvings = std::max(0, 16 * keep / job.denominator - 9);
    return std::max(kSorted, std::min(job.heavy, job.num_codes) >> halvings);
  }

  void search_latent(const float *z) {
    ops_.distances(z, codes_.transposed(), job_.num_features, padded_, distances_.data());
    std::fill(distances_.begin() + job_.num_codes, distances_.end(), distances_[0]);
    range_ = ops_.range(distances_.data(), padded_);
    std::fill(distances_.begin() + job_.num_codes, distances_.end(), kInfinity);
    best_.clear();
    beam_.clear();
    find_near(std::min(std::max(job_.count, kSorted), job_.num_codes));
    for (const std::int32_t code : near_) {
      add_single(code);
    }
    if (job_.max_support > 1) {
      scan_all_pairs();
    }
    for (std::int32_t size = 3; size <= job_.max_support; ++size) {
      grow(size);
    }
  }

  // Distances are not negative, so their bits sort like integers; ties go to the lower index.
  std::uint64_t key(std::int32_t j) const {
    std::uint32_t bits;
    std::memcpy(&bits, &distances_[j], sizeof bits);
    return (static_cast<std::uint64_t>(bits) << 32) | static_cast<std::uint32_t>(j);
  }

  // near_: the `wanted` nearest codes, nearest first.
  void find_near(std::int32_t wanted) {
    const float limit = wanted <= kSorted ? near_limit() : kInfinity;
    std::int32_t count = ops_.at_most(distances_.data(), padded_, limit, listed_.data());
    // The padding comes last, and only an infinite limit admits it.
    count = std::min(count, job_.num_codes);
    for (std::int32_t i = 0; i < count; ++i) {
      keys_[i] = key(listed_[i]);
    }
    const auto end = keys_.begin() + wanted;
    std::partial_sort(keys_.begin(), end, keys_.begin() + count);
    near_.clear();
    for (auto at = keys_.begin(); at != end; ++at) {
      near_.push_back(static_cast<std::int32_t>(*at & 0xffffffffu));
    }
  }

  // A distance that at least kSorted codes do not exceed: each of kSorted columns holds one.
  float near_limit() const {
    float least[kSorted];
    std::copy_n(distances_.begin(), kSorted, least);
    for (std::int32_t j = kSorted; j < padded_; j += kSorted) {
      for (std::int32_t lane = 0; lane < kSorted; ++lane) {
        least[lane] = std::min(least[lane], distances_[j + lane]);
      }
    }
    return *std::max_element(least, least + kSorted);
  }

  // Bins of equal width over the distances: a coarse ranking that costs one pass.
  void fill_bins() {
    farthest_ = std::sqrt(range_.most);
    const float width = range_.most - range_.least;
    const float scale =
        width > kLeastWidth && width < kInfinity ? static_cast<float>(kBins) * 0.999f / width : 0.0f;
    if (scale > 0.0f) {
      ops_.to_words(distances_.data(), padded_, range_.least, scale, bins_.data());
    } else {
      std::fill(bins_.begin(), bins_.end(), std::uint16_t{0});
    }
    std::fill_n(bin_counts_, kBins, 0);
    for (std::int32_t j = 0; j < job_.num_codes; ++j) {
      ++bin_counts_[bins_[j]];
    }
    bin_width_ = scale > 0.0f ? width / (static_cast<float>(kBins) * 0.999f) : kInfinity;
  }

  // How many weights, from equal ones upwards, are scanned for heavier codes of each bin.
  void share_weights() {
    std::fill_n(bin_weights_, kBins, 0);
    for (std::int32_t w = 0; w < job_.denominator / 2; ++w) {
      std::int32_t seen = 0;
      for (std::int32_t bin = 0; bin < kBins && seen < heavy_[w]; ++bin) {
        bin_weights_[bin] = w + 1;
        seen += bin_counts_[bin];
      }
    }
  }

  void add_single(std::int32_t code) {
    State state;
    state.size = 1;
    state.index[0] = code;
    state.numerator[0] = job_.denominator;
    state.error = distances_[code];
    make_canonical(state);
    if (best_.states().empty() && !(state.error < kInfinity)) {
      state.error = std::numeric_limits<float>::max();  // overflow: still name the first code
    }
    best_.add(state);
  }

  // The scan that is under way: `state` plus one more code.
  struct Scan {
    Search *search;
    const State *state;
  };

  vq::ScanJob make_job() const {
    vq::ScanJob job;
    job.distances = distances_.data();
    job.separation = nullptr;
    job.padded = padded_;
    job.num_weights = job_.denominator / 2;
    job.limit = kInfinity;
    job.first_keep = static_cast<float>(job_.denominator - job.num_weights);
    for (std::int32_t w = 0; w < job.num_weights; ++w) {
      job.add[w] = static_cast<float>(job.num_weights - w) / static_cast<float>(job_.denominator);
    }
    return job;
  }

  void set_base(vq::ScanJob &job, float base) const {
    for (std::int32_t w = 0; w < job.num_weights; ++w) {
      job.kept[w] = (1.0f - job.add[w]) * base;
    }
  }

  float pair_limit() const { return std::max(best_.worst(), beam_limit(beam_)); }

  float beam_limit(const Best &beam) const {
    return job_.max_support > 2 ? beam.worst() : -kInfinity;
  }

  void scan_all_pairs() {
    fill_bins();
    share_weights();
    vq::ScanJob job = make_job();
    job.limit = pair_limit();
    set_reach(job.limit);
    for (const std::int32_t code : near_) {
      scan_pairs(job, code);
    }
    list_waiting();
    if (codes_.quantum() > 0.0f) {
      screen(job);
    }
    for (std::size_t i = 0; i < waiting_.size(); ++i) {
      if (passed_[i] != 0) {
        scan_pairs(job, waiting_[i].code);
      }
    }
  }

  // waiting_: the codes behind near_ that are near enough to be the heavier one of a pair, by index.
  void list_waiting() {
    const std::uint64_t done = key(near_.back());
    waiting_.clear();
    // A negative limit, by rounding, makes reach_ NaN, which rules nothing out.
    const float reach = reach_[0] < reach_of_bins() ? reach_[0] : reach_of_bins();
    const std::int32_t count = ops_.at_most(distances_.data(), padded_, reach, listed_.data());
    for (std::int32_t i = 0; i < std::min(count, job_.num_codes); ++i) {
      const std::int32_t j = listed_[i];
      const std::int32_t num_weights = weights_in_reach(j);
      if (num_weights > 0 && key(j) > done) {
        waiting_.push_back({nullptr, j, num_weights});
      }
    }
    passed_.assign(waiting_.size(), 1);
  }

  // No code beyond lies in a bin of any weight.
  float reach_of_bins() const {
    std::int32_t used = 0;
    while (used < kBins && bin_weights_[used] > 0) {
      ++used;
    }
    return used < kBins ? range_.least + static_cast<float>(used + 1) * bin_width_ : kInfinity;
  }

  // A weight w puts the pair (i, j) under the limit only if keep * separation_ij - distance_j >
  // (kept_i - limit) / add. In whole quanta, separations rounded up and distances down, that is a
  // subtraction of 16-bit words: passed_ says for which waiting codes it holds for some j and w.
  void screen(const vq::ScanJob &job) {
    const float n = static_cast<float>(job_.denominator);
    const float slack = rounding_slack(job.limit);
    if (!(slack < kInfinity)) {
      return;
    }
    const std::int32_t half = job_.denominator / 2;
    for (std::int32_t w = 0; w < half; ++w) {
      const std::int64_t at = static_cast<std::int64_t>(w) * codes_.stride();
      const float keep = n - static_cast<float>(half - w);
      const float per_quantum = 1.0f / (keep * codes_.quantum());
      ops_.to_words(distances_.data(), padded_, 0.0f, per_quantum, caps_.data() + at);
      // floor = (keep / n * distance_i - limit) / add / keep in quanta, less the slack.
      const float quanta = 1.0f / (job.add[w] * n * codes_.quantum());
      ops_.to_words(distances_.data(), padded_, (job.limit + slack) * n / keep + kQuanta / quanta,
                    quanta, floors_.data() + at);
    }
    for (vq::ScreenRow &row : waiting_) {
      row.separations = codes_.bounds(row.code);
    }
    const vq::ScreenJob words{caps_.data(), floors_.data(), codes_.stride()};
    ops_.screen(words, waiting_.data(), static_cast<std::int32_t>(waiting_.size()),
                passed_.data());
  }

  // More than all roundings of an error under the limit can come to: a share of its largest terms.
  float rounding_slack(float limit) const {
    const float n = static_cast<float>(job_.denominator);
    return kRounding * (n * codes_.widest() + range_.most + limit);
  }

  // By the triangle inequality an error is at least (a |z - c_i| - b |z - c_j|)^2: a heavier code
  // beyond reach_[w] cannot come under the limit with weight w.
  void set_reach(float limit) {
    const float radius = std::sqrt(limit) * 1.0001f;
    const float n = static_cast<float>(job_.denominator);
    const std::int32_t half = job_.denominator / 2;
    for (std::int32_t w = 0; w < half; ++w) {
      const float add = static_cast<float>(half - w);
      const float reach = (n * radius + add * farthest_) / (n - add) * 1.0001f;
      reach_[w] = reach * reach;
    }
  }

  std::int32_t weights_in_reach(std::int32_t heavy) const {
    std::int32_t count = bin_weights_[bins_[heavy]];
    while (count > 0 && distances_[heavy] > reach_[count - 1]) {
      --count;
    }
    return count;
  }

  // Row of code i as in LatticeCodebook; without a table in scratch `slot` until it is used again.
  const float *separations(std::int32_t i, std::int32_t slot) {
    if (codes_.has_table()) {
      return codes_.row(i);
    }
    float *out = scratch_.data() + static_cast<std::int64_t>(slot) * padded_;
    codes_.write_row(i, out);
    return out;
  }

  void scan_pairs(vq::ScanJob &job, std::int32_t heavy) {
    job.num_weights = weights_in_reach(heavy);
    if (job.num_weights == 0) {
      return;
    }
    // Equal weights: where every code gets its turn, each pair need be seen only once.
    const bool is_once =
        job.num_weights == 1 && heavy_[0] >= job_.num_codes && job_.denominator % 2 == 0;
    job.padded = is_once ? (heavy + vq::kLanes - 1) / vq::kLanes * vq::kLanes : padded_;
    job.separation = separations(heavy, 0);
    set_base(job, distances_[heavy]);
    if (!ops_.scan_finds(job)) {
      return;
    }
    State state;
    state.size = 2;
    state.index[0] = heavy;
    Scan scan{this, &state};
    ops_.scan(job, on_pairs, &scan);
    job.limit = pair_limit();
    set_reach(job.limit);
  }

  static float on_pairs(void *context, std::int32_t first, std::int32_t weight,
                        std::uint32_t lanes, const float *errors) {
    const Scan &scan = *static_cast<const Scan *>(context);
    Search &self = *scan.search;
    const std::int32_t light = self.job_.denominator / 2 - weight;
    for (std::int32_t lane = 0; lane < vq::kLanes; ++lane) {
      if (((lanes >> lane) & 1u) == 0) {
        continue;
      }
      State state = *scan.state;
      state.index[1] = first + lane;
      state.numerator[0] = self.job_.denominator - light;
      state.numerator[1] = light;
      state.error = errors[lane];
      make_canonical(state);
      self.best_.add(state);
      self.beam_.add(state);
    }
    return self.pair_limit();
  }

  void grow(std::int32_t size) {
    grown_.clear();
    for (const State &state : beam_.states()) {
      if (state.size == size - 1) {
        extend(state);
      }
    }
    std::swap(beam_, grown_);
  }

  // Finds the codes that help `state` most with its weights shrunk, then all weights for each.
  void extend(const State &state) {
    const float *rows[kMaxSupport];
    float weights[kMaxSupport];
    float offset = 0.0f;
    for (std::int32_t a = 0; a < state.size; ++a) {
      rows[a] = separations(state.index[a], a);
      weights[a] = static_cast<float>(state.numerator[a]) / static_cast<float>(job_.denominator);
      for (std::int32_t b = 0; b < a; ++b) {
        offset = offset - weights[a] * weights[b] * codes_.between(state.index[a], state.index[b]);
      }
    }
    ops_.mix(rows, weights, state.size, offset, padded_, mixed_.data());
    extensions_.clear();
    vq::ScanJob job = make_job();
    job.separation = mixed_.data();
    set_base(job, state.error);
    Scan scan{this, &state};
    ops_.scan(job, on_extensions, &scan);
    for (const State &found : extensions_.states()) {
      State support = state;
      support.index[support.size++] = found.index[0];
      weigh(support);
    }
  }

  static float on_extensions(void *context, std::int32_t first, std::int32_t /*weight*/,
                             std::uint32_t lanes, const float *errors) {
    Search &self = *static_cast<const Scan *>(context)->search;
    State found;
    found.size = 1;
    for (std::int32_t lane = 0; lane < vq::kLanes; ++lane) {
      if (((lanes >> lane) & 1u) != 0) {
        found.index[0] = first + lane;
        found.error = errors[lane];
        self.extensions_.add(found);
      }
    }
    return self.extensions_.worst();
  }

  struct Weighing {
    Search *search;
    const State *support;
  };

  float weigh_limit() const { return std::max(best_.worst(), beam_limit(grown_)); }

  // Tries all weights on a support.
  void weigh(const State &support) {
    const Compositions &all = compositions_[support.size];
    vq::EvaluateJob job;
    job.coefficients = all.coefficients.data();
    job.padded = all.padded;
    job.num_terms = 0;
    for (std::int32_t a = 0; a < support.size; ++a) {
      job.values[job.num_terms++] = distances_[support.index[a]];
    }
    for (std::int32_t b = 1; b < support.size; ++b) {
      for (std::int32_t a = 0; a < b; ++a) {
        job.values[job.num_terms++] = codes_.between(support.index[a], support.index[b]);
      }
    }
    job.limit = weigh_limit();
    Weighing weighing{this, &support};
    ops_.evaluate(job, on_weights, &weighing);
  }

  static float on_weights(void *context, std::int32_t first, std::int32_t /*weight*/,
                          std::uint32_t lanes, const float *errors) {
    const Weighing &weighing = *static_cast<Weighing *>(context);
    Search &self = *weighing.search;
    const Compositions &all = self.compositions_[weighing.support->size];
    for (std::int32_t lane = 0; lane < vq::kLanes && first + lane < all.count; ++lane) {
      if (((lanes >> lane) & 1u) == 0) {
        continue;
      }
      State state = *weighing.support;
      const std::int32_t *parts = all.parts.data() + (first + lane) * kMaxSupport;
      std::copy_n(parts, state.size, state.numerator);
      state.error = errors[lane];
      make_canonical(state);
      self.best_.add(state);
      self.grown_.add(state);
    }
    return self.weigh_limit();
  }

  void write(std::int32_t row) const {
    const std::vector<State> &states = best_.states();
    for (std::int32_t slot = 0; slot < job_.count; ++slot) {
      // Fewer states than slots exist: repeat the best at an error that never wins.
      const bool is_real = slot < static_cast<std::int32_t>(states.size());
      const State &state = states[is_real ? slot : 0];
      const std::int64_t at = static_cast<std::int64_t>(row) * job_.count + slot;
      job_.errors[at] = is_real ? std::max(state.error, 0.0f) : kInfinity;
      for (std::int32_t i = 0; i < job_.max_support; ++i) {
        const bool is_used = i < state.size;
        job_.indices[at * job_.max_support + i] = state.index[is_used ? i : 0];
        job_.numerators[at * job_.max_support + i] = is_used ? state.numerator[i] : 0;
      }
    }
  }

  const vq_lattice_job &job_;
  const vq::LatticeOps &ops_;
  vq::LatticeCodebook &codes_;
  std::int32_t padded_;
  std::vector<float> scratch_;  // rows of separations of a codebook without a table
  std::vector<float> distances_;
  std::vector<float> mixed_;
  vq::Range range_ = {};
  std::vector<std::uint64_t> keys_;
  std::vector<std::int32_t> listed_;
  std::vector<std::int32_t> near_;
  float farthest_ = 0.0f;
  float reach_[vq::kMaxWeights] = {};
  std::int32_t heavy_[vq::kMaxWeights] = {};  // per weight: how many heavier codes are scanned
  std::vector<std::uint16_t> bins_;
  std::int32_t bin_counts_[kBins] = {};
  std::int32_t bin_weights_[kBins] = {};
  float bin_width_ = 0.0f;
  std::vector<std::uint16_t> caps_;    // [weights][stride]
  std::vector<std::uint16_t> floors_;  // likewise
  std::vector<vq::ScreenRow> waiting_;
  std::vector<std::uint8_t> passed_;
  Best best_;
  Best beam_;
  Best grown_;
  Best extensions_;
  Compositions compositions_[kMaxSupport + 1];
};

bool all_finite(const float *values, std::int64_t count) {
  // The exponent bits of NaN and infinity are all ones; a sum of flags vectorises.
  std::uint32_t bad = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    bad |= static_cast<std::uint32_t>((bits & 0x7f800000u) == 0x7f800000u);
  }
  return bad == 0;
}

bool in_range(std::int32_t value, std::int32_t low, std::int32_t high) {
  return value >= low && value <= high;
}

bool has_codes(std::int32_t num_codes, std::int32_t num_features, std::int32_t denominator) {
  return in_range(num_features, 1, VQ_LATTICE_MAX_FEATURES) &&
         in_range(num_codes, 1, VQ_LATTICE_MAX_CODES) &&
         in_range(denominator, 1, VQ_LATTICE_MAX_DENOMINATOR);
}

// Everything but the codebook's values.
std::int32_t check(const vq_lattice_job *job) {
  if (job == nullptr || job->latents == nullptr || job->errors == nullptr ||
      job->indices == nullptr || job->numerators == nullptr) {
    return VQ_ERR_NULL;
  }
  const bool fits = in_range(job->num_latents, 0, VQ_MAX_FEATURES) &&
                    has_codes(job->num_codes, job->num_features, job->denominator) &&
                    in_range(job->max_support, 1, VQ_LATTICE_MAX_SUPPORT) &&
                    job->max_support <= std::min(job->num_codes, job->denominator) &&
                    in_range(job->heavy, 1, VQ_LATTICE_MAX_CODES) && in_range(job->exact, 0, 1) &&
                    in_range(job->beam, 1, VQ_LATTICE_MAX_STATES) &&
                    in_range(job->count, 1, VQ_LATTICE_MAX_STATES);
  if (!fits) {
    return VQ_ERR_SHAPE;
  }
  const std::int64_t features = job->num_features;
  return all_finite(job->latents, job->num_latents * features) ? VQ_OK : VQ_ERR_NONFINITE;
}

}  // namespace

struct vq_lattice_codebook {
  std::vector<float> values;
  std::unique_ptr<vq::LatticeCodebook> codes;
};

std::int32_t vq_lattice_search(const vq_lattice_job *job) {
  std::int32_t status = check(job);
  if (status != VQ_OK) {
    return status;
  }
  if (job->codebook == nullptr) {
    return VQ_ERR_NULL;
  }
  if (!all_finite(job->codebook, static_cast<std::int64_t>(job->num_codes) * job->num_features)) {
    return VQ_ERR_NONFINITE;
  }
  try {
    vq::LatticeCodebook codes(job->codebook, job->num_codes, job->num_features, job->denominator,
                              vq::lattice_ops());
    Search(*job, codes).run();
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}

std::int32_t vq_lattice_open(const float *codebook, std::int32_t num_codes,
                             std::int32_t num_features, std::int32_t denominator,
                             vq_lattice_codebook **opened) {
  if (codebook == nullptr || opened == nullptr) {
    return VQ_ERR_NULL;
  }
  if (!has_codes(num_codes, num_features, denominator)) {
    return VQ_ERR_SHAPE;
  }
  const std::int64_t count = static_cast<std::int64_t>(num_codes) * num_features;
  if (!all_finite(codebook, count)) {
    return VQ_ERR_NONFINITE;
  }
  try {
    auto made = std::make_unique<vq_lattice_codebook>();
    made->values.assign(codebook, codebook + count);
    made->codes = std::make_unique<vq::LatticeCodebook>(
        made->values.data(), num_codes, num_features, denominator, vq::lattice_ops());
    made->codes->make_all_rows();
    *opened = made.release();
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}

void vq_lattice_close(vq_lattice_codebook *codebook) { delete codebook; }

std::int32_t vq_lattice_search_in(const vq_lattice_codebook *codebook, const vq_lattice_job *job) {
  const std::int32_t status = codebook == nullptr ? VQ_ERR_NULL : check(job);
  if (status != VQ_OK) {
    return status;
  }
  vq::LatticeCodebook &codes = *codebook->codes;
  if (job->num_codes != codes.num_codes() || job->num_features != codes.num_features() ||
      job->denominator != codes.denominator()) {
    return VQ_ERR_SHAPE;
  }
  try {
    Search(*job, codes).run();
  } catch (const std::bad_alloc &) {
    return VQ_ERR_MEMORY;
  }
  return VQ_OK;
}
