#include "plan/simulate.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <iterator>
#include <map>
#include <numeric>
#include <vector>

#include "util/check.h"

namespace wsm {
namespace {

constexpr int kMostPasses = 16;
constexpr double kSamePass = 1e-9;  // relative: passes are alike, the state is steady
constexpr int kAveraged = 4;        // passes, where they never get alike

// Which chunks are in the host cache when they are used.
class Cache {
 public:
  explicit Cache(const Plan& plan) : plan_(plan), filled_(plan.chunks.size()) {}

  // Uses the chunk: true when its bytes were there. Afterwards they are, if the host is its home.
  bool use(uint32_t chunk) {
    if (through_slot(chunk)) return false;
    const bool was_there = filled_[chunk];
    filled_[chunk] = true;
    return was_there;
  }

  // A chunk that is read passes through a slot, unless it has its place in the cache.
  bool through_slot(uint32_t chunk) const { return plan_.chunks[chunk].home != Home::kHost; }

 private:
  const Plan& plan_;
  std::vector<bool> filled_;
};

// One use of a unit that streams: when things happened.
struct Use {
  double called = 0;        // its acquire
  double released = 0;      // on the host
  double computed = 0;      // its forward ended
  uint64_t bytes_till = 0;  // the bytes of all uses up to this one
};

// What a load waited for.
struct Waits {
  double place = 0;      // when the place came free
  double link_idle = 0;  // how long the link waited for the disk
};

class Simulator {
 public:
  Simulator(const Plan& plan, const Rates& rates, const std::vector<uint32_t>& order)
      : plan_(plan),
        rates_(rates),
        order_(order),
        cache_(plan),
        present_(plan.units.size(), false),
        last_use_(plan.units.size()),
        slot_free_(std::max(plan.slot_count, 2u) - 1, 0.0) {
    for (const UnitPlan& unit : plan.units) streaming_units_ += unit.place_bytes > 0;
  }

  Simulated run() {
    const double first_pass_s = pass().pass_s;
    std::deque<Simulated> last;
    bool same = false;
    for (int i = 0; i < kMostPasses && !same; ++i) {
      last.push_back(pass());
      if (last.size() > kAveraged) last.pop_front();
      const double before = last.size() > 1 ? last[last.size() - 2].pass_s : INFINITY;
      same = std::abs(last.back().pass_s - before) <= kSamePass * before;
    }
    Simulated result = last.back();
    result.first_pass_s = first_pass_s;
    if (!same) result.pass_s = mean_pass_s(last);
    result.bottleneck = result.disk_s >= std::max(result.h2d_s, result.compute_s)
                            ? Bottleneck::kDisk
                        : result.h2d_s >= result.compute_s ? Bottleneck::kH2d
                                                           : Bottleneck::kCompute;
    // What was read ahead may hide for many passes that a link cannot keep up.
    const double hidden_s =
        std::max({result.disk_s, result.h2d_s, result.compute_s}) - result.pass_s;
    if (hidden_s > 0) {
      result.pass_s += hidden_s;
      (result.bottleneck == Bottleneck::kDisk ? result.disk_stall_s : result.h2d_stall_s) +=
          hidden_s;
    }
    return result;
  }

 private:
  static double mean_pass_s(const std::deque<Simulated>& passes) {
    double seconds = 0;
    for (const Simulated& pass : passes) seconds += pass.pass_s;
    return seconds / static_cast<double>(passes.size());
  }

  Simulated pass() {
    now_ = {};
    const double begin = compute_free_;
    for (const uint32_t unit : order_) use(unit);
    now_.pass_s = compute_free_ - begin;
    return now_;
  }

  void use(uint32_t unit) {
    const bool streams = plan_.units[unit].place_bytes > 0;
    double ready = 0;
    Waits waits;
    if (streams) {
      const uint64_t bytes = uses_.empty() ? 0 : uses_.back().bytes_till;
      uses_.push_back({.called = host_, .bytes_till = bytes + plan_.units[unit].streamed_bytes});
      move_window();
      if (!present_[unit]) ready = load(unit, waits);
    }
    const double from = std::max({compute_free_, ready, host_});
    account_stall(from - compute_free_, waits);
    const double seconds = rates_.compute_s.empty() ? 0 : rates_.compute_s[unit];
    now_.compute_s += seconds;
    compute_free_ = from + seconds;
    if (rates_.host_computes) host_ = compute_free_;
    if (!streams) return;
    uses_.back().released = host_;
    uses_.back().computed = compute_free_;
    last_use_[unit] = uses_.size() - 1;
  }

