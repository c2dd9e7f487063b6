// A simulator of the pass: what a plan gives on a machine whose links have these rates.
//
// Four servers, each of which does one thing after another, as the engine drives them:
//
//   disk      reads, in the order of use; one waits for a free slot (or has a place in the cache)
//   link      copies, unit by unit; one waits for its bytes, and for who used its place before
//   compute   forwards, in the order of use; one waits for its unit's last copy
//   host      acquires; one returns when its copies are enqueued, not when they are done
//
// Every event's time follows from earlier ones, so the events are worked off in the order of use.
// Pure and deterministic. Passes follow each other back to back until one takes as long as the one
// before it.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/plan.h"

namespace wsm {

// What a machine gives. The defaults are a modest desktop's.
struct Rates {
  double disk_bytes_per_s = 2e9;
  double h2d_bytes_per_s = 20e9;
  double copy_overhead_s = 3e-6;   // of each copy
  double unit_overhead_s = 10e-6;  // of each load: the events before and after it
  std::vector<double> compute_s;   // of each unit's forward; empty: nothing to compute
  bool host_computes = false;      // the host device: a forward holds up the caller
};

enum class Bottleneck : uint8_t { kDisk, kH2d, kCompute };

struct Simulated {
  double pass_s = 0;        // of a pass that others came before
  double first_pass_s = 0;  // the host cache is empty, and nothing was prefetched
  // Of the steady pass: how long each was busy, and what crossed.
  double disk_s = 0;
  double h2d_s = 0;
  double compute_s = 0;
  uint64_t disk_bytes = 0;
  uint64_t h2d_bytes = 0;
  Bottleneck bottleneck = Bottleneck::kH2d;  // which was busy longest
  // How long compute waited: for bytes from the disk, for copies, for a place in the arena.
  double disk_stall_s = 0;
  double h2d_stall_s = 0;
  double arena_stall_s = 0;
};

// `order`: the units of one pass, those that do not stream too; empty: registration order. A unit
// may occur more than once. Throws InvalidArgument for rates that are not positive and finite,
// times that are no times, compute times that do not match the units, or an order that names a unit
// that is not there.
Simulated simulate(const Plan& plan, const Rates& rates, const std::vector<uint32_t>& order = {});

}  // namespace wsm
