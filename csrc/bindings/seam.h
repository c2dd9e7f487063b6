// The seam between the engine and a module: what stands in the module's parameter slots, and when.
//
//   with seam.unit(u):       a forward of u: enters the pass, acquires u, puts its parameters in
//   with seam.pass_scope():  a forward around units: enters the pass
//   with seam.lend(u):       an operation on a parameter of u outside of u's forward
//   with seam.between():     no other thread is in a pass meanwhile
//   seam.before_nodes(c)     a hook for autograd's nodes: acquires the units of c for a backward
//
// Why in C++: an interrupt (Ctrl-C, an exception set by another thread) may come between any two
// steps of Python, but only there. Each scope is entered and left in one step, so the state of a
// pass is never left half changed; an entry that fails takes back what it has done. What is called
// on the way out runs no Python: it cannot be interrupted, nor can an interrupt be lost in it.
//
// Parameters go in and out by identity. A slot that holds something that is not ours, because a
// user has set it, is left alone; when ours is back in it, it streams again.
//
// What autograd has saved of a unit's parameters can be used only while the unit is acquired: at
// all other times their version is another one, and autograd compares versions before it uses a
// tensor. A version that moved during a forward means that somebody wrote into a parameter: the
// bytes are dropped, and leaving the scope raises. A parameter that was pointed elsewhere, as
// torch's recurrent modules do to join their weights in one piece of memory, is pointed back. If it
// had other values there, leaving the scope raises, too.
//
// Lifecycle: a session's; used until `dissolve`, which empties it. It is visible to the garbage
// collector. Thread-safe: a pass belongs to one thread, or to a backward with all of its threads;
// others wait for their turn. The GIL is never held while waiting.
#pragma once

#include <pybind11/pybind11.h>
#include <sys/types.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "seam/turn.h"

namespace wsm {

// A slot of a module: the dict that holds it, its key, and what is there by turns.
struct ParameterSwap {
  pybind11::dict parameters;
  pybind11::object key;
  pybind11::object placed;  // over the arena: while the unit is acquired
  pybind11::object view;    // where `placed` points to
  pybind11::object absent;  // the placeholder: at all other times
  uint64_t address = 0;     // of the view
};

// What torch has that the seam uses. All are built-in functions: they run no Python.
struct TorchCalls {
  pybind11::object set_version;   // _unsafe_set_version_counter
  bool versions_in_lists = true;  // its arguments, since torch 2.6
  pybind11::object current_task;  // the backward of this thread; -1 outside of all
  pybind11::object is_grad_enabled;
  pybind11::object equal;            // of two tensors
  pybind11::object functorch_level;  // None outside of its transforms
  pybind11::object queue_callback;   // at the end of the backward of this thread
  pybind11::object raw_stream;       // None: stream 0, always
  int device_index = 0;
};

struct SeamUnit {
  std::string name;
  uint64_t begin = 0, end = 0;  // its place in the arena
  std::vector<ParameterSwap> swaps;
  pybind11::object memory;  // the parameters are views of it, and share its version
  pybind11::object arrive;  // called with `loaded` when the unit has come; None: nothing to do
  int64_t version = 0;      // of the memory while the unit is there
  uint32_t acquired = 0;
  bool arrived = false;  // `arrive` has ended since the unit was last acquired by the first holder

  bool overlaps(const SeamUnit& other) const {
    return this != &other && begin < other.end && other.begin < end;
  }
};

class Seam : public std::enable_shared_from_this<Seam> {
 public:
  // `engine`: a Python Engine, or None: every unit is always there. `check_frozen` is called when
  // a backward begins, and may raise.
  Seam(pybind11::object engine, TorchCalls torch, double turn_limit_s,
       pybind11::object check_frozen);

  void add_unit(uint32_t index, SeamUnit unit);
  const SeamUnit& unit(uint32_t index) const;

