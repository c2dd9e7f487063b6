#include "plan/homes.h"

#include <algorithm>
#include <optional>

#include "plan/device_blocks.h"
#include "plan/residency.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

constexpr size_t kMaxSamples =
    64;  // prefixes of the residency order that are tried before the search
constexpr int kMaxRefills = 4;

// The searches below keep the first `k` tensors of the residency order and look for the largest k.
class Search {
 public:
  Search(const ModelSpec& spec, const PlanLimits& limits, ResidencyOrder order)
      : spec_(spec),
        device_bytes_(limits.device_bytes),
        home_limit_(limits.home_bytes.value_or(UINT64_MAX)),
        arena_limit_(limits.arena_bytes.value_or(UINT64_MAX)),
        order_(std::move(order)) {
    std::vector<size_t> rank(spec.tensors.size(), 0);
    prefixes_.emplace_back(home_limit_);
    for (size_t i = 0; i < order_.tensors.size(); ++i) {
      const uint32_t t = order_.tensors[i];
      rank[t] = i;
      prefixes_.push_back(prefixes_.back().with(device_tensor_bytes(spec.tensors[t])));
    }
    for (const UnitSpec& unit : spec.units) {
      for (const uint32_t t : unit.tensors) {
        uses_.push_back({streamed_tensor_bytes(spec.tensors[t]), rank[t]});
      }
    }
    make_samples();
  }

  size_t all() const { return order_.tensors.size(); }
  const ResidencyOrder& order() const { return order_; }
  // The homes of the first k tensors.
  const HomeBlocks& prefix(size_t k) const { return prefixes_[k]; }

  uint64_t arena_cost(uint64_t arena) const { return block_cost_bytes(arena, arena_limit_); }
  uint64_t arena_request(uint64_t arena) const { return block_request_bytes(arena, arena_limit_); }

  bool homes_fit(const HomeBlocks& homes, uint64_t arena) const {
    return homes.bytes() <= home_limit_ && homes.cost_bytes() + arena_cost(arena) <= device_bytes_;
  }

  // What is left for the arena beside these homes; empty when not even they fit.
  std::optional<uint64_t> arena_room(const HomeBlocks& homes) const {
    if (!homes_fit(homes, 0)) return std::nullopt;
    return largest_block_bytes(device_bytes_ - homes.cost_bytes(), arena_limit_);
  }

  // Places of what streams when the first k tensors are kept.
  std::vector<Place> places_of_prefix(size_t k) const {
    std::vector<Place> places;
    places.reserve(spec_.units.size());
    const Use* use = uses_.data();
    for (const UnitSpec& unit : spec_.units) {
      Place& place = places.emplace_back();
      place.encloses_units = unit.encloses_units;
      for (size_t i = 0; i < unit.tensors.size(); ++i, ++use) {
        if (use->rank >= k) place.bytes += use->bytes;
      }
    }
    return places;
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
      if (prefixes_[k].bytes() > home_limit_ || arena > arena_limit) continue;
      const uint64_t cost = prefixes_[k].cost_bytes() + block_cost_bytes(arena, arena_limit);
      least = std::min(least.value_or(UINT64_MAX), cost);
    }
    return least;
  }

  // The least arena with which one of them stays within the budget.
  std::optional<uint64_t> least_arena_in_budget() const {
    std::optional<uint64_t> least;
    for (const size_t k : samples_) {
      const uint64_t arena = least_arena_bytes(places_of_prefix(k), {});
      const uint64_t cost = prefixes_[k].cost_bytes() + block_cost_bytes(arena, arena);
      if (prefixes_[k].bytes() > home_limit_ || cost > device_bytes_) continue;
      least = std::min(least.value_or(UINT64_MAX), arena);
    }
    return least;
  }

 private:
  struct Use {
    uint64_t bytes = 0;
    size_t rank = 0;  // in the residency order
  };

  bool fits(size_t k, Lookahead ahead) const {
    const std::optional<uint64_t> room = arena_room(prefixes_[k]);
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
  std::vector<Use> uses_;             // of tensors by units, unit by unit
  std::vector<HomeBlocks> prefixes_;  // by k: the homes of the first k tensors
  std::vector<size_t> samples_;       // ascending, from none to all
};

