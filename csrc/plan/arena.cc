#include "plan/arena.h"

#include <algorithm>

#include "plan/plan.h"
#include "util/align.h"

namespace wsm {
namespace {

// Of a place search: the bytes that one unit takes, while others must stay out.
struct Taken {
  uint64_t begin = 0;
  uint64_t end = 0;
};

// The units that share the arena, in order.
struct Cycle {
  uint64_t enclosing_bytes = 0;
  std::vector<uint64_t> bytes;
  uint64_t largest = 0;

  explicit Cycle(const std::vector<Place>& places) {
    for (const Place& place : places) {
      if (place.encloses_units) {
        enclosing_bytes += place.bytes;
      } else if (place.bytes > 0) {
        bytes.push_back(place.bytes);
        largest = std::max(largest, place.bytes);
      }
    }
  }

  uint32_t size() const { return static_cast<uint32_t>(bytes.size()); }

  // More than all the others cannot be ahead of a unit.
  Lookahead clamp(Lookahead ahead) const {
    const uint32_t most = bytes.empty() ? 0 : size() - 1;
    return {std::min(ahead.units, most), std::min({ahead.seam, ahead.units, most})};
  }

  // The largest sum of units that must all be there at once.
  uint64_t least_bytes(Lookahead ahead) const {
    const size_t n = bytes.size();
    uint64_t least = 0;
    uint64_t sum = 0;
    for (size_t i = 0; i < n; ++i) {
      sum += bytes[i];
      if (i > ahead.units) sum -= bytes[i - ahead.units - 1];
      least = std::max(least, sum);
    }
    if (ahead.seam == 0) return least;
    sum = 0;
    for (size_t i = n - ahead.seam; i < n; ++i) sum += bytes[i];
    for (size_t i = 0; i < ahead.seam; ++i) {
      sum += bytes[i];
      least = std::max(least, sum);
      sum -= bytes[n - ahead.seam + i];
    }
    return least;
  }
};

// Places the units one after another, each clear of those that it must not meet.
//
//   kAround: after the unit before it, from the start again where the end is reached. Any sizes fit
//   in
//            the least arena and one unit more.
//   kEnds:   in turns as low and as high as it fits. With one unit ahead, any sizes fit in the
//   least arena.
class Placer {
 public:
  enum class Strategy { kAround, kEnds };

  Placer(const Cycle& cycle, Lookahead ahead, uint64_t arena_bytes, Strategy strategy)
      : cycle_(cycle), ahead_(ahead), arena_bytes_(arena_bytes), strategy_(strategy) {
    offsets_.reserve(cycle.size());
  }

  bool place_all() {
    for (uint32_t i = 0; i < cycle_.size(); ++i) {
      if (i > ahead_.units) leave(i - ahead_.units - 1);
      if (i + ahead_.seam >= cycle_.size()) enter(i + ahead_.seam - cycle_.size());
      if (!place(i)) return false;
      enter(i);
    }
    return true;
  }

  const std::vector<uint64_t>& offsets() const { return offsets_; }

 private:
  static bool before(const Taken& a, const Taken& b) { return a.begin < b.begin; }

  Taken taken_by(uint32_t i) const { return {offsets_[i], offsets_[i] + cycle_.bytes[i]}; }

  // In a short cycle a unit may be there twice: as one of the last, and across the seam.
  void enter(uint32_t i) {
    const Taken taken = taken_by(i);
    taken_.insert(std::upper_bound(taken_.begin(), taken_.end(), taken, before), taken);
  }

  void leave(uint32_t i) {
    const Taken taken = taken_by(i);
    auto it = std::lower_bound(taken_.begin(), taken_.end(), taken, before);
    while (it->end != taken.end) ++it;
    taken_.erase(it);
  }

  bool place(uint32_t i) {
    const uint64_t bytes = cycle_.bytes[i];
    std::optional<uint64_t> offset;
    if (strategy_ == Strategy::kEnds) {
      offset = i % 2 == 0 ? lowest(0, bytes) : highest(bytes);
    } else {
      offset = lowest(i == 0 ? 0 : taken_by(i - 1).end, bytes);
      if (!offset) offset = lowest(0, bytes);
    }
    if (!offset) return false;
    offsets_.push_back(*offset);
    return true;
  }

  std::optional<uint64_t> lowest(uint64_t from, uint64_t bytes) const {
    uint64_t begin = from;
    for (const Taken& taken : taken_) {
      if (taken.end <= begin) continue;
      if (taken.begin >= begin + bytes) break;
      begin = taken.end;
    }
    if (begin + bytes > arena_bytes_) return std::nullopt;
    return begin;
  }

