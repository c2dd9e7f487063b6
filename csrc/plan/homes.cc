#include "plan/homes.h"

#include <algorithm>
#include <numeric>
#include <optional>

#include "plan/device_blocks.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

constexpr uint64_t kSmallTensor = kMiB;  // kept on the device first: many, and cheap
constexpr size_t kMaxSamples =
    64;  // prefixes of the residency order that are tried before the search
constexpr int kMaxRefills = 4;

// Units by the fractional part of u / golden ratio: every beginning of this order is spread evenly.
std::vector<uint32_t> spread_order(size_t units) {
  std::vector<uint32_t> order(units);
  std::iota(order.begin(), order.end(), 0);
  const auto key = [](uint32_t u) { return u * 0x9E3779B97F4A7C15ull; };
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return key(a) < key(b); });
  return order;
}

// Each unit's tensors, largest first; a tensor of several units is only in the first that is
// visited.
std::vector<std::vector<uint32_t>> tensors_by_size(const ModelSpec& spec,
                                                   const std::vector<uint32_t>& visit) {
  std::vector<bool> taken(spec.tensors.size(), false);
  std::vector<std::vector<uint32_t>> sorted;
  for (const uint32_t u : visit) {
    std::vector<uint32_t>& tensors = sorted.emplace_back();
    for (const uint32_t t : spec.units[u].tensors) {
      if (!taken[t]) tensors.push_back(t);
      taken[t] = true;
    }
    std::stable_sort(tensors.begin(), tensors.end(), [&](uint32_t a, uint32_t b) {
      return spec.tensors[a].bytes > spec.tensors[b].bytes;
    });
  }
  return sorted;
}

// The searches below keep the first `k` tensors of the residency order and look for the largest k.
class Search {
 public:
  Search(const ModelSpec& spec, const Limits& limits)
      : spec_(spec),
        device_bytes_(limits.device_bytes),
        home_limit_(limits.home_bytes.value_or(UINT64_MAX)),
        arena_limit_(limits.arena_bytes.value_or(UINT64_MAX)),
        order_(residency_order(spec)),
        rank_(spec.tensors.size(), 0) {
    prefix_bytes_.push_back(0);
    for (size_t i = 0; i < order_.tensors.size(); ++i) {
      const uint32_t t = order_.tensors[i];
      rank_[t] = i;
      prefix_bytes_.push_back(prefix_bytes_.back() + device_tensor_bytes(spec.tensors[t]));
    }
    make_samples();
  }

  size_t all() const { return order_.tensors.size(); }
  const ResidencyOrder& order() const { return order_; }
  uint64_t prefix_bytes(size_t k) const { return prefix_bytes_[k]; }

  uint64_t homes_cost(uint64_t homes) const { return block_cost_bytes(homes, home_limit_); }
  uint64_t arena_cost(uint64_t arena) const { return block_cost_bytes(arena, arena_limit_); }
  uint64_t homes_request(uint64_t homes) const { return block_request_bytes(homes, home_limit_); }
  uint64_t arena_request(uint64_t arena) const { return block_request_bytes(arena, arena_limit_); }

  bool homes_fit(uint64_t homes, uint64_t arena) const {
    return homes <= home_limit_ && homes_cost(homes) + arena_cost(arena) <= device_bytes_;
  }

  // What is left for the arena beside homes of these bytes; empty when not even they fit.
  std::optional<uint64_t> arena_room(uint64_t homes) const {
    if (!homes_fit(homes, 0)) return std::nullopt;
    return largest_block_bytes(device_bytes_ - homes_cost(homes), arena_limit_);
  }

  template <typename IsResident>
  std::vector<Place> places(IsResident&& resident) const {
    std::vector<Place> places;
    places.reserve(spec_.units.size());
    for (const UnitSpec& unit : spec_.units) {
      Place& place = places.emplace_back();
      place.exclusive = unit.exclusive;
      for (const uint32_t t : unit.tensors) {
        if (!resident(t)) place.bytes += device_tensor_bytes(spec_.tensors[t]);
      }
    }
    return places;
  }

  std::vector<Place> places_of_prefix(size_t k) const {
    return places([&](uint32_t t) { return rank_[t] < k; });
  }

  // The largest prefix that is found to fit: among the samples from the largest down, then between
  // that sample and the next. (Whether a prefix fits is not monotonous: an arena shrinks only when
  // all units that are there at once have shrunk.)
  std::optional<size_t> largest_prefix(Lookahead ahead) const {
    for (size_t s = samples_.size(); s-- > 0;) {
      if (!fits(samples_[s], ahead)) continue;
      size_t low = samples_[s];
      size_t high = s + 1 < samples_.size() ? samples_[s + 1] : low + 1;
      while (high - low > 1) {
        const size_t middle = low + (high - low) / 2;
        (fits(middle, ahead) ? low : high) = middle;
      }
      return low;
    }
    return std::nullopt;
  }

