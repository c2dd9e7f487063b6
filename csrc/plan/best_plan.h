// The plan whose simulated pass is the shortest.
//
// `make_plan` uses the budgets up; how they are split is a choice: more units ahead, a wider seam
// and a larger staging ring take memory from homes and cache, and pay where they keep a link busy.
// Which it is depends on the machine, so it is tried out in the simulator.
#pragma once

#include "plan/model_spec.h"
#include "plan/planner.h"
#include "plan/simulate.h"

namespace wsm {

// Like `make_plan`, and throws as it does. What `limits` sets is not varied.
Plan best_plan(const ModelSpec& spec, const Limits& limits, const Rates& rates);

}  // namespace wsm
