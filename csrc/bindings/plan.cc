// Plans, and the pass that the simulator says they give.
#include <pybind11/stl.h>

#include <optional>
#include <set>
#include <string>
#include <tuple>
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

using ShardTuple = std::tuple<std::string, uint64_t, uint32_t, bool>;
using ExtentTuple = std::tuple<uint32_t, uint64_t, uint64_t, uint64_t>;
using TensorTuple = std::tuple<std::string, uint64_t, std::vector<ExtentTuple>, uint64_t>;
using UnitTuple = std::tuple<std::string, std::string, std::vector<uint32_t>, bool>;

PlannedModel plan_model(const std::vector<ShardTuple>& shards,
                        const std::vector<TensorTuple>& tensors,
                        const std::vector<UnitTuple>& units, const Limits& limits,
                        const std::optional<Rates>& rates) {
  py::gil_scoped_release nogil;
  PlannedModel planned;
  for (const auto& [path, bytes, alignment, in_memory] : shards) {
    planned.spec.shards.push_back({path, bytes, alignment, in_memory});
  }
  for (const auto& [name, bytes, extents, placed_bytes] : tensors) {
    TensorSpec tensor{name, bytes, {}, placed_bytes};
    for (const auto& [shard, offset, length, at] : extents) {
      tensor.extents.push_back({shard, offset, length, at});
    }
    planned.spec.tensors.push_back(std::move(tensor));
  }
  for (const auto& [name, label, members, exclusive] : units) {
    planned.spec.units.push_back({name, label, members, exclusive});
  }
  planned.plan = rates ? best_plan(planned.spec, limits, *rates) : make_plan(planned.spec, limits);
  return planned;
}

}  // namespace

void bind_plan(py::module_& m) {
  py::class_<KeptCache>(m, "KeptCache");
  py::class_<Limits>(m, "Limits")
      .def(py::init<>())
      .def_readwrite("device_bytes", &Limits::device_bytes)
      .def_readwrite("host_bytes", &Limits::host_bytes)
      .def_readwrite("arena_bytes", &Limits::arena_bytes)
      .def_readwrite("home_bytes", &Limits::home_bytes)
      .def_readwrite("staging_bytes", &Limits::staging_bytes)
      .def_readwrite("cache_bytes", &Limits::cache_bytes)
      .def_readwrite("chunk_bytes", &Limits::chunk_bytes)
      .def_readwrite("lookahead_units", &Limits::lookahead_units)
      .def_readwrite("read_ahead_bytes", &Limits::read_ahead_bytes)
      .def_readwrite("kept_cache", &Limits::kept_cache);

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
      .def("place",
           [](const PlannedModel& p, uint32_t unit) {
             const UnitPlan& u = p.plan.units.at(unit);
             return py::make_tuple(u.place_offset, u.place_bytes);
           })
      // Shards of which some bytes have no home but their own place.
      .def("shards_on_disk",
           [](const PlannedModel& p) {
             std::set<uint32_t> shards;
             for (const Chunk& chunk : p.plan.chunks) {
               if (chunk.home == Home::kDisk) shards.insert(chunk.shard);
             }
             return shards;
           })
      // (bytes, tensors) of each block of the homes.
      .def_property_readonly("home_blocks",
                             [](const PlannedModel& p) {
                               py::list blocks;
                               for (const HomeBlock& block : p.plan.home_blocks) {
                                 blocks.append(py::make_tuple(block.bytes, block.tensors));
                               }
                               return blocks;
                             })
      // Device memory as the allocator takes it.
      .def_property_readonly("device_bytes",
                             [](const PlannedModel& p) {
                               uint64_t bytes = device_block_bytes(p.plan.arena_bytes);
                               for (const HomeBlock& block : p.plan.home_blocks) {
                                 bytes += device_block_bytes(block.bytes);
                               }
                               return bytes;
                             })
      // (home block, offset in it, offset of the image) of each of the unit's tensors; the arena is
      // None, and has the images.
      .def("tensor_places", [](const PlannedModel& p, uint32_t unit) {
        py::list places;
        for (const TensorPlace& place : p.plan.units.at(unit).tensors) {
          if (place.resident) {
            const size_t block = p.plan.block_at(place.offset);
            places.append(py::make_tuple(block, place.offset - p.plan.home_blocks[block].offset,
                                         uint64_t{0}));
          } else {
            places.append(py::make_tuple(py::none(), place.offset, place.image_offset));
          }
        }
        return places;
      });
  m.def("plan_model", &plan_model, py::arg("shards"), py::arg("tensors"), py::arg("units"),
        py::arg("limits"), py::arg("rates") = py::none());
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
      .def_property_readonly("limit",
                             [](const Simulated& s) {
                               const char* const names[] = {"disk", "h2d", "compute"};
                               return names[static_cast<int>(s.limit)];
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
      [](const PlannedModel& planned, const Rates& rates, const std::vector<uint32_t>& order,
         const std::string& policy) {
        check(policy == "fixed" || policy == "lru", "policy is 'fixed' or 'lru', not '", policy,
              "'");
        const auto kind = policy == "lru" ? CachePolicy::kLru : CachePolicy::kFixed;
        return simulate(planned.plan, rates, order, kind);
      },
      py::arg("planned"), py::arg("rates"), py::arg("order") = std::vector<uint32_t>{},
      py::arg("policy") = "fixed", py::call_guard<py::gil_scoped_release>());
}

}  // namespace wsm
