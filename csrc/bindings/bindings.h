// What each file of the Python module `wsm_ext._engine` adds to it. Arguments are converted under
// the GIL; the GIL is released around every call that may take its time.
#pragma once

#include <pybind11/pybind11.h>

#include "plan/model_spec.h"
#include "plan/plan.h"

namespace wsm {

struct PlannedModel {
  ModelSpec spec;
  Plan plan;
};

// A unit's range in the arena.
struct UnitPlace {
  uint64_t offset;
  uint64_t bytes;
};

// In this order: later ones take what earlier ones define as arguments.
void bind_simulator(pybind11::module_& m);
void bind_model(pybind11::module_& m);
void bind_plan(pybind11::module_& m);
void bind_trace(pybind11::module_& m);
void bind_readers(pybind11::module_& m);
void bind_engine(pybind11::module_& m);

}  // namespace wsm