  // The least budget that the sampled prefixes need with nothing ahead and an arena up to this
  // limit.
  std::optional<uint64_t> least_device_bytes(uint64_t arena_limit) const {
    std::optional<uint64_t> least;
    for (const size_t k : samples_) {
      const uint64_t arena = least_arena_bytes(places_of_prefix(k), {});
      if (prefix_bytes_[k] > home_limit_ || arena > arena_limit) continue;
      const uint64_t cost = homes_cost(prefix_bytes_[k]) + block_cost_bytes(arena, arena_limit);
      least = std::min(least.value_or(UINT64_MAX), cost);
    }
    return least;
  }

  // The least arena with which one of them stays within the budget.
  std::optional<uint64_t> least_arena_in_budget() const {
    std::optional<uint64_t> least;
    for (const size_t k : samples_) {
      const uint64_t arena = least_arena_bytes(places_of_prefix(k), {});
      const uint64_t cost = homes_cost(prefix_bytes_[k]) + block_cost_bytes(arena, arena);
      if (prefix_bytes_[k] > home_limit_ || cost > device_bytes_) continue;
      least = std::min(least.value_or(UINT64_MAX), arena);
    }
    return least;
  }

 private:
  bool fits(size_t k, Lookahead ahead) const {
    const std::optional<uint64_t> room = arena_room(prefix_bytes_[k]);
    return room && arena_fits(places_of_prefix(k), ahead, *room);
  }

  void make_samples() {
    std::vector<size_t> ends = order_.round_ends;
    const size_t kept = std::min(ends.size(), kMaxSamples / 2);
    for (size_t i = 0; i < kept; ++i) samples_.push_back(ends[i * ends.size() / kept]);
    for (size_t i = 0; i <= kMaxSamples / 2; ++i) samples_.push_back(i * all() / (kMaxSamples / 2));
    std::sort(samples_.begin(), samples_.end());
    samples_.erase(std::unique(samples_.begin(), samples_.end()), samples_.end());
  }

  const ModelSpec& spec_;
  const uint64_t device_bytes_;
  const uint64_t home_limit_;
  const uint64_t arena_limit_;
  const ResidencyOrder order_;
  std::vector<size_t> rank_;            // by tensor: its index in the order
  std::vector<uint64_t> prefix_bytes_;  // by k: device bytes of the first k tensors
  std::vector<size_t> samples_;         // ascending, from none to all
};

[[noreturn]] void throw_too_small(const ModelSpec& spec, const Limits& limits,
                                  const Search& search) {
  const std::vector<Place> places = search.places_of_prefix(0);
  size_t largest = 0;
  for (size_t u = 0; u < places.size(); ++u) {
    if (places[u].bytes > places[largest].bytes) largest = u;
  }
  const std::string why =
      concat(" to load one unit at a time; the largest is ", spec.units[largest].name, " with ",
             places[largest].bytes, " bytes");
  const std::optional<uint64_t> arena = search.least_arena_in_budget();
  if (limits.arena_bytes && arena) {
    throw InvalidArgument(concat("arena_bytes = ", *limits.arena_bytes,
                                 " is too small: it takes at least ", *arena, why));
  }
  const uint64_t arena_limit = limits.arena_bytes.value_or(UINT64_MAX);
  const std::optional<uint64_t> within = search.least_device_bytes(arena_limit);
  const uint64_t least = within ? *within : search.least_device_bytes(UINT64_MAX).value();
  throw InvalidArgument(concat("device_bytes = ", limits.device_bytes,
                               " is too small: it takes at least ", least, why));
}

struct Found {
  size_t prefix = 0;
  Lookahead ahead;
};

// The largest lookahead up to `units` that can be had, and with it the largest at the seam.
std::optional<Found> find_homes(const Search& search, uint32_t units) {
  for (uint32_t n = units + 1; n-- > 0;) {
    std::optional<size_t> prefix = search.largest_prefix({.units = n, .seam = 0});
    if (!prefix) continue;
    for (uint32_t seam = n; seam > 0; --seam) {
      const Lookahead ahead{.units = n, .seam = seam};
      if (const auto with_seam = search.largest_prefix(ahead)) return Found{*with_seam, ahead};
    }
    return Found{*prefix, {.units = n, .seam = 0}};
  }
  return std::nullopt;
}

// Two units ahead ride out uneven units, where that costs little; else one.
uint32_t default_lookahead(const Search& search, const Limits& limits) {
  const uint64_t arena = least_arena_bytes(search.places_of_prefix(0), {.units = 2, .seam = 2});
  const bool cheap = search.arena_cost(arena) <= limits.device_bytes / 4 &&
                     arena <= limits.arena_bytes.value_or(UINT64_MAX);
  return cheap ? 2 : 1;
}