  // Returns when the last copy is done.
  double load(uint32_t unit, Waits& waits) {
    const size_t use = uses_.size() - 1;
    const size_t ahead = plan_.lookahead_units;
    const double expected = use >= ahead ? uses_[use - ahead].called : 0;
    const double from = std::max({enqueued_, expected, evict(unit, waits)});
    link_free_ = std::max({link_free_, from, waits.place}) + rates_.unit_overhead_s;
    now_.h2d_s += rates_.unit_overhead_s;
    enqueued_ = copy_chunks(plan_.units[unit], from, waits);
    present_[unit] = true;
    host_ = std::max(host_, enqueued_);
    return link_free_;
  }

  // Returns when the host has released those that lie in the unit's place. The link waits until
  // the device is done with them too.
  double evict(uint32_t unit, Waits& waits) {
    double released = 0;
    const UnitPlan& place = plan_.units[unit];
    if (place.never_evicted) return released;
    auto other = there_.upper_bound(place.place_offset);
    if (other != there_.begin() && places_overlap(place, plan_.units[std::prev(other)->second])) {
      --other;
    }
    const uint64_t end = place.place_offset + place.place_bytes;
    for (; other != there_.end() && other->first < end; other = there_.erase(other)) {
      present_[other->second] = false;
      const Use& last = uses_[last_use_[other->second]];
      released = std::max(released, last.released);
      waits.place = std::max(waits.place, last.computed);
    }
    there_[place.place_offset] = unit;
    return released;
  }

  // In the engine's order: what is there when the load begins, then what comes from the disk.
  // Returns when the last copy was enqueued.
  double copy_chunks(const UnitPlan& unit, double from, Waits& waits) {
    std::vector<uint32_t> later;
    run_source_ = UINT64_MAX;  // a unit's copies are enqueued before its event
    for (uint32_t c = unit.first_chunk; c < unit.first_chunk + unit.chunk_count; ++c) {
      if (cache_.use(c)) {
        copy(c, from);
      } else if (later.empty() && read_end(c) <= from) {
        copy_read(c, from, waits);
      } else {
        later.push_back(c);  // its slot may be one that a chunk of this very load gives back
      }
    }
    double enqueued = from;
    for (const uint32_t c : later) enqueued = copy_read(c, from, waits);
    return enqueued;
  }

  double read_seconds(uint32_t chunk) const {
    return plan_.chunks[chunk].read_bytes / rates_.disk_bytes_per_s;
  }

  // When the next read would be done, if it were this chunk's.
  double read_end(uint32_t chunk) const {
    double start = std::max(disk_free_, window_opened_);
    if (cache_.through_slot(chunk)) start = std::max(start, slot_free_[next_slot_]);
    return start + read_seconds(chunk);
  }

  // Reads, then copies. Returns when the copy was enqueued.
  double copy_read(uint32_t chunk, double from, Waits& waits) {
    disk_free_ = read_end(chunk);
    now_.disk_s += read_seconds(chunk);
    now_.disk_bytes += plan_.chunks[chunk].payload_bytes;
    const double enqueued = std::max(from, disk_free_);
    waits.link_idle += std::max(0.0, enqueued - std::max(link_free_, from));
    copy(chunk, enqueued);
    if (cache_.through_slot(chunk)) {
      slot_free_[next_slot_] = link_free_;
      next_slot_ = (next_slot_ + 1) % slot_free_.size();
    }
    return enqueued;
  }

  void copy(uint32_t chunk, double from) {
    const Chunk& c = plan_.chunks[chunk];
    const uint32_t copies = c.copy_count - (goes_on(c, cache_.through_slot(chunk)) ? 1 : 0);
    const double seconds =
        c.payload_bytes / rates_.h2d_bytes_per_s + copies * rates_.copy_overhead_s;
    link_free_ = std::max(link_free_, from) + seconds;
    now_.h2d_s += seconds;
    now_.h2d_bytes += c.payload_bytes;
  }

