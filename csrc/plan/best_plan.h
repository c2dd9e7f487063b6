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

// What plans are compared by: the simulated pass. Where nobody knows what forwards compute, the
// mean of two passes: one that computes for a tenth of its bytes' time over the link, as one token
// does, and one that computes for nine tenths. Without any computing nothing would speak for
// loading ahead.
double expected_pass_s(const Plan& plan, const Rates& rates);

// Like `make_plan`, and throws as it does. What `limits` sets is not varied.
Plan best_plan(const ModelSpec& spec, const PlanLimits& limits, const Rates& rates);

}  // namespace wsm
