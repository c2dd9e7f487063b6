// The conductor: one thread that owns the schedule. It reaps completed reads, recycles slots whose
// copies are done, enqueues copies, issues the next reads, and sleeps.
//
// Demands (units that acquires wait for) come first, the oldest before the others; then the units
// expected next, in order. Copies go
// unit by unit: the next unit's are enqueued only when the last one's all are, so none is delayed
// by a later one. Reads run ahead of the copies as far as slots (or places in the host cache) and
// the window reach.
//
// Why it cannot hang: a demand may take the last slot, may discard what was read into others, and
// may drop units from its place, unless an older demand is for them. So the oldest is always
// served. Only units that are held now keep their places. A demand for such a place is left alone
// until it is free, and the engine posts none whose holder waits for it. A demand ends in an error
// that names the unit, the file and the offset when nothing has moved for `read_timeout_s`.
//
// Lifecycle: the thread starts in `start` and ends in `stop`, which lets the reads under way
// finish. Failure: a failed read is kept on the board for the next acquire; until that has thrown
// it, no new reads are issued. Anything thrown here (a device error, say) is kept likewise and ends
// the schedule: every later acquire throws it.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "device/device.h"
#include "engine/copy_run.h"
#include "engine/preload.h"
#include "engine/readers.h"
#include "engine/unit_board.h"
#include "engine/waker.h"
#include "memory/host_cache.h"
#include "memory/staging_ring.h"
#include "plan/model_spec.h"
#include "plan/plan.h"
#include "util/check.h"

namespace wsm {

// Bytes read from one shard, by their route.
struct ShardUse {
  std::atomic<uint64_t> direct_bytes{0};
  std::atomic<uint64_t> buffered_bytes{0};  // through the page cache, or from RAM
};

struct ConductorOptions {
  bool poison = false;  // tests: overwrite a place as soon as its unit is released
  bool verbose = false;
  double read_timeout_s = 30;
};

// A home block's memory.
struct HomeMemory {
  std::byte* data = nullptr;
  bool loaded = false;  // its bytes are there already
};

class Conductor {
 public:
  Conductor(const ModelSpec& spec, const Plan& plan, Device& device, UnitBoard& board,
            std::vector<std::unique_ptr<Shard>>& shards, Readers readers, std::byte* arena,
            std::vector<HomeMemory> homes, std::unique_ptr<HostCache> cache_before,
            const KeptCache& kept, std::shared_ptr<Preload> preload, ConductorOptions options);
  ~Conductor();

  void start();
  // False where a read would not end within the time limit: its buffers must then be leaked.
  bool stop();
  void wake() { waker_.wake(); }

  const HostCache& cache() const { return *cache_; }
  std::unique_ptr<HostCache> release_cache() { return std::move(cache_); }  // once it was stopped
  const StagingRing& ring() const { return *ring_; }
  const Readers& readers() const { return readers_; }
  const ShardUse& use_of(uint32_t shard) const { return uses_[shard]; }
  // What was read ahead: taken now, and at the start, when it was most.
  uint64_t preload_bytes() const { return preload_bytes_; }
  uint64_t preload_peak_bytes() const { return preload_peak_bytes_; }
  // Any thread: the host bytes of a chunk, where it lies in the cache; else null.
  const std::byte* cached(uint32_t chunk) const EXCLUDES(board_.mutex);
  // Any thread: what the host cache holds.
  KeptCache kept_cache() const EXCLUDES(board_.mutex);
  // The first streamed chunk of a unit and how many; the resident load is the unit after the last.
  std::pair<uint32_t, uint32_t> chunks_of(uint32_t unit) const;
  bool overlap(uint32_t a, uint32_t b) const;
  const char* name_of(uint32_t unit) const {
    return is_resident_load(unit) ? "(resident weights)" : spec_.units[unit].name.c_str();
  }
  // What the last acquire that had to wait was waiting for.
  Stall last_stall() const { return stall_cause_; }

 private:
  using Clock = std::chrono::steady_clock;

  enum class ChunkPhase : uint8_t { kIdle, kReading, kFilled };
  struct ChunkState {
    ChunkPhase phase = ChunkPhase::kIdle;
    bool copied = false;      // in the present load of its unit
    uint32_t slot = kNoSlot;  // while reading or filled, for chunks that pass through one
  };
  struct UnitWork {
    uint32_t left = 0;            // chunks not yet copied in the present load
    uint32_t first_uncopied = 0;  // every chunk before it was copied in it
    uint32_t first_unread = 0;    // every chunk before it needs no read
    uint32_t read_end = 0;        // no chunk from it on was read for it
    bool from_disk = false;       // some bytes of the present load came from the disk
    bool demanded = false;        // the present load was started by an acquire
  };
  struct Waiting {  // a demand
    uint32_t unit = kNone;
    Clock::time_point posted{};
    bool held_up = false;   // its place is held: nothing is done for it until that is free
    bool given_up = false;  // its error is on the board
  };
  struct Flight {  // a read under way
    uint32_t chunk = kNone;
    uint32_t slot = kNoSlot;  // none: straight into the host cache
    ReadRoute route = ReadRoute::kBuffered;
    Clock::time_point issued{};
  };

