#include "bindings/seam.h"

#include <Python.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>

#include "util/check.h"
#include "util/steps.h"

namespace py = pybind11;

namespace wsm {

namespace {

constexpr int64_t kAbsentVersion = 0x7FFFFFFF;  // nothing is ever saved at it

void check_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

uint64_t address_of(const py::object& tensor) {
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  PyObject* const address = PyObject_CallMethodNoArgs(tensor.ptr(), name);
  if (!address) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(address).cast<uint64_t>();
}

void put(const ParameterSwap& swap, const py::object& expected, const py::object& value) {
  PyObject* const now = PyDict_GetItemWithError(swap.parameters.ptr(), swap.key.ptr());
  if (now != expected.ptr()) return;  // a user's, or gone
  if (PyDict_SetItem(swap.parameters.ptr(), swap.key.ptr(), value.ptr()) != 0) {
    throw py::error_already_set();
  }
}

}  // namespace

Seam::Guard::Guard(Seam& seam) {
  seam.begin_anew_after_fork();
  lock_ = std::unique_lock(seam.mutex_, std::try_to_lock);
  if (lock_.owns_lock()) return;
  py::gil_scoped_release nogil;
  lock_.lock();
}

Seam::Seam(py::object engine, TorchCalls torch, double turn_limit_s, py::object check_frozen)
    : engine_object_(std::move(engine)),
      engine_(engine_object_.is_none() ? nullptr : engine_object_.cast<Engine*>()),
      torch_(std::move(torch)),
      check_frozen_(std::move(check_frozen)),
      turn_(turn_limit_s) {}

// The mutex may be held by a thread that is not here, in the middle of its pass.
void Seam::begin_anew_after_fork() {
  if (::getpid() == process_) return;
  process_ = ::getpid();
  new (&mutex_) std::recursive_mutex;
  depth_ = 0;
  chains_.clear();
  recover();
}

void Seam::add_unit(uint32_t index, SeamUnit unit) {
  if (units_.size() <= index) units_.resize(index + 1);
  check(!units_[index], "unit ", index, " is there already");
  units_[index] = std::make_unique<SeamUnit>(std::move(unit));
  SeamUnit& added = *units_[index];
  for (ParameterSwap& swap : added.swaps) swap.address = address_of(swap.view);
  added.version = added.memory.attr("_version").cast<int64_t>();
  set_version(added, kAbsentVersion);
}

const SeamUnit& Seam::unit(uint32_t index) const {
  check(index < units_.size() && units_[index], "unit ", index, " does not stream");
  return *units_[index];
}

SeamUnit& Seam::at(uint32_t index) { return const_cast<SeamUnit&>(unit(index)); }

StreamHandle Seam::current_stream() const {
  if (torch_.raw_stream.is_none()) return 0;
  return torch_.raw_stream(torch_.device_index).cast<StreamHandle>();
}

int64_t Seam::current_task() const { return torch_.current_task().cast<int64_t>(); }

void Seam::set_version(SeamUnit& unit, int64_t version) const {
  if (torch_.versions_in_lists) {
    torch_.set_version(py::make_tuple(unit.memory), py::make_tuple(version));
  } else {
    torch_.set_version(unit.memory, version);
  }
}

// -- passes ---------------------------------------------------------------------------------------

void Seam::begin(int64_t task) {
  {
    py::gil_scoped_release nogil;
    turn_.acquire(task, check_signals);
  }
  try {
    const Guard guard(*this);
    if (depth_ == 0) {
      recover();
      const StreamHandle stream = current_stream();
      py::gil_scoped_release nogil;
      if (engine_) engine_->begin_pass(stream);
    }
    ++depth_;
  } catch (...) {
    turn_.release();
    throw;
  }
}

void Seam::end() {
  Steps steps;
  steps.run([&] {
    const Guard guard(*this);
    if (--depth_ > 0) return;
    const StreamHandle stream = current_stream();
    py::gil_scoped_release nogil;
    if (engine_) engine_->end_pass(stream);
  });
  turn_.release();
  steps.rethrow();
}

// Nothing is in use where no pass is under way: what a pass left behind, should there be a way to
// do so, is none of the next one's.
void Seam::recover() {
  active_.clear();
  lent_.clear();
  lingering_.reset();
  held_.clear();
  for (const auto& unit : units_) {
    if (!unit || unit->acquired == 0) continue;
    unit->acquired = 0;
    set_version(*unit, kAbsentVersion);
    for (const ParameterSwap& swap : unit->swaps) put(swap, swap.placed, swap.absent);
  }
}

void Seam::enter_pass() { begin(current_task()); }

void Seam::leave_pass() {
  Steps steps;
  steps.run([&] {
    const Guard guard(*this);
    let_go_of_lingering();
  });
  steps.run([&] { end(); });
  steps.rethrow();
}

void Seam::acquire_turn() {
  const int64_t task = current_task();
  py::gil_scoped_release nogil;
  turn_.acquire(task, check_signals);
}

void Seam::release_turn() { turn_.release(); }

bool Seam::inside() const { return depth_ > 0 && turn_.mine(current_task()); }

bool Seam::idle() const {
  const bool used = std::any_of(units_.begin(), units_.end(),
                                [](const auto& unit) { return unit && unit->acquired > 0; });
  return depth_ == 0 && !used && turn_.free() && active_.empty() && lent_.empty() &&
         held_.empty() && chains_.empty() && !lingering_;
}

// -- units ----------------------------------------------------------------------------------------

void Seam::enter_unit(uint32_t unit, StreamHandle* stream) {
  const int64_t task = current_task();
  begin(task);
  try {
    const Guard guard(*this);
    let_go_of_lingering();
    if (task != kNoTask) {  // a forward that runs inside a backward
      join(task);
      make_way(unit);
    }
    *stream = current_stream();
    acquire(unit, *stream);
    active_.push_back(unit);
  } catch (...) {
    Steps quietly;
    quietly.run([&] { end(); });
    throw;
  }
}

void Seam::leave_unit(uint32_t unit, StreamHandle stream) {
  Steps steps;
  {
    const Guard guard(*this);
    active_.pop_back();
    if (!chains_.empty()) steps.run([&] { keep(unit); });
    steps.run([&] { release(unit, stream); });
    steps.run([&] { resume(active_); });
    steps.run([&] { let_go_of_lingering(); });
  }
  steps.run([&] { end(); });
  steps.rethrow();
}

void Seam::acquire(uint32_t index, StreamHandle stream) {
  SeamUnit& unit = at(index);
  bool loaded = false;
  if (engine_) {
    py::gil_scoped_release nogil;
    loaded = engine_->acquire(index, stream, check_signals);
  }
  if (loaded) unit.arrived = false;
  try {
    if (unit.acquired == 0) {
      // What arrives is made anew at each acquire: whether it was loaded tells who checks it.
      if (!unit.arrive.is_none()) unit.arrive(!unit.arrived);
      unit.arrived = true;
      set_version(unit, unit.version);
    }
    for (const ParameterSwap& swap : unit.swaps) put(swap, swap.absent, swap.placed);
    ++unit.acquired;
  } catch (...) {
    Steps quietly;
    quietly.run([&] {
      py::gil_scoped_release nogil;
      if (engine_) engine_->release(index, stream);
    });
    throw;
  }
}

void Seam::release(uint32_t index, StreamHandle stream) {
  SeamUnit& unit = at(index);
  Changes changes;
  if (unit.acquired > 0 && --unit.acquired == 0 && unit.memory) {
    const int64_t version = unit.memory.attr("_version").cast<int64_t>();
    for (const ParameterSwap& swap : unit.swaps) put(swap, swap.placed, swap.absent);
    changes = take_back(unit, version != unit.version);
    unit.version = unit.memory.attr("_version").cast<int64_t>();
    set_version(unit, kAbsentVersion);
  }
  if (engine_) {
    py::gil_scoped_release nogil;
    if (changes.written && !engine_->closed()) engine_->discard(index);
    engine_->release(index, stream);
  }
  check<Error>(!changes.lost, "a streamed weight of unit '", unit.name,
               "' was written to, or given other data, during its forward: what is streamed again "
               "next time are the checkpoint's bytes, and the change would be lost. Set a "
               "parameter of your own "
               "in its stead (module.weight = torch.nn.Parameter(...)), which is used as it is");
}

// Points parameters that were pointed elsewhere to the arena again. A write into the arena moves
// its version; a parameter that is pointed elsewhere may move it, too.
Seam::Changes Seam::take_back(const SeamUnit& unit, bool version_moved) const {
  bool moved = false, same = true;
  for (const ParameterSwap& swap : unit.swaps) {
    if (address_of(swap.placed) == swap.address) continue;
    moved = true;
    const py::object now = swap.placed.attr("data");
    same = same && torch_.equal(now, swap.view).cast<bool>();
    swap.placed.attr("data") = swap.view;
  }
  return {.lost = !same || (version_moved && !moved), .written = version_moved && !moved};
}

bool Seam::enter_lend(uint32_t unit, StreamHandle* stream) {
  const int64_t task = current_task();
  if (task != kNoTask) join(task);
  const Guard guard(*this);
  std::vector<uint32_t> others = active_;
  others.insert(others.end(), lent_.begin(), lent_.end());
  if (any_overlaps(unit, others) || any_overlaps(unit, held_units())) return false;
  if (lingering_ && at(unit).overlaps(at(lingering_->unit))) let_go_of_lingering();
  *stream = current_stream();
  acquire(unit, *stream);
  lent_.push_back(unit);
  return true;
}

void Seam::leave_lend(uint32_t unit, StreamHandle stream) {
  const Guard guard(*this);
  const auto lent = std::find(lent_.rbegin(), lent_.rend(), unit);
  if (lent != lent_.rend()) lent_.erase(std::next(lent).base());
  Steps steps;
  steps.run([&] { let_go_of_lingering(); });
  lingering_ = Held{unit, stream};
  steps.rethrow();
}

void Seam::let_go_of_lingering() {
  if (!lingering_) return;
  const Held lingering = *lingering_;
  lingering_.reset();
  release(lingering.unit, lingering.stream);
}

// -- the end --------------------------------------------------------------------------------------

void Seam::dissolve() {
  const Guard guard(*this);
  dissolved_ = true;
  for (const auto& unit : units_) {
    if (!unit) continue;
    if (unit->acquired > 0) {
      for (const ParameterSwap& swap : unit->swaps) put(swap, swap.placed, swap.absent);
    }
    // What these let go of may run Python, which must not find them half gone.
    std::vector<ParameterSwap> swaps = std::exchange(unit->swaps, {});
    py::object memory = std::exchange(unit->memory, py::object());
    py::object arrive = std::exchange(unit->arrive, py::none());
  }
  engine_ = nullptr;
  const py::object engine = std::exchange(engine_object_, py::none());
  const py::object check_frozen = std::exchange(check_frozen_, py::none());
}

int Seam::traverse(visitproc visit, void* arg) {
  const auto see = [&](const py::object& object) { return object ? visit(object.ptr(), arg) : 0; };
  for (const py::object* object : {&engine_object_, &check_frozen_}) {
    if (const int stop = see(*object)) return stop;
  }
  for (const auto& unit : units_) {
    if (!unit) continue;
    for (const py::object* object : {&unit->memory, &unit->arrive}) {
      if (const int stop = see(*object)) return stop;
    }
    for (const ParameterSwap& swap : unit->swaps) {
      for (const py::object* object : {static_cast<const py::object*>(&swap.parameters),
                                       &swap.placed, &swap.view, &swap.absent}) {
        if (const int stop = see(*object)) return stop;
      }
    }
  }
  return 0;
}

}  // namespace wsm