[[noreturn]] void throw_too_small(const ModelSpec& spec, const PlanLimits& limits,
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

// The largest lookahead up to `units` that can be had, and with it the largest at the seam, or the
// one that is asked for there.
std::optional<Found> find_homes(const Search& search, uint32_t units,
                                std::optional<uint32_t> seam_units) {
  for (uint32_t n = units + 1; n-- > 0;) {
    std::optional<size_t> prefix = search.largest_prefix({.units = n, .seam = 0});
    if (!prefix) continue;
    for (uint32_t seam = std::min(n, seam_units.value_or(n)); seam > 0; --seam) {
      const Lookahead ahead{.units = n, .seam = seam};
      if (const auto with_seam = search.largest_prefix(ahead)) return Found{*with_seam, ahead};
    }
    return Found{*prefix, {.units = n, .seam = 0}};
  }
  return std::nullopt;
}

// Two units ahead ride out uneven units, where that costs little; else one.
uint32_t default_lookahead(const Search& search, const PlanLimits& limits) {
  const uint64_t arena = least_arena_bytes(search.places_of_prefix(0), {.units = 2, .seam = 2});
  const bool cheap = search.arena_cost(arena) <= limits.device_bytes / 4 &&
                     arena <= limits.arena_bytes.value_or(UINT64_MAX);
  return cheap ? 2 : 1;
}

uint32_t wanted_lookahead(const Search& search, const PlanLimits& limits, DeviceHomes& homes) {
  if (!limits.lookahead_units) return default_lookahead(search, limits);
  if (*limits.lookahead_units > kMaxLookahead) {
    homes.warnings.push_back(concat("lookahead_units = ", *limits.lookahead_units, ": at most ",
                                    kMaxLookahead, " are looked ahead"));
  }
  return std::min(*limits.lookahead_units, kMaxLookahead);
}

void warn_smaller(const PlanLimits& limits, uint32_t wanted, Lookahead ahead, DeviceHomes& homes) {
  if (!limits.lookahead_units) return;
  if (ahead.units < wanted) {
    homes.warnings.push_back(concat("lookahead_units = ", wanted,
                                    " does not fit into the arena's budget: ", ahead.units,
                                    " is used"));
  } else if (ahead.seam < ahead.units && !limits.seam_units) {
    homes.warnings.push_back(concat(
        "lookahead_units = ", wanted,
        " does not fit between the last units and the first: ", ahead.seam, " is used there"));
  }
}

std::vector<Place> streamed_places(const ModelSpec& spec, const std::vector<bool>& resident) {
  std::vector<Place> places;
  for (const UnitSpec& unit : spec.units) {
    Place& place = places.emplace_back();
    place.encloses_units = unit.encloses_units;
    for (const uint32_t t : unit.tensors) {
      if (!resident[t]) place.bytes += streamed_tensor_bytes(spec.tensors[t]);
    }
  }
  return places;
}

std::vector<std::vector<uint32_t>> users_of_tensors(const ModelSpec& spec) {
  std::vector<std::vector<uint32_t>> users(spec.tensors.size());
  for (uint32_t u = 0; u < spec.units.size(); ++u) {
    for (const uint32_t t : spec.units[u].tensors) users[t].push_back(u);
  }
  return users;
}

// Keeps every further tensor that fits beside the arena as it is. True when there was one. With
// `users`, no unit's place becomes empty.
bool refill(const ModelSpec& spec, const Search& search, DeviceHomes& homes,
            const std::vector<std::vector<uint32_t>>* users = nullptr) {
  bool added = false;
  for (const uint32_t t : search.order().tensors) {
    const uint64_t bytes = device_tensor_bytes(spec.tensors[t]);
    if (homes.resident[t] || !search.homes_fit(homes.blocks.with(bytes), homes.arena.bytes)) {
      continue;
    }
    if (users) {
      const uint64_t streamed = streamed_tensor_bytes(spec.tensors[t]);
      const auto empties = [&](uint32_t u) { return homes.places[u].bytes == streamed; };
      if (std::any_of((*users)[t].begin(), (*users)[t].end(), empties)) continue;
      for (const uint32_t u : (*users)[t]) homes.places[u].bytes -= streamed;
    }
    homes.resident[t] = true;
    homes.kept.push_back(t);
    homes.blocks.add(bytes);
    added = true;
  }
  return added;
}

// Lays the arena out for what streams. False, and nothing is changed, where there is no room.
bool try_layout(const ModelSpec& spec, const Search& search, DeviceHomes& homes) {
  const std::optional<uint64_t> room = search.arena_room(homes.blocks);
  if (!room) return false;
  std::vector<Place> places = streamed_places(spec, homes.resident);
  auto layout = fit_arena(places, homes.ahead, *room);
  if (!layout) return false;
  homes.places = std::move(places);
  homes.arena = std::move(*layout);
  return true;
}

// Keeps the tensors of units that share their place with no other: that is as good as a home, and
// a home outlives the arena when budgets change.
bool keep_never_evicted(const ModelSpec& spec, const Search& search, DeviceHomes& homes) {
  const std::vector<bool> never_evicted = find_never_evicted(homes.places, homes.arena);
  DeviceHomes changed = homes;
  for (uint32_t u = 0; u < spec.units.size(); ++u) {
    for (const uint32_t t : spec.units[u].tensors) {
      if (!never_evicted[u] || changed.resident[t]) continue;
      changed.resident[t] = true;
      changed.kept.push_back(t);
      changed.blocks.add(device_tensor_bytes(spec.tensors[t]));
    }
  }
  if (changed.kept.size() == homes.kept.size()) return false;
  if (!search.homes_fit(changed.blocks, 0) || !try_layout(spec, search, changed)) return false;
  homes = std::move(changed);
  return true;
}

// Lays the arena out for the tensors chosen so far, then uses what is left, in turns: each tensor
// that is kept may make the arena smaller.
void lay_out(const ModelSpec& spec, const Search& search, DeviceHomes& homes) {
  try_layout(spec, search, homes);
  for (int round = 0; round < kMaxRefills; ++round) {
    DeviceHomes refilled = homes;
    const bool more = refill(spec, search, refilled);
    if (more && try_layout(spec, search, refilled)) {
      homes = std::move(refilled);
    } else if (!keep_never_evicted(spec, search, homes)) {
      break;
    }
  }
  // A unit whose place becomes empty brings others nearer to each other, and there may be no layout
  // for that. Where places only shrink, they stay clear of each other as they are.
  const auto users = users_of_tensors(spec);
  refill(spec, search, homes, &users);
}

DeviceHomes choose_in_order(const ModelSpec& spec, const PlanLimits& limits, ResidencyOrder order) {
  const Search search(spec, limits, std::move(order));
  DeviceHomes homes;
  homes.resident.assign(spec.tensors.size(), false);
  size_t kept = search.all();
  if (!search.homes_fit(search.prefix(kept), 0)) {
    const uint32_t wanted = wanted_lookahead(search, limits, homes);
    const std::optional<Found> found = find_homes(search, wanted, limits.seam_units);
    if (!found) throw_too_small(spec, limits, search);
    kept = found->prefix;
    homes.ahead = found->ahead;
    warn_smaller(limits, wanted, homes.ahead, homes);
  }
  const auto& order_of_homes = search.order().tensors;
  homes.kept.assign(order_of_homes.begin(), order_of_homes.begin() + static_cast<ptrdiff_t>(kept));
  for (const uint32_t t : homes.kept) homes.resident[t] = true;
  homes.blocks = search.prefix(kept);
  lay_out(spec, search, homes);
  homes.arena_bytes = search.arena_request(homes.arena.bytes);
  return homes;
}

uint64_t streamed_bytes(const DeviceHomes& homes) {
  uint64_t bytes = 0;
  for (const Place& place : homes.places) bytes += place.bytes;
  return bytes;
}

bool better(const DeviceHomes& a, const DeviceHomes& b) {
  if (a.ahead.units != b.ahead.units) return a.ahead.units > b.ahead.units;
  if (a.ahead.seam != b.ahead.seam) return a.ahead.seam > b.ahead.seam;
  return streamed_bytes(a) < streamed_bytes(b);
}

ResidencyOrder asked_order(const ModelSpec& spec, const PlanLimits& limits) {
  ResidencyOrder order = residency_order(spec);
  for (const uint32_t u : limits.first_units) {
    check(u < spec.units.size(), "first_units: there is no unit ", u);
    order = with_first(order, spec.units[u].tensors);
  }
  return order;
}

// The unit that streams least, of those in the cycle.
std::optional<uint32_t> smallest_in_cycle(const DeviceHomes& homes) {
  std::optional<uint32_t> smallest;
  for (uint32_t u = 0; u < homes.places.size(); ++u) {
    const Place& place = homes.places[u];
    if (place.encloses_units || place.bytes == 0) continue;
    if (!smallest || place.bytes < homes.places[*smallest].bytes) smallest = u;
  }
  return smallest;
}

}  // namespace

// An odd number of units cannot alternate between two places, the seam takes a third. Keeping one
// unit whole costs no more than that, and makes the number even.
DeviceHomes choose_device_homes(const ModelSpec& spec, const PlanLimits& limits) {
  const ResidencyOrder order = asked_order(spec, limits);
  DeviceHomes homes = choose_in_order(spec, limits, order);
  const bool ideal = homes.ahead.seam == limits.seam_units.value_or(homes.ahead.units) &&
                     homes.arena.bytes == least_arena_bytes(homes.places, homes.ahead);
  const std::optional<uint32_t> smallest = smallest_in_cycle(homes);
  if (ideal || !smallest) return homes;
  DeviceHomes other =
      choose_in_order(spec, limits, with_first(order, spec.units[*smallest].tensors));
  return better(other, homes) ? other : homes;
}

}  // namespace wsm
