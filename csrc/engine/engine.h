// The engine: streams a model's units to a device by a plan.
//
//   Engine engine(spec, plan, ...);      opens the shards, pins the memory, starts the conductor
//   engine.load_resident(...);           weights whose home is the device, once
//   engine.begin_pass(stream);
//     engine.acquire(u, stream);         u's place holds its bytes for what `stream` runs next
//     ... forward of u on `stream` ...
//     engine.release(u, stream);         its place may be taken once `stream` gets here
//   engine.end_pass(stream);
//   engine.close();
//
// The host blocks in `acquire` only while reads for the unit are missing; all other order is by
// events. Correct for any order of units: a unit that was not expected is a demand. Acquires are
// counted. Lifecycle: arena and homes are the caller's, and outlive the engine. `close` waits for
// the calls of other threads, the copies and the reads under way; the destructor closes. Use in a
// forked child throws. Thread-safe, `close` and `hand_over` too; but one pass at a time is the
// caller's business. Streams outlive the pass that they were used in.
// Failure: an error of any thread is thrown by the next `acquire`; after it the engine goes on, and
// what failed is read again when it is wanted.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/call_gate.h"
#include "engine/conductor.h"
#include "engine/counters.h"
#include "engine/preload.h"
#include "engine/readers.h"
#include "engine/stall_probes.h"
#include "engine/unit_board.h"
#include "plan/model_spec.h"
#include "plan/plan.h"
#include "util/mutex.h"

namespace wsm {

// Memory as really taken.
struct MemoryUse {
  uint64_t host_bytes = 0;  // now: host cache and staging ring, as mapped; what was read ahead
  uint64_t host_peak_bytes = 0;
  uint64_t host_pinned_bytes = 0;  // of these, page-locked
};

struct ShardReport {
  std::string path;
  std::string direct_reader;
  uint64_t direct_bytes = 0;
  uint64_t buffered_bytes = 0;
  std::string why;  // the reads were direct or buffered, and by this reader
};

struct PassReport {
  double seconds = 0;
  Counts counts;
};

// Sums over passes.
struct PassSums {
  uint64_t passes = 0;
  double seconds = 0;
  Counts counts;
};

// What an engine works with and may take over: from the one before it, or from who read ahead of
// it.
struct Handoff {
  std::shared_ptr<Device> device{};             // a trace that is being read keeps it, too
  std::unique_ptr<HostCache> cache{};           // null: a new one
  KeptCache kept{};                             // what it holds
  std::vector<ShardSpec> shards{};              // that it holds it of
  std::vector<std::unique_ptr<Shard>> files{};  // these, as they were opened
  std::shared_ptr<Preload> preload{};           // null: nothing was read
};

class Engine {
 public:
  // Called now and then while a caller waits, without locks; may throw to give up waiting, and may
  // close the engine.
  using Interrupt = std::function<void()>;

