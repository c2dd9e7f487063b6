// What a backward holds. Its weights are streamed again, in the order in which its nodes run.
//
// What autograd saves of a streamed parameter is a view of the arena. Its address never changes, so
// all that a backward needs is the unit's bytes in their place while the unit's nodes run:
//
//   forward of u   makes the nodes a, b, c; u is released
//   backward       u is acquired | c | b | a | u is released, the unit before it is acquired | ...
//
// - Whatever a unit's forward gives was made by a node; a hook before that node acquires the unit.
// - Of the nodes that are ready, autograd runs the one that was made last. So when the nodes of
//   another unit begin, those of the one before have all run.
// - A forward that runs inside a backward (gradient checkpointing) may need the place of a unit
//   that is held for nodes. It gets it, and the unit is acquired again when that forward has ended.
// - Should a node run all the same while its unit is not there, autograd says so: the version of
//   what it has saved is wrong then. Only what hooks have packed escapes that check.
#include <Python.h>

#include <algorithm>

#include "bindings/seam.h"
#include "util/check.h"
#include "util/steps.h"

namespace py = pybind11;

namespace wsm {

namespace {

bool contains(const std::vector<uint32_t>& units, uint32_t unit) {
  return std::find(units.begin(), units.end(), unit) != units.end();
}

[[noreturn]] void refuse_closed() {
  throw Error(
      "the streamed module was closed or resized between a forward and its backward; run "
      "the forward again");
}

// Called at the end of a backward. One that fails lets go of it instead.
class BackwardEnd {
 public:
  BackwardEnd(std::shared_ptr<Seam> seam, int64_t task) : seam_(std::move(seam)), task_(task) {}
  BackwardEnd(const BackwardEnd&) = delete;
  BackwardEnd& operator=(const BackwardEnd&) = delete;
  ~BackwardEnd() {
    Steps quietly;  // what has failed here has failed the backward before
    quietly.run([&] { seam_->end_backward(task_); });
  }
  void operator()() { seam_->end_backward(task_); }

 private:
  std::shared_ptr<Seam> seam_;
  int64_t task_;
};

// A hook before nodes. It does not keep the seam: who closes the model frees it.
class BeforeNodes {
 public:
  BeforeNodes(std::weak_ptr<Seam> seam, std::vector<uint32_t> chain)
      : seam_(std::move(seam)), chain_(std::move(chain)) {}
  void operator()(const py::args&) const {
    const std::shared_ptr<Seam> seam = seam_.lock();
    if (!seam) refuse_closed();
    seam->before_nodes(chain_);
  }

