// The records of a trace.
#include "engine/trace.h"

#include <pybind11/stl.h>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace wsm {
namespace {

const char* name_of(TraceKind kind) {
  constexpr const char* names[] = {"read", "copy", "forward", "host_wait", "device_wait", "pass"};
  return names[static_cast<int>(kind)];
}

const char* name_of(ReadRoute route) {
  constexpr const char* names[] = {"direct", "buffered", "ahead", "memory"};
  return names[static_cast<int>(route)];
}

const char* name_of(Stall cause) {
  constexpr const char* names[kStallCauses] = {"disk", "h2d", "arena"};
  return names[static_cast<int>(cause)];
}

}  // namespace

void bind_trace(py::module_& m) {
  py::class_<TraceRecord>(m, "TraceRecord")
      .def_property_readonly("kind", [](const TraceRecord& r) { return name_of(r.kind); })
      .def_property_readonly("unit",
                             [](const TraceRecord& r) -> py::object {
                               if (r.unit == kNone) return py::none();
                               return py::int_(r.unit);
                             })
      .def_readonly("begin_ns", &TraceRecord::begin_ns)
      .def_readonly("end_ns", &TraceRecord::end_ns)
      .def_readonly("bytes", &TraceRecord::bytes)
      .def_readonly("shard", &TraceRecord::shard)
      .def_readonly("offset", &TraceRecord::offset)
      .def_readonly("read_bytes", &TraceRecord::read_bytes)
      .def_property_readonly("route", [](const TraceRecord& r) { return name_of(r.route); })
      .def_readonly("cached", &TraceRecord::cached)
      .def_readonly("failed", &TraceRecord::failed)
      .def_property_readonly("cause", [](const TraceRecord& r) { return name_of(r.cause); });
  py::class_<Timeline>(m, "Timeline")
      .def_readonly("records", &Timeline::records)
      .def_readonly("dropped", &Timeline::dropped)
      .def_readonly("full_ns", &Timeline::full_ns)
      .def_readonly("length_ns", &Timeline::length_ns)
      .def_readonly("clock_error_ns", &Timeline::clock_error_ns);
}

}  // namespace wsm
