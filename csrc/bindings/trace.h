// The classes of a trace, for the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace wsm {

void bind_trace(pybind11::module_& m);

}  // namespace wsm
