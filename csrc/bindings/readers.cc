// How files are read, and what the disk and the link give.
#include <Python.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "device/device.h"
#include "engine/engine.h"
#include "engine/time_reads.h"
#include "memory/time_copies.h"
#include "storage/block_read.h"
#include "storage/page_cache.h"
#include "storage/shard.h"

namespace py = pybind11;

namespace wsm {

void bind_readers(py::module_& m) {
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
      "read_extent",
      [](const std::string& path, uint64_t offset, uint64_t bytes) {
        py::bytes found(nullptr, bytes);
        auto* target = reinterpret_cast<std::byte*>(PyBytes_AS_STRING(found.ptr()));
        py::gil_scoped_release nogil;
        read_extent(*Shard::open(path, DirectMode::kOff), offset, bytes, target);
        return found;
      },
      py::arg("path"), py::arg("offset"), py::arg("bytes"));
  py::class_<FileExtent>(m, "FileExtent")
      .def(py::init<uint32_t, uint64_t, uint32_t>(), py::arg("file"), py::arg("offset"),
           py::arg("nbytes"))
      .def_readonly("file", &FileExtent::file)
      .def_readonly("offset", &FileExtent::offset)
      .def_readonly("nbytes", &FileExtent::bytes);
  m.def("time_reads", &time_reads, py::arg("paths"), py::arg("extents"), py::arg("methods"),
        py::arg("seconds"), py::arg("rounds") = 1, py::arg("most_seconds") = 3600.0,
        py::arg("chunk_bytes") = usual_chunk_bytes(false),
        py::call_guard<py::gil_scoped_release>());
  m.def("usual_chunk_bytes", &usual_chunk_bytes, py::arg("in_memory"));
}

}  // namespace wsm
