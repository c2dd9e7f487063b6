// The model that a plan is made for: the structs of plan/model_spec.h, which Python fills in.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/bindings.h"

namespace py = pybind11;

namespace wsm {

void bind_model(py::module_& m) {
  py::class_<ShardSpec>(m, "ShardSpec")
      .def(py::init<std::string, uint64_t, uint32_t, bool>(), py::arg("path"), py::arg("nbytes"),
           py::arg("alignment") = 1, py::arg("in_memory") = false)
      .def_readonly("path", &ShardSpec::path)
      .def_readonly("nbytes", &ShardSpec::bytes)
      .def_readonly("alignment", &ShardSpec::alignment)
      .def_readonly("in_memory", &ShardSpec::in_memory);
  py::class_<Extent>(m, "Extent")
      .def(py::init<uint32_t, uint64_t, uint64_t, uint64_t>(), py::arg("shard"), py::arg("offset"),
           py::arg("nbytes"), py::arg("tensor_offset") = 0)
      .def_readonly("shard", &Extent::shard)
      .def_readonly("offset", &Extent::offset)
      .def_readonly("nbytes", &Extent::bytes)
      .def_readonly("tensor_offset", &Extent::tensor_offset);
  py::class_<TensorSpec>(m, "TensorSpec")
      .def(py::init<std::string, uint64_t, std::vector<Extent>, uint64_t>(), py::arg("name"),
           py::arg("nbytes"), py::arg("extents"), py::arg("parameter_bytes") = 0)
      .def_readonly("name", &TensorSpec::name)
      .def_readonly("nbytes", &TensorSpec::bytes)
      .def_readonly("extents", &TensorSpec::extents)
      .def_readonly("parameter_bytes", &TensorSpec::parameter_bytes);
  py::class_<UnitSpec>(m, "UnitSpec")
      .def(py::init<std::string, std::string, std::vector<uint32_t>, bool>(), py::arg("name"),
           py::arg("label"), py::arg("tensors"), py::arg("encloses_units") = false)
      .def_readonly("name", &UnitSpec::name)
      .def_readonly("label", &UnitSpec::label)
      .def_readonly("tensors", &UnitSpec::tensors)
      .def_readonly("encloses_units", &UnitSpec::encloses_units);
  py::class_<ModelSpec>(m, "ModelSpec")
      .def(py::init<std::vector<ShardSpec>, std::vector<TensorSpec>, std::vector<UnitSpec>>(),
           py::arg("shards"), py::arg("tensors"), py::arg("units"))
      .def_readonly("shards", &ModelSpec::shards)
      .def_readonly("tensors", &ModelSpec::tensors)
      .def_readonly("units", &ModelSpec::units);
}

}  // namespace wsm