uint32_t wanted_lookahead(const Search& search, const Limits& limits, DeviceHomes& homes) {
  if (!limits.lookahead_units) return default_lookahead(search, limits);
  if (*limits.lookahead_units > kMaxLookahead) {
    homes.warnings.push_back(concat("lookahead_units = ", *limits.lookahead_units, ": at most ",
                                    kMaxLookahead, " are looked ahead"));
  }
  return std::min(*limits.lookahead_units, kMaxLookahead);
}

void warn_smaller(const Limits& limits, uint32_t wanted, Lookahead ahead, DeviceHomes& homes) {
  if (!limits.lookahead_units) return;
  if (ahead.units < wanted) {
    homes.warnings.push_back(concat("lookahead_units = ", wanted,
                                    " does not fit into the arena's budget: ", ahead.units,
                                    " is used"));
  } else if (ahead.seam < ahead.units) {
    homes.warnings.push_back(concat(
        "lookahead_units = ", wanted,
        " does not fit between the last units and the first: ", ahead.seam, " is used there"));
  }
}

// Keeps every further tensor that fits beside an arena of this size. True when there was one.
bool refill(const ModelSpec& spec, const Search& search, uint64_t arena_bytes, DeviceHomes& homes) {
  bool added = false;
  for (const uint32_t t : search.order().tensors) {
    if (homes.resident[t]) continue;
    const uint64_t with = homes.homes_bytes + device_tensor_bytes(spec.tensors[t]);
    if (!search.homes_fit(with, arena_bytes)) continue;
    homes.resident[t] = true;
    homes.homes_bytes = with;
    added = true;
  }
  return added;
}

// Lays the arena out for the tensors chosen so far, then uses what is left, in turns: each tensor
// that is kept may make the arena smaller. A layout stays valid when its places shrink.
void lay_out(const ModelSpec& spec, const Search& search, DeviceHomes& homes) {
  uint64_t room = search.arena_room(homes.homes_bytes).value();
  for (int round = 0; round < kMaxRefills; ++round) {
    homes.places = search.places([&](uint32_t t) { return homes.resident[t]; });
    if (auto layout = fit_arena(homes.places, homes.ahead, room)) homes.arena = std::move(*layout);
    room = homes.arena.bytes;
    if (!refill(spec, search, homes.arena.bytes, homes)) return;
  }
  homes.places = search.places([&](uint32_t t) { return homes.resident[t]; });
}

}  // namespace

uint64_t device_tensor_bytes(const TensorSpec& tensor) {
  return align_up(tensor.bytes, kPlaceAlignment);
}

ResidencyOrder residency_order(const ModelSpec& spec) {
  const auto by_unit = tensors_by_size(spec, spread_order(spec.units.size()));
  size_t rounds = 0;
  for (const auto& tensors : by_unit) rounds = std::max(rounds, tensors.size());
  std::vector<std::vector<uint32_t>> small(rounds), large(rounds);
  for (const auto& tensors : by_unit) {
    for (size_t r = 0; r < tensors.size(); ++r) {
      const bool is_small = spec.tensors[tensors[r]].bytes < kSmallTensor;
      (is_small ? small : large)[r].push_back(tensors[r]);
    }
  }
  ResidencyOrder order;
  for (const auto* group : {&small, &large}) {
    for (const auto& round : *group) {
      if (round.empty()) continue;
      order.tensors.insert(order.tensors.end(), round.begin(), round.end());
      order.round_ends.push_back(order.tensors.size());
    }
  }
  return order;
}

DeviceHomes choose_device_homes(const ModelSpec& spec, const Limits& limits) {
  const Search search(spec, limits);
  DeviceHomes homes;
  homes.resident.assign(spec.tensors.size(), false);
  const uint64_t all_bytes = search.prefix_bytes(search.all());
  size_t kept = search.all();
  if (!search.homes_fit(all_bytes, 0)) {
    const uint32_t wanted = wanted_lookahead(search, limits, homes);
    const std::optional<Found> found = find_homes(search, wanted);
    if (!found) throw_too_small(spec, limits, search);
    kept = found->prefix;
    homes.ahead = found->ahead;
    warn_smaller(limits, wanted, homes.ahead, homes);
  }
  for (size_t i = 0; i < kept; ++i) homes.resident[search.order().tensors[i]] = true;
  homes.homes_bytes = search.prefix_bytes(kept);
  lay_out(spec, search, homes);
  homes.homes_bytes = search.homes_request(homes.homes_bytes);
  homes.arena_bytes = search.arena_request(homes.arena.bytes);
  return homes;
}

}  // namespace wsm
