#include "bindings/replacements.h"

#include <Python.h>

#include <utility>

#include "bindings/collected.h"

namespace py = pybind11;

namespace wsm {

void Replacements::put(py::dict target, py::object key, py::object value) {
  PyObject* const found = PyDict_GetItemWithError(target.ptr(), key.ptr());
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  replaced_.push_back({target, key, value, py::reinterpret_borrow<py::object>(found)});
  if (PyDict_SetItem(target.ptr(), key.ptr(), value.ptr()) != 0) {
    replaced_.pop_back();
    throw py::error_already_set();
  }
}

void Replacements::undo() {
  // Whatever is let go of may run Python: that happens when all is back.
  std::vector<Replaced> replaced = std::exchange(replaced_, {});
  for (auto each = replaced.rbegin(); each != replaced.rend(); ++each) {
    PyObject* const now = PyDict_GetItemWithError(each->target.ptr(), each->key.ptr());
    if (now != each->ours.ptr()) continue;
    if (each->found) {
      PyDict_SetItem(each->target.ptr(), each->key.ptr(), each->found.ptr());
    } else {
      PyDict_DelItem(each->target.ptr(), each->key.ptr());
    }
  }
  if (PyErr_Occurred()) throw py::error_already_set();
}

void Replacements::clear() { const std::vector<Replaced> let_go = std::exchange(replaced_, {}); }

int Replacements::traverse(visitproc visit, void* arg) const {
  for (const Replaced& each : replaced_) {
    for (const py::object* object :
         {static_cast<const py::object*>(&each.target), &each.ours, &each.found}) {
      if (!*object) continue;
      if (const int stop = visit(object->ptr(), arg)) return stop;
    }
  }
  return 0;
}

void bind_replacements(py::module_& m) {
  py::class_<Replacements>(m, "Replacements", collected<Replacements>())
      .def(py::init<>())
      .def("put", &Replacements::put, py::arg("target"), py::arg("key"), py::arg("value"))
      .def("undo", &Replacements::undo)
      .def("__len__", &Replacements::size);
}

}  // namespace wsm
