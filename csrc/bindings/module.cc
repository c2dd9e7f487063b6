// The Python module `wsm_ext._engine`: arguments are converted under the GIL, the GIL is released
// around every engine call.
#include <Python.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/trace.h"
#include "device/device.h"
#include "engine/engine.h"
#include "engine/read_ahead.h"
#include "engine/time_reads.h"
#include "memory/time_copies.h"
#include "plan/best_plan.h"
#include "plan/planner.h"
#include "plan/simulate.h"
#include "storage/block_read.h"
#include "storage/page_cache.h"
#include "storage/shard.h"
#include "util/check.h"

#ifndef WSM_VERSION
#define WSM_VERSION "0+unknown"
#endif

namespace py = pybind11;

namespace wsm {
namespace {

struct PlannedModel {
  ModelSpec spec;
  Plan plan;
};

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

// Lets Ctrl-C through while a call waits, and calls `progress` if there is one. May throw.
Engine::Interrupt interrupt_with(const py::object& progress) {
  return [&progress] {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (!progress.is_none()) progress();
  };
}

Engine::Interrupt plain_interrupt() {
  return [] {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  };
}

py::dict counts_dict(const Counts& counts) {
  py::dict stalls;
  const char* const causes[kStallCauses] = {"disk", "h2d", "arena"};
  for (int i = 0; i < kStallCauses; ++i) {
    stalls[causes[i]] = static_cast<double>(counts.stall_ns[i]) * 1e-9;
  }
  py::dict d;
  d["disk_bytes"] = counts.disk_bytes;
  d["disk_read_bytes"] = counts.disk_read_bytes;
  d["h2d_bytes"] = counts.h2d_bytes;
  d["loads"] = counts.loads;
  d["demand_loads"] = counts.demand_loads;
  d["misses"] = counts.misses;
  d["stall_seconds"] = stalls;
  return d;
}

py::dict last_pass_dict(Engine& engine) {
  PassReport report;
  {
    const Engine::Interrupt interrupt = plain_interrupt();
    py::gil_scoped_release nogil;
    report = engine.last_pass(interrupt);
  }
  py::dict d = counts_dict(report.counts);
  d["seconds"] = report.seconds;
  return d;
}

py::dict steady_passes_dict(Engine& engine) {
  PassSums sums;
  {
    py::gil_scoped_release nogil;
    sums = engine.steady_passes();
  }
  py::dict d = counts_dict(sums.counts);
  d["passes"] = sums.passes;
  d["seconds"] = sums.seconds;
  return d;
}

// What read most of the shard's bytes; "none" before the first read.
py::dict shard_dict(const ShardReport& shard) {
  const bool direct = shard.direct_bytes > shard.buffered_bytes;
  const bool any = shard.direct_bytes + shard.buffered_bytes > 0;
  py::dict d;
  d["reader"] = !any ? "none" : direct ? shard.direct_reader : "pread";
  d["mode"] = !any ? "none" : direct ? "direct" : "buffered";
  d["why"] = shard.why;
  d["direct_bytes"] = shard.direct_bytes;
  d["buffered_bytes"] = shard.buffered_bytes;
  return d;
}

// Unmapping tens of GiB takes its time; other threads may run meanwhile.
struct DeleteWithoutGil {
  void operator()(Engine* engine) const {
    py::gil_scoped_release nogil;
    delete engine;
  }
};
using EngineHolder = std::unique_ptr<Engine, DeleteWithoutGil>;

// A home block as Python gives it: its address, and whether its bytes are there.
using HomeTuple = std::pair<uintptr_t, bool>;

// `before`: a closed or open engine of the same shards, whose device and cache are taken over.
// `ahead`: what was read of them before there was a plan.
EngineHolder make_engine(const PlannedModel& planned, int cuda_index, uintptr_t arena,
                         const std::vector<HomeTuple>& blocks, const std::vector<uintptr_t>& memory,
                         StreamHandle stream, const EngineOptions& options, Engine* before,
                         std::shared_ptr<ReadAhead> ahead) {
  py::gil_scoped_release nogil;
  std::vector<const void*> sources;
  for (const uintptr_t address : memory) sources.push_back(reinterpret_cast<const void*>(address));
  std::vector<HomeMemory> homes;
  for (const auto& [address, loaded] : blocks) {
    homes.push_back({reinterpret_cast<std::byte*>(address), loaded});
  }
  Estate estate;
  if (before) {
    estate = before->hand_over();
  } else {
    estate.device = cuda_index < 0 ? make_host_device() : make_cuda_device(cuda_index);
  }
  estate.ahead = std::move(ahead);
  return EngineHolder(new Engine(planned.spec, planned.plan, std::move(estate),
                                 reinterpret_cast<std::byte*>(arena), std::move(homes),
                                 std::move(sources), stream, options));
}

void register_errors(py::module_& m) {
  static py::handle engine_error =
      py::exception<Error>(m, "EngineError", PyExc_RuntimeError).release();
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const InvalidArgument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const IoError& error) {
      PyErr_SetString(PyExc_OSError, error.what());
    } catch (const TimeoutError& error) {
      PyErr_SetString(PyExc_TimeoutError, error.what());
    } catch (const OutOfMemory& error) {
      PyErr_SetString(PyExc_MemoryError, error.what());
    } catch (const Error& error) {
      PyErr_SetString(engine_error.ptr(), error.what());
    }
  });
}

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
      .def_readwrite("seam_units", &Limits::seam_units)
      .def_readwrite("read_ahead_bytes", &Limits::read_ahead_bytes)
      .def_readwrite("kept_cache", &Limits::kept_cache);

  py::class_<PlannedModel> planned(m, "PlannedModel");
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
  m.def("direct_alignment", &direct_alignment, py::arg("path"));
  m.def("lies_in_memory", &lies_in_memory, py::arg("path"));
  m.def(
      "time_copies",
      [](int cuda_index, uintptr_t target, uint64_t target_bytes, uint64_t source_bytes,
         const std::vector<uint64_t>& sizes) {
        const auto device = cuda_index < 0 ? make_host_device() : make_cuda_device(cuda_index);
        return time_copies(*device, reinterpret_cast<std::byte*>(target), target_bytes,
                           source_bytes, sizes);
      },
      py::arg("cuda_index"), py::arg("target"), py::arg("target_bytes"), py::arg("source_bytes"),
      py::arg("sizes"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "in_page_cache",
      [](int fd, uint64_t offset, uint64_t bytes) { return mostly(cached(fd, offset, bytes)); },
      py::arg("fd"), py::arg("offset"), py::arg("bytes"));
  // Leaves the page cache as it is.
  m.def(
      "read_range",
      [](const std::string& path, uint64_t offset, uint64_t bytes) {
        py::bytes found(nullptr, bytes);
        auto* target = reinterpret_cast<std::byte*>(PyBytes_AS_STRING(found.ptr()));
        py::gil_scoped_release nogil;
        read_range(*Shard::open(path, DirectMode::kOff), offset, bytes, target);
        return found;
      },
      py::arg("path"), py::arg("offset"), py::arg("bytes"));
}

