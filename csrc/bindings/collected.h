// Lets Python's garbage collector see what a bound class holds, so that cycles through it end.
#pragma once

#include <Python.h>
#include <pybind11/pybind11.h>

namespace wsm {

// For pybind11's class_: `T::traverse` visits what it holds, `T::clear` lets go of it.
template <typename T>
pybind11::custom_type_setup collected() {
  namespace py = pybind11;
  return py::custom_type_setup([](PyHeapTypeObject* heap_type) {
    // Of an object under construction there is nothing to see yet.
    static const auto of = [](PyObject* self) -> T* {
      auto* const instance = reinterpret_cast<py::detail::instance*>(self);
      const bool there = instance->get_value_and_holder().holder_constructed();
      return there ? py::cast<T*>(py::handle(self)) : nullptr;
    };
    PyTypeObject* const type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
      Py_VISIT(Py_TYPE(self));
      T* const object = of(self);
      return object ? object->traverse(visit, arg) : 0;
    };
    type->tp_clear = [](PyObject* self) {
      if (T* const object = of(self)) object->clear();
      return 0;
    };
  });
}

}  // namespace wsm