  // Each is one step: it throws and leaves all as it was, or it has done everything.
  void enter_unit(uint32_t unit, StreamHandle* stream);
  void enter_pass();
  // False where the unit cannot be there beside those that are: nothing was done.
  bool enter_lend(uint32_t unit, StreamHandle* stream);
  void acquire_turn();
  // Each does all of its steps, whatever fails, and then throws what failed first.
  void leave_unit(uint32_t unit, StreamHandle stream);
  void leave_pass();
  void leave_lend(uint32_t unit, StreamHandle stream);
  void release_turn();

  // A backward: see seam_backward.cc. The hook for nodes that need the units of `chain`.
  pybind11::object hook_of(const std::vector<uint32_t>& chain);
  void before_nodes(const std::vector<uint32_t>& chain);
  void end_backward(int64_t task);

  bool inside() const;  // whether this thread is in the middle of a pass
  bool idle() const;    // no pass, no unit in use, nobody's turn
  uint32_t depth() const { return depth_; }
  bool dissolved() const { return dissolved_; }
  bool backward_under_way() const { return !chains_.empty(); }
  const std::vector<uint32_t>& active() const { return active_; }

  // Placeholders are in the slots, and no unit comes any more.
  void dissolve();
  // For Python's garbage collector.
  int traverse(visitproc visit, void* arg);
  void clear() { dissolve(); }

 private:
  struct Changes {
    bool lost = false;     // to parameters, in a forward
    bool written = false;  // the bytes in the arena are others now
  };
  struct Chain {
    int64_t task;
    std::vector<uint32_t> units;  // those whose nodes run, each inside the one before it
  };
  struct Held {
    uint32_t unit;
    StreamHandle stream;
  };
  // One thread at a time, waiting without the GIL. The turn is acquired before, never inside.
  class Guard {
   public:
    explicit Guard(Seam& seam);

   private:
    std::unique_lock<std::recursive_mutex> lock_;
  };

  StreamHandle current_stream() const;
  int64_t current_task() const;
  SeamUnit& at(uint32_t index);
  void set_version(SeamUnit& unit, int64_t version) const;
  Changes take_back(const SeamUnit& unit, bool version_moved) const;

  void begin_anew_after_fork();
  void begin(int64_t task);
  void end();
  void recover();
  void acquire(uint32_t unit, StreamHandle stream);
  void release(uint32_t unit, StreamHandle stream);
  void let_go_of_lingering();

  void join(int64_t task);
  void hold(uint32_t unit);
  void let_go(uint32_t unit);
  void let_go_of_all_but(const std::vector<uint32_t>& wanted);
  void make_way(uint32_t unit);
  void keep(uint32_t unit);
  void resume(const std::vector<uint32_t>& beside);
  bool any_overlaps(uint32_t unit, const std::vector<uint32_t>& others) const;
  bool knows(int64_t task) const;
  bool holds(uint32_t unit) const;
  std::vector<uint32_t> wanted() const;
  std::vector<uint32_t> held_units() const;

  pybind11::object engine_object_;  // keeps it alive
  Engine* engine_;
  TorchCalls torch_;
  pybind11::object check_frozen_;
  Turn turn_;
  pid_t process_ = ::getpid();
  std::recursive_mutex mutex_;  // of all below: two threads of one backward may be here
  std::vector<std::unique_ptr<SeamUnit>> units_;  // by index; null: it does not stream
  uint32_t depth_ = 0;
  std::vector<uint32_t> active_;   // units whose forwards run, outermost first
  std::vector<uint32_t> lent_;     // units that operations on placeholders use now
  std::optional<Held> lingering_;  // the one used so last: it stays until another one is used
  std::vector<Chain> chains_;      // by backward, outermost first
  std::vector<Held> held_;         // for nodes
  bool dissolved_ = false;
};

void bind_seam(pybind11::module_& m);
void bind_backward(pybind11::module_& m);

}  // namespace wsm