void bind_simulator(py::module_& m) {
  py::class_<Rates>(m, "Rates")
      .def(py::init<>())
      .def_readwrite("disk_bytes_per_s", &Rates::disk_bytes_per_s)
      .def_readwrite("h2d_bytes_per_s", &Rates::h2d_bytes_per_s)
      .def_readwrite("copy_overhead_s", &Rates::copy_overhead_s)
      .def_readwrite("unit_overhead_s", &Rates::unit_overhead_s)
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

void bind_engine(py::module_& m) {
  py::enum_<ReaderChoice>(m, "ReaderChoice")
      .value("auto", ReaderChoice::kAuto)
      .value("uring", ReaderChoice::kUring)
      .value("pread", ReaderChoice::kPread);
  py::enum_<DirectMode>(m, "DirectMode")
      .value("auto", DirectMode::kAuto)
      .value("off", DirectMode::kOff)
      .value("on", DirectMode::kOn);
  py::class_<EngineOptions>(m, "EngineOptions")
      .def(py::init<>())
      .def_readwrite("reader", &EngineOptions::reader)
      .def_readwrite("preferred", &EngineOptions::preferred)
      .def_readwrite("block_bytes", &EngineOptions::block_bytes)
      .def_readwrite("direct", &EngineOptions::direct)
      .def_readwrite("read_threads", &EngineOptions::read_threads)
      .def_readwrite("read_timeout_s", &EngineOptions::read_timeout_s)
      .def_readwrite("poison", &EngineOptions::poison)
      .def_readwrite("verbose", &EngineOptions::verbose);

  const auto nogil = py::call_guard<py::gil_scoped_release>();
  m.def(
      "time_reads",
      [](const std::vector<std::string>& paths,
         const std::vector<std::tuple<uint32_t, uint64_t, uint32_t>>& pieces,
         const std::vector<EngineOptions>& ways, double seconds, uint32_t rounds,
         double most_seconds, uint64_t chunk_bytes) {
        std::vector<ReadSpan> spans;
        for (const auto& [file, offset, bytes] : pieces) spans.push_back({file, offset, bytes});
        return time_reads(paths, spans, ways, seconds, rounds, most_seconds, chunk_bytes);
      },
      py::arg("paths"), py::arg("spans"), py::arg("ways"), py::arg("seconds"),
      py::arg("rounds") = 1, py::arg("most_seconds") = 3600.0,
      py::arg("chunk_bytes") = usual_chunk_bytes(false), nogil);
  m.def("usual_chunk_bytes", &usual_chunk_bytes, py::arg("in_memory"));
  // The context of a GPU takes up to a second to make, and stays while this does.
  py::class_<Device>(m, "Device");
  m.def("open_device", &make_cuda_device, py::arg("cuda_index"), nogil);
  py::class_<ReadAhead, std::shared_ptr<ReadAhead>>(m, "ReadAhead")
      .def(py::init<std::vector<std::string>, const EngineOptions&, uint64_t>(), py::arg("paths"),
           py::arg("options"), py::arg("most_bytes"), nogil)
      .def("stop", &ReadAhead::stop, nogil)
      .def("give_up", &ReadAhead::give_up, nogil)
      .def_property_readonly("held_bytes", &ReadAhead::held_bytes);
  py::class_<Engine, EngineHolder>(m, "Engine")
      .def(py::init(&make_engine), py::arg("planned"), py::arg("cuda_index"), py::arg("arena"),
           py::arg("homes"), py::arg("memory"), py::arg("stream"), py::arg("options"),
           py::arg("before") = nullptr, py::arg("ahead") = nullptr)
      .def(
          "load_resident",
          [](Engine& engine, StreamHandle stream, const py::object& progress) {
            const Engine::Interrupt interrupt = interrupt_with(progress);
            py::gil_scoped_release release;
            engine.load_resident(stream, interrupt);
          },
          py::arg("stream"), py::arg("progress") = py::none())
      .def("begin_pass", &Engine::begin_pass, py::arg("stream"), nogil)
      .def("end_pass", &Engine::end_pass, py::arg("stream"), nogil)
      .def(
          "acquire",
          [](Engine& engine, uint32_t unit, StreamHandle stream) {
            static const Engine::Interrupt interrupt = plain_interrupt();
            return engine.acquire(unit, stream, interrupt);
          },
          py::arg("unit"), py::arg("stream"), nogil)
      .def("release", &Engine::release, py::arg("unit"), py::arg("stream"), nogil)
      .def("discard", &Engine::discard, py::arg("unit"), nogil)
      .def(
          "fetch",
          [](const Engine& engine, uint32_t unit, uint32_t tensor, uintptr_t target) {
            engine.fetch(unit, tensor, reinterpret_cast<std::byte*>(target));
          },
          py::arg("unit"), py::arg("tensor"), py::arg("target"), nogil)
      .def("close", &Engine::close, nogil)
      .def("kept_cache", &Engine::kept_cache, nogil)
      .def_property_readonly("closed", &Engine::closed)
      .def_property_readonly("passes", &Engine::passes)
      .def_property_readonly("warnings", &Engine::warnings)
      .def("totals", [](Engine& engine) { return counts_dict(engine.totals()); })
      .def("last_pass", &last_pass_dict)
      .def("steady_passes", &steady_passes_dict)
      .def(
          "start_trace",
          [](Engine& engine, StreamHandle stream, uint32_t most_records) {
            engine.start_trace(stream, most_records, plain_interrupt());
          },
          py::arg("stream"), py::arg("most_records"), nogil)
      .def(
          "stop_trace", [](Engine& engine) { return engine.stop_trace(plain_interrupt()); }, nogil)
      .def("memory",
           [](const Engine& engine) {
             const MemoryUse use = engine.memory();
             return py::make_tuple(use.host_bytes, use.host_pinned_bytes, use.host_peak_bytes);
           })
      .def("readers", [](const Engine& engine) {
        py::dict readers;
        for (const ShardReport& shard : engine.shards())
          readers[py::str(shard.path)] = shard_dict(shard);
        return readers;
      });
}

}  // namespace

PYBIND11_MODULE(_engine, m) {
  m.doc() = "The C++ engine of wsm_ext. Use the Python package; this module may change.";
  register_errors(m);
  bind_simulator(m);
  bind_plan(m);
  bind_trace(m);
  bind_engine(m);
  m.attr("__version__") = WSM_VERSION;
  m.attr("built_with_cuda") = built_with_cuda();
#ifdef WSM_HAVE_LIBURING
  m.attr("built_with_uring") = true;
#else
  m.attr("built_with_uring") = false;
#endif
}

}  // namespace wsm