  void run();
  bool step();  // true when something moved
  void look();  // copies what it needs from the board
  bool reap();
  bool reap_from(Reader& reader);
  void complete(const ReadCompletion& done, const Reader& reader);
  bool copy();
  bool copy_unit(uint32_t unit, size_t ahead, bool demanded);
  bool begin_load(uint32_t unit, size_t ahead, bool demanded);
  bool may_evict(uint32_t other, uint32_t unit, size_t ahead, bool demanded) const
      REQUIRES(board_.mutex);
  void finish_load(uint32_t unit);
  void evict(uint32_t unit) REQUIRES(board_.mutex);
  void wait_for_evicted();
  void poison_released();
  void drop_discarded();
  void enqueue(uint32_t chunk);
  std::byte* target_of(const Chunk& chunk, const Copy& copy) const;
  void skip_loaded_homes();
  bool read();
  bool read_unit(uint32_t unit, bool demanded, bool* blocked);
  bool issue(uint32_t chunk, bool demanded);
  ReadRoute route_of(uint32_t chunk) const;
  Shard& source_of(uint32_t chunk, ReadRoute route) const;
  void drop_preload();
  void count_use(const Flight& flight);
  void trace_read(const Flight& flight, const ReadCompletion& done);
  bool needs_read(uint32_t chunk) const;
  uint32_t acquire_slot(uint32_t chunk, bool demanded);
  bool slot_comes_free() const;
  bool discard_for_demand(uint32_t unit);
  void forget_chunk(uint32_t chunk);
  void drop_outside_window();
  void note_change();
  void sleep();
  void account_stall(bool moved);
  Stall cause_of(uint32_t demand) const;
  void limit_wait(Waiting& demand, Clock::time_point now);
  std::string describe(const Waiting& demand, Clock::time_point now) const;
  std::string holder_of_place(uint32_t unit) const EXCLUDES(board_.mutex);
  void look_at_demands() REQUIRES(board_.mutex);
  size_t rank_of(uint32_t unit) const;
  bool demanded(uint32_t unit) const { return rank_of(unit) < demands_.size(); }
  bool to_serve(const Waiting& demand) const {
    return !demand.held_up && board_.phase_of(demand.unit) != Phase::kReady;
  }
  uint32_t first_missing() const;
  void keep_error(KeptError error);
  bool reads_under_way() const { return free_tags_.size() < flights_.size(); }
  bool is_resident_load(uint32_t unit) const { return unit == plan_.units.size(); }
  uint32_t owner_of(uint32_t chunk) const {
    return chunk >= plan_.first_resident_chunk ? static_cast<uint32_t>(plan_.units.size())
                                               : plan_.chunks[chunk].unit;
  }

  const ModelSpec& spec_;
  const Plan& plan_;
  Device& device_;
  CopyRun copies_;
  UnitBoard& board_;
  std::vector<std::unique_ptr<Shard>>& shards_;
  std::shared_ptr<Preload> preload_;  // null: nothing, or nothing any more
  std::atomic<uint64_t> preload_bytes_;
  const uint64_t preload_peak_bytes_;
  Readers readers_;  // after what they read from
  std::byte* arena_;
  std::vector<HomeMemory> homes_;  // by block
  ConductorOptions options_;
  Waker waker_;  // before the cache, whose thread wakes
  std::unique_ptr<StagingRing> ring_;
  std::unique_ptr<HostCache> cache_;
  std::vector<ShardUse> uses_;

  // The conductor's own: no other thread touches what follows while it runs.
  std::vector<ChunkState> chunks_;
  std::vector<UnitWork> work_;
  std::vector<Flight> flights_;  // by tag
  std::vector<uint32_t> free_tags_;
  uint32_t waiting_chunk_ = kNone;  // that was refused a reader or a slot, and the route to it
  ReadRoute waiting_route_ = ReadRoute::kBuffered;
  std::vector<uint32_t> present_;     // units that are loading or ready, and have a place
  std::vector<uint32_t> slot_chunk_;  // what each slot is read for or holds; kNone when doomed
  std::vector<uint32_t> window_;      // a copy of the board's
  std::vector<uint64_t> in_window_;   // by unit: the version in which it was last in the window
  std::vector<uint32_t> position_;    // by unit: where in it, then
  // In this step. Nobody else touches what they released until they are loaded again.
  std::vector<UnitState*> evicted_;
  std::array<ReadCompletion, 64> completions_;
  uint64_t seen_version_ = UINT64_MAX;
  std::vector<Waiting> demands_;  // as the board has them: the oldest first
  bool paused_ = false;           // an error waits to be thrown
  bool stop_ = false;
  bool slots_wanted_ = false;  // reads wait for slots to be recycled
  bool copies_full_ = false;   // copies wait until some of those under way have ended
  bool discarded_ = false;     // the board names units to drop
  uint64_t passes_over_ = 0;   // as the board has it
  uint64_t preload_pass_ = 0;  // in which something was taken of what was read ahead
  int idle_steps_ = 0;
  Clock::time_point stall_mark_;
  Clock::time_point last_move_;
  std::atomic<Stall> stall_cause_{Stall::kDisk};
  bool stalled_ = false;

  std::thread thread_;
};

}  // namespace wsm
