// Plans, and the pass that the simulator says they give.
#include <pybind11/stl.h>

#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "plan/best_plan.h"
#include "plan/planner.h"
#include "plan/simulate.h"
#include "util/check.h"

namespace py = pybind11;

namespace wsm {
namespace {

PlannedModel plan_model(const ModelSpec& spec, const PlanLimits& limits,
                        const std::optional<Rates>& rates) {
  py::gil_scoped_release nogil;
  Plan plan = rates ? best_plan(spec, limits, *rates) : make_plan(spec, limits);
  return {spec, std::move(plan)};
}

// A unit's range in the arena.
UnitPlace place_of(const PlannedModel& planned, uint32_t unit) {
  const UnitPlan& plan = planned.plan.units.at(unit);
  return {plan.place_offset, plan.place_bytes};
}

// Where a unit finds a tensor: in a home block, or in the arena, which has its image too.
struct BoundLocation {
  std::optional<size_t> block;
  uint64_t offset;
  uint64_t image_offset;
};

std::vector<BoundLocation> tensor_locations(const PlannedModel& planned, uint32_t unit) {
  const Plan& plan = planned.plan;
  std::vector<BoundLocation> places;
  for (const TensorLocation& place : plan.units.at(unit).tensors) {
    if (place.resident) {
      const size_t block = plan.block_at(place.offset);
      places.push_back({block, place.offset - plan.home_blocks[block].offset, 0});
    } else {
      places.push_back({std::nullopt, place.offset, place.image_offset});
    }
  }
  return places;
}

// Shards of which some bytes have no home but their own place.
std::set<uint32_t> shards_on_disk(const PlannedModel& planned) {
  std::set<uint32_t> shards;
  for (const Chunk& chunk : planned.plan.chunks) {
    if (chunk.home == Home::kDisk) shards.insert(chunk.shard);
  }
  return shards;
}

// Device memory as the allocator takes it.
uint64_t device_bytes(const PlannedModel& planned) {
  uint64_t bytes = device_block_bytes(planned.plan.arena_bytes);
  for (const HomeBlock& block : planned.plan.home_blocks) bytes += device_block_bytes(block.bytes);
  return bytes;
}

}  // namespace

// Long: a line or two for each name.
void bind_plan(py::module_& m) {
  py::class_<KeptCache>(m, "KeptCache");
  py::class_<PlanLimits>(m, "PlanLimits")
      .def(py::init<>())
      .def_readwrite("device_bytes", &PlanLimits::device_bytes)
      .def_readwrite("host_bytes", &PlanLimits::host_bytes)
      .def_readwrite("arena_bytes", &PlanLimits::arena_bytes)
      .def_readwrite("home_bytes", &PlanLimits::home_bytes)
      .def_readwrite("staging_bytes", &PlanLimits::staging_bytes)
      .def_readwrite("cache_bytes", &PlanLimits::cache_bytes)
      .def_readwrite("chunk_bytes", &PlanLimits::chunk_bytes)
      .def_readwrite("lookahead_units", &PlanLimits::lookahead_units)
      .def_readwrite("read_ahead_bytes", &PlanLimits::read_ahead_bytes)
      .def_readwrite("kept_cache", &PlanLimits::kept_cache);

  py::class_<UnitPlace>(m, "Place")
      .def_readonly("offset", &UnitPlace::offset)
      .def_readonly("nbytes", &UnitPlace::bytes);
  py::class_<BoundLocation>(m, "TensorLocation")
      .def_readonly("block", &BoundLocation::block)
      .def_readonly("offset", &BoundLocation::offset)
      .def_readonly("image_offset", &BoundLocation::image_offset);
  py::class_<HomeBlock>(m, "HomeBlock")
      .def_readonly("nbytes", &HomeBlock::bytes)
      .def_readonly("tensors", &HomeBlock::tensors);

  py::class_<PlannedModel> planned(m, "Plan");
  const auto value = [&planned](const char* name, auto Plan::* field) {
    planned.def_property_readonly(name, [field](const PlannedModel& p) { return p.plan.*field; });
  };
  value("arena_bytes", &Plan::arena_bytes);
  value("homes_bytes", &Plan::homes_bytes);
  value("cache_bytes", &Plan::cache_bytes);
  value("chunk_bytes", &Plan::chunk_bytes);
  value("slot_count", &Plan::slot_count);
  value("lookahead_units", &Plan::lookahead_units);
  value("read_ahead_bytes", &Plan::read_ahead_bytes);
  value("device_budget_bytes", &Plan::device_budget_bytes);
  value("host_budget_bytes", &Plan::host_budget_bytes);
  value("model_bytes", &Plan::model_bytes);
  value("device_home_bytes", &Plan::device_home_bytes);
  value("host_home_bytes", &Plan::host_home_bytes);
  value("disk_home_bytes", &Plan::disk_home_bytes);
  value("warnings", &Plan::warnings);
  planned
      .def_property_readonly("staging_bytes",
                             [](const PlannedModel& p) { return p.plan.staging_bytes(); })
      .def_property_readonly("chunk_count",
                             [](const PlannedModel& p) { return p.plan.chunks.size(); })
      .def("streamed_bytes", [](const PlannedModel& p,
                                uint32_t unit) { return p.plan.units.at(unit).streamed_bytes; })
      .def("place", &place_of, py::arg("unit"))
      .def("tensor_locations", &tensor_locations, py::arg("unit"))
      .def("shards_on_disk", &shards_on_disk)
      .def_property_readonly("home_blocks",
                             [](const PlannedModel& p) { return p.plan.home_blocks; })
      .def_property_readonly("device_bytes", &device_bytes);
  m.def("plan_model", &plan_model, py::arg("model"), py::arg("limits"),
        py::arg("rates") = py::none());
  m.def("device_block_bytes", &device_block_bytes, py::arg("bytes"));
}

void bind_simulator(py::module_& m) {
  py::class_<Rates>(m, "Rates")
      .def(py::init<>())
      .def_readwrite("disk_bytes_per_s", &Rates::disk_bytes_per_s)
      .def_readwrite("h2d_bytes_per_s", &Rates::h2d_bytes_per_s)
      .def_readwrite("copy_overhead_s", &Rates::copy_overhead_s)
      .def_readwrite("compute_s", &Rates::compute_s)
      .def_readwrite("host_computes", &Rates::host_computes);

  py::class_<Simulated>(m, "Simulated")
      .def_readonly("pass_seconds", &Simulated::pass_s)
      .def_readonly("first_pass_seconds", &Simulated::first_pass_s)
      .def_readonly("disk_seconds", &Simulated::disk_s)
      .def_readonly("h2d_seconds", &Simulated::h2d_s)
      .def_readonly("compute_seconds", &Simulated::compute_s)
      .def_readonly("disk_bytes", &Simulated::disk_bytes)
      .def_readonly("h2d_bytes", &Simulated::h2d_bytes)
      .def_property_readonly("bottleneck",
                             [](const Simulated& s) {
                               const char* const names[] = {"disk", "h2d", "compute"};
                               return names[static_cast<int>(s.bottleneck)];
                             })
      .def_property_readonly("stall_seconds", [](const Simulated& s) {
        py::dict stalls;
        stalls["disk"] = s.disk_stall_s;
        stalls["h2d"] = s.h2d_stall_s;
        stalls["arena"] = s.arena_stall_s;
        return stalls;
      });
  m.def(
      "expected_pass_seconds",
      [](const PlannedModel& planned, const Rates& rates) {
        return expected_pass_s(planned.plan, rates);
      },
      py::arg("planned"), py::arg("rates"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "simulate",
      [](const PlannedModel& planned, const Rates& rates, const std::vector<uint32_t>& order) {
        return simulate(planned.plan, rates, order);
      },
      py::arg("planned"), py::arg("rates"), py::arg("order") = std::vector<uint32_t>{},
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace wsm
