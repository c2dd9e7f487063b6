#include "plan/best_plan.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

constexpr uint32_t kMostAhead = 4;
constexpr double kAssumedCompute[] = {0.1, 0.9};  // of the unit's time over the link
constexpr uint64_t kMostStagingFactor = 4;
constexpr double kWorthwhile = 0.995;  // a change must shorten the pass to this at least

// What is tried out has no more chunks: to cut a large model into a hundred thousand for each of a
// dozen plans takes longer than all else, and where the bytes live is hardly another question.
constexpr uint64_t kMostTriedChunks = 1 << 13;

// The best so far, and what it was planned with.
class Choice {
 public:
  Choice(const ModelSpec& spec, const PlanLimits& limits, const Rates& rates)
      : spec_(spec), limits_(limits), rates_(rates), plan_(make_plan(spec, limits)) {
    warnings_ = plan_.warnings;
    cut_bytes_ = tried_cut_bytes_ = plan_.cut_bytes;
    const uint64_t most = std::min(kSegmentBytes, limits.host_bytes / 8);
    for (uint64_t chunks = plan_.chunks.size();
         chunks > kMostTriedChunks && 2 * tried_cut_bytes_ <= most; chunks /= 2) {
      tried_cut_bytes_ *= 2;
    }
    if (tried_cut_bytes_ > cut_bytes_) {
      fine_ = std::move(plan_);
      plan_ = tried_plan(limits);
    }
    pass_s_ = expected_pass_s(plan_, rates_);
  }

  // With larger chunks than it will have.
  const Plan& plan() const { return plan_; }
  uint64_t cut_bytes() const { return cut_bytes_; }

  Plan result() && {
    if (fine_) {
      plan_ = std::move(*fine_);
    } else if (tried_cut_bytes_ > cut_bytes_) {
      plan_ = make_plan(spec_, limits_);
    }
    // Only the caller's own settings are worth a warning.
    plan_.warnings = std::move(warnings_);
    return std::move(plan_);
  }

  // Takes the changed limits where they give a faster pass.
  template <typename Change>
  void try_out(Change change) {
    PlanLimits limits = limits_;
    change(limits);
    std::optional<Plan> plan;
    try {
      plan = tried_plan(limits);
    } catch (const InvalidArgument&) {
      return;  // what was tried does not fit
    }
    const double pass_s = expected_pass_s(*plan, rates_);
    if (pass_s > pass_s_ * kWorthwhile) return;
    plan_ = std::move(*plan);
    fine_.reset();
    limits_ = std::move(limits);
    pass_s_ = pass_s;
  }

 private:
  Plan tried_plan(PlanLimits limits) const {
    if (tried_cut_bytes_ > cut_bytes_) limits.chunk_bytes = tried_cut_bytes_;
    return make_plan(spec_, limits);
  }

  const ModelSpec& spec_;
  PlanLimits limits_;
  const Rates& rates_;
  Plan plan_;
  std::optional<Plan> fine_;  // of the limits as they are, where they were planned with once
  std::vector<std::string> warnings_;
  uint64_t cut_bytes_ = 0;
  uint64_t tried_cut_bytes_ = 0;
  double pass_s_ = 0;
};

using Units = std::vector<uint32_t>;

// Which units may be worth keeping whole. One that is larger than the others, an embedding say,
// makes the whole arena larger. The first and the last hold the places that the next pass begins
// with: a large one cannot come in while they are there.
std::vector<Units> worth_keeping(const ModelSpec& spec) {
  std::vector<uint64_t> bytes;
  Units large;
  for (uint32_t u = 0; u < spec.units.size(); ++u) {
    uint64_t& sum = bytes.emplace_back();
    for (const uint32_t t : spec.units[u].tensors) sum += spec.tensors[t].bytes;
    if (sum > kMiB) large.push_back(u);
  }
  if (large.size() < 3) return {};
  Units ends{large.back(), large.front()};
  Units largest = large;
  std::partial_sort(largest.begin(), largest.begin() + 2, largest.end(),
                    [&](uint32_t a, uint32_t b) { return bytes[a] > bytes[b]; });
  largest.resize(2);
  return {{largest[0]}, largest, {ends[0]}, {ends[1]}, ends};
}

}  // namespace

double expected_pass_s(const Plan& plan, const Rates& rates) {
  if (!rates.compute_s.empty()) return simulate(plan, rates).pass_s;
  double sum = 0;
  for (const double share : kAssumedCompute) {
    Rates assumed = rates;
    for (const UnitPlan& unit : plan.units) {
      assumed.compute_s.push_back(share * static_cast<double>(unit.bytes) / rates.h2d_bytes_per_s);
    }
    sum += simulate(plan, assumed).pass_s;
  }
  return sum / std::size(kAssumedCompute);
}

Plan best_plan(const ModelSpec& spec, const PlanLimits& limits, const Rates& rates) {
  Choice best(spec, limits, rates);
  if (best.plan().host_home_bytes + best.plan().disk_home_bytes == 0)
    return std::move(best).result();
  for (const Units& units : worth_keeping(spec)) {
    best.try_out([&](PlanLimits& l) { l.first_units = units; });
  }
  if (!limits.lookahead_units) {
    for (uint32_t ahead = 1; ahead <= kMostAhead; ++ahead) {
      if (ahead == best.plan().lookahead_units) continue;
      best.try_out([&](PlanLimits& l) { l.lookahead_units = ahead; });
    }
  }
  if (!limits.seam_units) {
    for (uint32_t seam = best.plan().lookahead_units; seam-- > 0;) {
      best.try_out([&](PlanLimits& l) { l.seam_units = seam; });
    }
  }
  if (!limits.staging_bytes && best.plan().disk_home_bytes > 0) {
    const uint64_t usual = best.plan().staging_bytes();
    for (uint64_t factor = 2; factor <= kMostStagingFactor; factor *= 2) {
      best.try_out([&](PlanLimits& l) {
        l.staging_bytes = usual * factor;
        l.chunk_bytes = best.cut_bytes();
      });
    }
  }
  return std::move(best).result();
}

}  // namespace wsm