  std::optional<uint64_t> highest(uint64_t bytes) const {
    std::optional<uint64_t> found;
    uint64_t gap = 0;
    for (const Taken& taken : taken_) {
      if (taken.begin >= gap + bytes) found = taken.begin - bytes;
      gap = std::max(gap, taken.end);
    }
    if (gap + bytes <= arena_bytes_) found = arena_bytes_ - bytes;
    return found;
  }

  const Cycle& cycle_;
  const Lookahead ahead_;
  const uint64_t arena_bytes_;
  const Strategy strategy_;
  std::vector<uint64_t> offsets_;
  std::vector<Taken> taken_;  // by begin: what the next unit must not meet
};

std::optional<std::vector<uint64_t>> place_cycle(const Cycle& cycle, Lookahead ahead,
                                                 uint64_t bytes) {
  for (const Placer::Strategy strategy : {Placer::Strategy::kAround, Placer::Strategy::kEnds}) {
    Placer placer(cycle, ahead, bytes, strategy);
    if (placer.place_all()) return placer.offsets();
  }
  return std::nullopt;
}

ArenaLayout assemble(const std::vector<Place>& places, const Cycle& cycle,
                     const std::vector<uint64_t>& cycle_offsets) {
  ArenaLayout layout;
  layout.bytes = cycle.enclosing_bytes;
  uint64_t enclosing = 0;
  size_t next = 0;
  for (const Place& place : places) {
    uint64_t offset = 0;
    if (place.encloses_units) {
      offset = enclosing;
      enclosing += place.bytes;
    } else if (place.bytes > 0) {
      offset = cycle.enclosing_bytes + cycle_offsets[next++];
      layout.bytes = std::max(layout.bytes, offset + place.bytes);
    }
    layout.offsets.push_back(offset);
  }
  return layout;
}

// Sizes that are tried between the least and the most: up to three of the largest unit more, which
// leaves room for those ahead and those across the seam, in eighths of it.
constexpr uint64_t kStepsPerUnit = 8;
constexpr uint64_t kSteps = 3 * kStepsPerUnit;

}  // namespace

uint64_t least_arena_bytes(const std::vector<Place>& places, Lookahead ahead) {
  const Cycle cycle(places);
  return cycle.enclosing_bytes + cycle.least_bytes(cycle.clamp(ahead));
}

bool arena_fits(const std::vector<Place>& places, Lookahead ahead, uint64_t max_bytes) {
  const Cycle cycle(places);
  ahead = cycle.clamp(ahead);
  const uint64_t least = cycle.least_bytes(ahead);
  if (cycle.enclosing_bytes + least > max_bytes) return false;
  const uint64_t most = max_bytes - cycle.enclosing_bytes;
  return place_cycle(cycle, ahead, least) ||
         place_cycle(cycle, ahead, align_down(most, kTensorAlignment));
}

std::optional<ArenaLayout> fit_arena(const std::vector<Place>& places, Lookahead ahead,
                                     uint64_t max_bytes) {
  if (!arena_fits(places, ahead, max_bytes)) return std::nullopt;
  const Cycle cycle(places);
  ahead = cycle.clamp(ahead);
  const uint64_t least = cycle.least_bytes(ahead);
  const uint64_t most = align_down(max_bytes - cycle.enclosing_bytes, kTensorAlignment);
  for (uint64_t step = 0; step <= kSteps; ++step) {
    const uint64_t more = align_up(cycle.largest / kStepsPerUnit * step, kTensorAlignment);
    if (more > most - least) break;
    if (auto offsets = place_cycle(cycle, ahead, least + more)) {
      return assemble(places, cycle, *offsets);
    }
  }
  return assemble(places, cycle, *place_cycle(cycle, ahead, most));
}

// By where they begin: one is alone that begins where all before it have ended, and ends where the
// next begins.
std::vector<bool> find_never_evicted(const std::vector<Place>& places, const ArenaLayout& layout) {
  std::vector<uint32_t> order;
  for (uint32_t u = 0; u < places.size(); ++u) {
    if (places[u].bytes > 0) order.push_back(u);
  }
  std::sort(order.begin(), order.end(),
            [&](uint32_t a, uint32_t b) { return layout.offsets[a] < layout.offsets[b]; });
  std::vector<bool> never_evicted(places.size(), false);
  uint64_t end = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    const uint64_t begin = layout.offsets[order[i]];
    const uint64_t own_end = begin + places[order[i]].bytes;
    const bool next_is_clear = i + 1 == order.size() || layout.offsets[order[i + 1]] >= own_end;
    never_evicted[order[i]] = begin >= end && next_is_clear;
    end = std::max(end, own_end);
  }
  return never_evicted;
}

}  // namespace wsm
