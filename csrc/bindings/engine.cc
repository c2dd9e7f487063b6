// The engine, and what is begun before there is one.
#include "engine/engine.h"

#include <Python.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "device/device.h"
#include "engine/preload.h"

namespace py = pybind11;

namespace wsm {
namespace {

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

// `before`: a closed or open engine of the same shards, whose device and cache are taken over.
// `preload`: what was read of them before there was a plan.
EngineHolder make_engine(const PlannedModel& planned, int cuda_index, uintptr_t arena,
                         const std::vector<HomeMemory>& homes, const std::vector<uintptr_t>& memory,
                         StreamHandle stream, const EngineOptions& options, Engine* before,
                         std::shared_ptr<Preload> preload) {
  py::gil_scoped_release nogil;
  std::vector<const void*> sources;
  for (const uintptr_t address : memory) sources.push_back(reinterpret_cast<const void*>(address));
  Handoff handoff;
  if (before) {
    handoff = before->hand_over();
  } else {
    handoff.device = cuda_index < 0 ? make_host_device() : make_cuda_device(cuda_index);
  }
  handoff.preload = std::move(preload);
  return EngineHolder(new Engine(planned.spec, planned.plan, std::move(handoff),
                                 reinterpret_cast<std::byte*>(arena), homes, std::move(sources),
                                 stream, options));
}

}  // namespace

// Long: a line or two for each name.
void bind_engine(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  // The context of a GPU takes up to a second to make, and stays while this does.
  py::class_<Device>(m, "Device");
  m.def("open_device", &make_cuda_device, py::arg("cuda_index"), nogil);
  py::class_<Preload, std::shared_ptr<Preload>>(m, "Preload")
      .def(py::init<std::vector<std::string>, const EngineOptions&, uint64_t>(), py::arg("paths"),
           py::arg("options"), py::arg("most_bytes"), nogil)
      .def("stop", &Preload::stop, nogil)
      .def("drop", &Preload::drop, nogil)
      .def_property_readonly("held_bytes", &Preload::held_bytes);
  py::class_<HomeMemory>(m, "HomeMemory")
      .def(py::init([](uintptr_t address, bool loaded) {
             return HomeMemory{reinterpret_cast<std::byte*>(address), loaded};
           }),
           py::arg("address"), py::arg("loaded"));
  py::class_<MemoryUse>(m, "MemoryUse")
      .def_readonly("host_bytes", &MemoryUse::host_bytes)
      .def_readonly("host_pinned_bytes", &MemoryUse::host_pinned_bytes)
      .def_readonly("host_peak_bytes", &MemoryUse::host_peak_bytes);
  py::class_<Engine, EngineHolder>(m, "Engine")
      .def(py::init(&make_engine), py::arg("planned"), py::arg("cuda_index"), py::arg("arena"),
           py::arg("homes"), py::arg("memory"), py::arg("stream"), py::arg("options"),
           py::arg("before") = nullptr, py::arg("preload") = nullptr)
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
      .def("memory", &Engine::memory)
      .def("readers", [](const Engine& engine) {
        py::dict readers;
        for (const ShardReport& shard : engine.shards())
          readers[py::str(shard.path)] = shard_dict(shard);
        return readers;
      });
}

}  // namespace wsm