  // `homes`: one for each of the plan's home blocks. `memory[i]`: the bytes of shard i where it
  // lies in RAM, else null. `allocated_on`: the stream on which the arena and the homes were
  // allocated.
  Engine(ModelSpec spec, Plan plan, Handoff handoff, std::byte* arena,
         std::vector<HomeMemory> homes, const std::vector<const void*>& memory,
         StreamHandle allocated_on, EngineOptions options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Loads what has a device home, and returns when `stream` may use it.
  void load_resident(StreamHandle stream, const Interrupt& interrupt);

  // Checks that no file has changed, and recovers what an aborted pass left acquired.
  void begin_pass(StreamHandle stream);
  void end_pass(StreamHandle stream);
  // True when the unit was loaded since it was last acquired.
  bool acquire(uint32_t unit, StreamHandle stream, const Interrupt& interrupt);
  void release(uint32_t unit, StreamHandle stream);
  // For who holds a unit and found its bytes wrong: once it is released, they are dropped from the
  // arena and the host cache, and the next acquire reads them again.
  void discard(uint32_t unit);

  // Copies the image of the unit's tensor (an index into UnitSpec::tensors) into host memory, from
  // the host cache or the shard. Allowed at any time, but not for what is resident as it is.
  void fetch(uint32_t unit, uint32_t tensor, std::byte* target) const;

  // Idempotent: whoever comes second returns when the first has ended.
  void close();
  // What the host cache holds, for `PlanLimits::kept_cache` of the plan that comes after this one.
  // Also after `close`. Throws IoError where a file has changed since.
  KeptCache kept_cache() const;
  // Closes, and gives the device and the host cache to an engine of the same shards. Throws Error
  // where a read has not ended, or the process was forked.
  Handoff hand_over();
  // In a forked child too: the threads are not there, and their locks may be held for good.
  bool closed() const { return gate_.is_shut() || forked(); }

  const Plan& plan() const { return plan_; }
  const ModelSpec& spec() const { return spec_; }
  uint64_t passes() const;
  Counts totals();
  PassReport last_pass(const Interrupt& interrupt);  // waits until the device has ended the pass
  // Of the passes after the first (which fills the host cache) that the device has ended. A pass
  // whose record was taken again before its end was seen is left out.
  PassSums steady_passes();
  // A trace of what happens from now on: `start_trace` waits for `stream`, `stop_trace` until the
  // device has come to its end. The first `most_records` things are kept.
  void start_trace(StreamHandle stream, uint32_t most_records, const Interrupt& interrupt);
  Timeline stop_trace(const Interrupt& interrupt);
  MemoryUse memory() const;
  std::vector<ShardReport> shards() const;
  std::vector<std::string> warnings() const;

 private:
  struct PassRecord {
    std::unique_ptr<Event> begin;
    std::unique_ptr<Event> end;
    Counts counts;       // at the begin; after the end, of the pass
    bool ended = false;  // a pass that failed may never have been
  };
  PassRecord& record_of(uint64_t pass) REQUIRES(reports_mutex_) {
    return records_[pass % records_.size()];
  }
  PassReport report_of(uint64_t pass) REQUIRES(reports_mutex_);
  void sum_ended_passes() REQUIRES(reports_mutex_);

  void open_shards(const std::vector<const void*>& memory);
  void check_same_files(const Handoff& handoff) const;
  bool any_direct() const;
  void tell_refused_files() const;
  std::string choice_without_effect() const;
  bool forked() const { return ::getpid() != process_; }
  void check_process() const;
  void check_inside(const CallGate::Visit& visit) const;
  const char* name_of(uint32_t unit) const;
  void throw_kept_error() REQUIRES(board_.mutex);
  void check_nesting(uint32_t unit) const REQUIRES(board_.mutex);
  uint32_t never_released(uint32_t unit, size_t steps) const REQUIRES(board_.mutex);
  void post_demand(uint32_t unit) REQUIRES(board_.mutex);
  void withdraw_demand(uint32_t unit) REQUIRES(board_.mutex);
  void wait_ready(CallGate::Visit& visit, uint32_t unit, const Interrupt& interrupt)
      REQUIRES(board_.mutex);
  void wait_for_copies(uint32_t unit, StreamHandle stream, bool first);
  void log_acquired(uint32_t unit, bool waited, double waited_ms);
  void tell_conductor() REQUIRES(board_.mutex);
  void recover_holds();
  Event& released_event(UnitState& state, StreamHandle stream) REQUIRES(board_.mutex);
  bool drop_hold(uint32_t unit, StreamHandle stream) REQUIRES(board_.mutex);
  void read(uint32_t shard, uint64_t offset, uint64_t bytes, std::byte* target) const;
  // Nobody else is here any more, and in a forked child the locks may be held for good.
  void abandon_buffers() NO_THREAD_SAFETY_ANALYSIS;

  ModelSpec spec_;
  Plan plan_;
  EngineOptions options_;
  std::shared_ptr<Device> device_;
  std::unique_ptr<HostCache> inherited_;  // until the conductor has it
  mutable UnitBoard board_;
  std::vector<std::unique_ptr<Shard>> shards_;
  std::string choice_without_effect_;
  std::unique_ptr<Conductor> conductor_;
  // What passes and reports share.
  mutable Mutex reports_mutex_ ACQUIRED_BEFORE(board_.mutex);
  std::unique_ptr<StallProbes> probes_ GUARDED_BY(reports_mutex_);
  // Of the last passes: the host may run ahead of the device.
  std::array<PassRecord, 4> records_ GUARDED_BY(reports_mutex_);
  uint64_t passes_ GUARDED_BY(reports_mutex_) = 0;  // begun
  uint64_t passes_ended_ GUARDED_BY(reports_mutex_) = 0;
  PassSums steady_ GUARDED_BY(reports_mutex_);
  uint64_t next_to_sum_ GUARDED_BY(reports_mutex_) = 1;
  pid_t process_ = 0;
  // Every call but `close` is inside while it uses what `hand_over` takes away.
  mutable CallGate gate_;
  mutable Mutex closing_ ACQUIRED_BEFORE(reports_mutex_);
  bool close_ended_ GUARDED_BY(closing_) = false;
  bool abandoned_ = false;  // the destructor must leave the buffers to the process
};

}  // namespace wsm
