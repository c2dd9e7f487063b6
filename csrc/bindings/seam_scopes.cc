// The seam's scopes, as Python's `with` enters and leaves them. Each is made for one entry.
#include <Python.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/collected.h"
#include "bindings/seam.h"

namespace py = pybind11;

namespace wsm {

namespace {

struct UnitScope {
  std::shared_ptr<Seam> seam;
  uint32_t unit;
  StreamHandle stream = 0;

  void enter() { seam->enter_unit(unit, &stream); }
  void leave(const py::args&) { seam->leave_unit(unit, stream); }
};

struct PassScope {
  std::shared_ptr<Seam> seam;

  void enter() { seam->enter_pass(); }
  void leave(const py::args&) { seam->leave_pass(); }
};

struct LendScope {
  std::shared_ptr<Seam> seam;
  uint32_t unit;
  StreamHandle stream = 0;
  bool lent = false;

  bool enter() { return lent = seam->enter_lend(unit, &stream); }
  void leave(const py::args&) {
    if (lent) seam->leave_lend(unit, stream);
  }
};

struct TurnScope {
  std::shared_ptr<Seam> seam;

  void enter() { seam->acquire_turn(); }
  void leave(const py::args&) { seam->release_turn(); }
};

template <typename Scope>
void bind_scope(py::module_& m, const char* name) {
  py::class_<Scope>(m, name).def("__enter__", &Scope::enter).def("__exit__", &Scope::leave);
}

void add_unit(Seam& seam, uint32_t index, std::string name, const UnitPlace& place,
              std::vector<ParameterSwap> swaps, py::object memory, py::object arrive) {
  seam.add_unit(index, {.name = std::move(name),
                        .begin = place.offset,
                        .end = place.offset + place.bytes,
                        .swaps = std::move(swaps),
                        .memory = std::move(memory),
                        .arrive = std::move(arrive)});
}

}  // namespace

void bind_seam(py::module_& m) {
  bind_scope<UnitScope>(m, "UnitScope");
  bind_scope<PassScope>(m, "PassScope");
  bind_scope<LendScope>(m, "LendScope");
  bind_scope<TurnScope>(m, "TurnScope");
  py::class_<ParameterSwap>(m, "ParameterSwap")
      .def(py::init<py::dict, py::object, py::object, py::object, py::object>(),
           py::arg("parameters"), py::arg("key"), py::arg("placed"), py::arg("view"),
           py::arg("absent"));
  py::class_<TorchCalls>(m, "TorchCalls")
      .def(py::init<>())
      .def_readwrite("set_version", &TorchCalls::set_version)
      .def_readwrite("versions_in_lists", &TorchCalls::versions_in_lists)
      .def_readwrite("current_task", &TorchCalls::current_task)
      .def_readwrite("is_grad_enabled", &TorchCalls::is_grad_enabled)
      .def_readwrite("equal", &TorchCalls::equal)
      .def_readwrite("functorch_level", &TorchCalls::functorch_level)
      .def_readwrite("queue_callback", &TorchCalls::queue_callback)
      .def_readwrite("raw_stream", &TorchCalls::raw_stream)
      .def_readwrite("device_index", &TorchCalls::device_index);
  py::class_<Seam, std::shared_ptr<Seam>>(m, "Seam", collected<Seam>())
      .def(py::init<py::object, TorchCalls, double, py::object>(), py::arg("engine"),
           py::arg("torch"), py::arg("turn_limit_s"), py::arg("check_frozen"))
      .def("add_unit", &add_unit, py::arg("index"), py::arg("name"), py::arg("place"),
           py::arg("swaps"), py::arg("memory"), py::arg("arrive"))
      .def("unit",
           [](const std::shared_ptr<Seam>& seam, uint32_t unit) { return UnitScope{seam, unit}; })
      .def("pass_scope", [](const std::shared_ptr<Seam>& seam) { return PassScope{seam}; })
      .def("lend",
           [](const std::shared_ptr<Seam>& seam, uint32_t unit) { return LendScope{seam, unit}; })
      .def("between", [](const std::shared_ptr<Seam>& seam) { return TurnScope{seam}; })
      .def("hook_of", &Seam::hook_of, py::arg("chain"))
      .def("dissolve", &Seam::dissolve)
      .def_property_readonly("inside", &Seam::inside)
      .def_property_readonly("idle", &Seam::idle)
      .def_property_readonly("depth", &Seam::depth)
      .def_property_readonly("dissolved", &Seam::dissolved)
      .def_property_readonly("backward_under_way", &Seam::backward_under_way)
      .def_property_readonly("active", [](const Seam& seam) { return seam.active(); });
}

}  // namespace wsm
