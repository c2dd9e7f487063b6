#include "plan/best_plan.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "util/check.h"

namespace wsm {
namespace {

constexpr uint32_t kMostAhead = 4;
constexpr size_t kMostFirst = 2;
constexpr uint64_t kMostStagingFactor = 4;
constexpr double kWorthwhile = 0.995;  // a change must shorten the pass to this at least

// The best so far, and what it was planned with.
class Choice {
 public:
  Choice(const ModelSpec& spec, const Limits& limits, const Rates& rates)
      : spec_(spec), limits_(limits), rates_(rates), plan_(make_plan(spec, limits)) {
    pass_s_ = simulate(plan_, rates_).pass_s;
  }

  const Plan& plan() const { return plan_; }
  const Limits& limits() const { return limits_; }

  // Takes the changed limits where they give a faster pass.
  template <typename Change>
  void try_out(Change change) {
    Limits limits = limits_;
    change(limits);
    std::optional<Plan> plan;
    try {
      plan = make_plan(spec_, limits);
    } catch (const InvalidArgument&) {
      return;  // what was tried does not fit
    }
    const double pass_s = simulate(*plan, rates_).pass_s;
    if (pass_s > pass_s_ * kWorthwhile) return;
    // Only the caller's own settings are worth a warning.
    plan->warnings = plan_.warnings;
    plan_ = std::move(*plan);
    limits_ = limits;
    pass_s_ = pass_s;
  }

 private:
  const ModelSpec& spec_;
  Limits limits_;
  const Rates& rates_;
  Plan plan_;
  double pass_s_ = 0;
};

// At most two, the largest first.
std::vector<uint32_t> largest_units(const ModelSpec& spec) {
  std::vector<uint64_t> bytes;
  for (const UnitSpec& unit : spec.units) {
    uint64_t& sum = bytes.emplace_back();
    for (const uint32_t t : unit.tensors) sum += spec.tensors[t].bytes;
  }
  std::vector<uint32_t> order(bytes.size());
  std::iota(order.begin(), order.end(), 0);
  const size_t count = std::min<size_t>(kMostFirst, order.size());
  std::partial_sort(order.begin(), order.begin() + static_cast<ptrdiff_t>(count), order.end(),
                    [&](uint32_t a, uint32_t b) { return bytes[a] > bytes[b]; });
  order.resize(count);
  return order;
}

}  // namespace

Plan best_plan(const ModelSpec& spec, const Limits& limits, const Rates& rates) {
  Choice best(spec, limits, rates);
  if (best.plan().host_home_bytes + best.plan().disk_home_bytes == 0) return best.plan();
  // One unit that is larger than the others, an embedding say, makes the whole arena larger.
  const std::vector<uint32_t> largest = largest_units(spec);
  for (size_t count = 1; count <= largest.size(); ++count) {
    best.try_out(
        [&](Limits& l) { l.first_units.assign(largest.begin(), largest.begin() + count); });
  }
  if (!limits.lookahead_units) {
    for (uint32_t ahead = 1; ahead <= kMostAhead; ++ahead) {
      if (ahead == best.plan().lookahead_units) continue;
      best.try_out([&](Limits& l) { l.lookahead_units = ahead; });
    }
  }
  if (!limits.seam_units) {
    for (uint32_t seam = best.plan().lookahead_units; seam-- > 0;) {
      best.try_out([&](Limits& l) { l.seam_units = seam; });
    }
  }
  if (!limits.staging_bytes && best.plan().disk_home_bytes > 0) {
    const uint64_t usual = best.plan().staging_bytes();
    const uint64_t chunk = best.plan().chunk_bytes;
    for (uint64_t factor = 2; factor <= kMostStagingFactor; factor *= 2) {
      best.try_out([&](Limits& l) {
        l.staging_bytes = usual * factor;
        l.chunk_bytes = chunk;
      });
    }
  }
  return best.plan();
}

}  // namespace wsm
