// The Python module `wsm_ext._engine`, put together.
#include <Python.h>

#include <exception>

#include "bindings/bindings.h"
#include "bindings/replacements.h"
#include "bindings/seam.h"
#include "device/device.h"
#include "util/check.h"

#ifndef WSM_VERSION
#define WSM_VERSION "0+unknown"
#endif

namespace py = pybind11;

namespace wsm {
namespace {

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

}  // namespace

PYBIND11_MODULE(_engine, m) {
  m.doc() = "The C++ engine of wsm_ext. Use the Python package; this module may change.";
  register_errors(m);
  bind_simulator(m);
  bind_model(m);
  bind_plan(m);
  bind_trace(m);
  bind_readers(m);
  bind_engine(m);
  bind_replacements(m);
  bind_backward(m);
  bind_seam(m);
  m.attr("__version__") = WSM_VERSION;
  m.attr("built_with_cuda") = built_with_cuda();
#ifdef WSM_HAVE_LIBURING
  m.attr("built_with_uring") = true;
#else
  m.attr("built_with_uring") = false;
#endif
}

}  // namespace wsm