  // Whether the chunk's first copy touches the last one, in the host cache and on the device: the
  // engine makes one of them (engine/copy_run.h).
  bool goes_on(const Chunk& chunk, bool through_slot) {
    if (through_slot || chunk.copy_count == 0) {
      run_source_ = UINT64_MAX;
      return false;
    }
    const Copy& first = plan_.copies[chunk.first_copy];
    const Copy& last = plan_.copies[chunk.first_copy + chunk.copy_count - 1];
    const bool touches = chunk.cache_offset + first.source_offset == run_source_ &&
                         first.target_offset == run_target_;
    run_source_ = chunk.cache_offset + last.source_offset + last.bytes;
    run_target_ = last.target_offset + last.bytes;
    return touches;
  }

  // Reads for the last use began, at the earliest, when it came into the window of an earlier one.
  void move_window() {
    const size_t use = uses_.size() - 1;
    const auto reaches = [&](size_t from) {
      const uint64_t between = uses_[use - 1].bytes_till - uses_[from].bytes_till;
      return use - from <= streaming_units_ &&
             (use - from <= plan_.lookahead_units || between < plan_.read_ahead_bytes);
    };
    while (window_from_ < use && !reaches(window_from_)) ++window_from_;
    window_opened_ = window_from_ > 0 ? uses_[window_from_].called : 0;
  }

  void account_stall(double seconds, const Waits& waits) {
    if (seconds <= 0) return;
    const double disk = std::min(seconds, waits.link_idle);
    const double arena = std::clamp(waits.place - compute_free_, 0.0, seconds - disk);
    now_.disk_stall_s += disk;
    now_.arena_stall_s += arena;
    now_.h2d_stall_s += seconds - disk - arena;
  }

  const Plan& plan_;
  const Rates& rates_;
  const std::vector<uint32_t>& order_;
  Cache cache_;
  size_t streaming_units_ = 0;
  std::vector<bool> present_;  // in the arena, by unit
  // Of these, all whose places others take too, by place: no two of them overlap.
  std::map<uint64_t, uint32_t> there_;
  std::vector<Use> uses_;
  std::vector<size_t> last_use_;  // by unit, into uses_
  size_t window_from_ = 0;        // the use that brought the last one into the window
  double window_opened_ = 0;
  std::vector<double> slot_free_;  // one slot is kept for demands
  size_t next_slot_ = 0;
  double disk_free_ = 0;
  double link_free_ = 0;
  double compute_free_ = 0;
  double host_ = 0;      // where the caller is
  double enqueued_ = 0;  // when the last copy was
  // Where the last copy ended: in the host cache, unless it came out of a slot, and on the device.
  uint64_t run_source_ = UINT64_MAX;
  uint64_t run_target_ = 0;
  Simulated now_;
};

// Numbers of any machine, and far from where sums of them lose their meaning. NaN is neither.
constexpr double kLeastRate = 1e-3;
constexpr double kMostSeconds = 1e9;
bool is_rate(double bytes_per_s) { return bytes_per_s >= kLeastRate && std::isfinite(bytes_per_s); }
bool is_time(double seconds) { return seconds >= 0 && seconds <= kMostSeconds; }

void check_rates(const Plan& plan, const Rates& rates, const std::vector<uint32_t>& order) {
  check(is_rate(rates.disk_bytes_per_s) && is_rate(rates.h2d_bytes_per_s), "rates must be above ",
        kLeastRate, " and finite, not ", rates.disk_bytes_per_s, " (disk) and ",
        rates.h2d_bytes_per_s, " (link) bytes/s");
  check(is_time(rates.copy_overhead_s) && is_time(rates.unit_overhead_s),
        "overheads must not be negative, nor above ", kMostSeconds, " s");
  check(rates.compute_s.empty() || rates.compute_s.size() == plan.units.size(),
        "compute times for ", rates.compute_s.size(), " units were given, the plan has ",
        plan.units.size());
  for (const double seconds : rates.compute_s) {
    check(is_time(seconds), "a compute time is negative, or above ", kMostSeconds, " s: ", seconds);
  }
  for (const uint32_t unit : order) check(unit < plan.units.size(), "there is no unit ", unit);
}

}  // namespace

Simulated simulate(const Plan& plan, const Rates& rates, const std::vector<uint32_t>& order) {
  check_rates(plan, rates, order);
  std::vector<uint32_t> all;
  if (order.empty()) {
    all.resize(plan.units.size());
    std::iota(all.begin(), all.end(), 0);
  }
  return Simulator(plan, rates, order.empty() ? all : order).run();
}

}  // namespace wsm