 private:
  std::weak_ptr<Seam> seam_;
  std::vector<uint32_t> chain_;
};

}  // namespace

void Seam::before_nodes(const std::vector<uint32_t>& chain) {
  // torch.func's gradients record theirs always, for those who want a second one. Who does so finds
  // that what was saved here has another version.
  check<Error>(!torch_.is_grad_enabled().cast<bool>() || !torch_.functorch_level().is_none(),
               "create_graph=True: a second derivative through the streamed unit '",
               unit(chain.back()).name,
               "' is not supported. Close the streamed module first, or keep the module resident");
  const int64_t task = current_task();
  join(task);
  const Guard guard(*this);
  let_go_of_lingering();
  for (Chain& known : chains_) {
    if (known.task == task) known.units = chain;
  }
  let_go_of_all_but(wanted());
  for (const uint32_t unit : chain) {
    if (holds(unit)) continue;
    make_way(unit);
    hold(unit);
  }
}

// Enters the backward of this thread as a pass, unless it is one.
void Seam::join(int64_t task) {
  if (dissolved_) refuse_closed();
  {
    const Guard guard(*this);
    if (knows(task)) return;
  }
  begin(task);
  const Guard guard(*this);
  turn_.adopt(task);
  chains_.push_back({task, {}});
  try {
    if (!check_frozen_.is_none()) check_frozen_();
    torch_.queue_callback(py::cast(std::make_unique<BackwardEnd>(shared_from_this(), task)));
  } catch (...) {
    Steps quietly;
    quietly.run([&] { end_backward(task); });
    throw;
  }
}

void Seam::end_backward(int64_t task) {
  Steps steps;
  {
    const Guard guard(*this);
    if (!knows(task)) return;
    std::erase_if(chains_, [&](const Chain& chain) { return chain.task == task; });
    steps.run([&] { let_go_of_lingering(); });
    steps.run([&] { let_go_of_all_but(wanted()); });
    steps.run([&] { resume({}); });  // for a backward that this one ran inside of
    turn_.disown(task);
  }
  steps.run([&] { end(); });
  steps.rethrow();
}

// Holds the unit of a forward that ends now, for nodes that were not announced: those of a
// checkpoint whose values left it by another way than its outputs.
void Seam::keep(uint32_t unit) {
  const std::vector<uint32_t> needed = wanted();
  let_go_of_all_but(needed);
  if (!contains(needed, unit) && !holds(unit) && !any_overlaps(unit, needed)) hold(unit);
}

// Acquires again what nodes need, beside the units whose forwards run.
void Seam::resume(const std::vector<uint32_t>& beside) {
  if (chains_.empty()) return;
  const std::vector<uint32_t> needed = wanted();
  for (auto unit = needed.rbegin(); unit != needed.rend(); ++unit) {
    if (holds(*unit) || any_overlaps(*unit, beside)) continue;
    std::vector<uint32_t> nearer = held_units();
    std::erase_if(nearer, [&](uint32_t held) { return !contains(needed, held); });
    if (any_overlaps(*unit, nearer)) continue;
    make_way(*unit);
    hold(*unit);
  }
}

std::vector<uint32_t> Seam::wanted() const {
  std::vector<uint32_t> units;
  for (const Chain& chain : chains_) {
    for (const uint32_t unit : chain.units) {
      if (!contains(units, unit)) units.push_back(unit);
    }
  }
  return units;
}

std::vector<uint32_t> Seam::held_units() const {
  std::vector<uint32_t> units;
  for (const Held& held : held_) units.push_back(held.unit);
  return units;
}

bool Seam::knows(int64_t task) const {
  return std::any_of(chains_.begin(), chains_.end(),
                     [&](const Chain& chain) { return chain.task == task; });
}

bool Seam::holds(uint32_t unit) const { return contains(held_units(), unit); }

bool Seam::any_overlaps(uint32_t index, const std::vector<uint32_t>& others) const {
  return std::any_of(others.begin(), others.end(),
                     [&](uint32_t other) { return unit(index).overlaps(unit(other)); });
}

void Seam::make_way(uint32_t index) {
  for (const uint32_t held : held_units()) {
    if (unit(index).overlaps(unit(held))) let_go(held);
  }
}

void Seam::let_go_of_all_but(const std::vector<uint32_t>& needed) {
  for (const uint32_t held : held_units()) {
    if (!contains(needed, held)) let_go(held);
  }
}

void Seam::hold(uint32_t unit) {
  const StreamHandle stream = current_stream();
  acquire(unit, stream);
  held_.push_back({unit, stream});
}

// On the stream of its nodes: the end of a backward may run on another one.
void Seam::let_go(uint32_t unit) {
  const auto held =
      std::find_if(held_.begin(), held_.end(), [&](const Held& each) { return each.unit == unit; });
  const StreamHandle stream = held->stream;
  held_.erase(held);
  release(unit, stream);
}

void bind_backward(py::module_& m) {
  py::class_<BackwardEnd>(m, "BackwardEnd").def("__call__", &BackwardEnd::operator());
  py::class_<BeforeNodes>(m, "BeforeNodes").def("__call__", &BeforeNodes::operator());
}

py::object Seam::hook_of(const std::vector<uint32_t>& chain) {
  return py::cast(BeforeNodes(weak_from_this(), chain));
}

}  // namespace wsm
