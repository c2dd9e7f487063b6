// Values put into dicts of Python, and taken out again by identity.
//
//   replacements.put(dict, key, value);   remembers what was there
//   replacements.undo();                  the last one first: what was there is back
//
// A key that holds something else than what was put there belongs to somebody else by now, and is
// left alone. Each call is one step, which no interrupt can divide: a module is as it was found,
// or all of it is replaced. Under the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace wsm {

class Replacements {
 public:
  void put(pybind11::dict target, pybind11::object key, pybind11::object value);
  void undo();
  size_t size() const { return replaced_.size(); }
  // For Python's garbage collector.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Replaced {
    pybind11::dict target;
    pybind11::object key;
    pybind11::object ours;
    pybind11::object found;  // null: nothing
  };
  std::vector<Replaced> replaced_;
};

void bind_replacements(pybind11::module_& m);

}  // namespace wsm
