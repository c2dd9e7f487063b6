// The engine's start: files, events, memory, the conductor.
#include <algorithm>
#include <utility>

#include "engine/engine.h"
#include "engine/log.h"

namespace wsm {

namespace {

constexpr size_t kProbePairs = 512;

std::vector<uint64_t> streamed_bytes(const Plan& plan) {
  std::vector<uint64_t> bytes;
  for (const UnitPlan& unit : plan.units) bytes.push_back(unit.streamed_bytes);
  return bytes;
}

bool same_shards(const std::vector<ShardSpec>& a, const std::vector<ShardSpec>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
    return x.path == y.path && x.bytes == y.bytes;
  });
}

}  // namespace

Engine::Engine(ModelSpec spec, Plan plan, Handoff handoff, std::byte* arena,
               std::vector<HomeMemory> homes, const std::vector<const void*>& memory,
               StreamHandle allocated_on, EngineOptions options)
    : spec_(std::move(spec)),
      plan_(std::move(plan)),
      options_(std::move(options)),
      device_(std::move(handoff.device)),
      inherited_(std::move(handoff.cache)),
      board_(streamed_bytes(plan_), plan_.read_ahead_bytes, plan_.lookahead_units),
      process_(::getpid()) {
  validate(spec_);
  check(plan_.units.size() == spec_.units.size(), "the plan was made for another model");
  check(arena != nullptr || plan_.arena_bytes == 0, "no arena was given, the plan needs ",
        plan_.arena_bytes, " bytes");
  check(homes.size() == plan_.home_blocks.size(), homes.size(),
        " blocks were given for the homes, the plan needs ", plan_.home_blocks.size());
  for (const HomeMemory& block : homes) check(block.data != nullptr, "a home block has no memory");
  open_shards(memory);
  if (inherited_) check_same_files(handoff);
  tell_refused_files();
  choice_without_effect_ = choice_without_effect();
  if (!choice_without_effect_.empty()) log_once(choice_without_effect_);
  board_.units.resize(plan_.units.size() + 1);
  for (UnitState& state : board_.units) {
    board_.ready.push_back(device_->make_event());
    state.released.emplace_back(0, device_->make_event());
  }
  probes_ = std::make_unique<StallProbes>(*device_, board_.counters, kProbePairs);
  for (PassRecord& record : records_) {
    record.begin = device_->make_event(true);
    record.end = device_->make_event(true);
  }
  // Whatever the allocator's stream still does with this memory comes before the first copy.
  device_->record(*records_[0].begin, allocated_on);
  device_->wait(device_->copy_stream(), *records_[0].begin);
  if (handoff.preload) {
    // What was read before there was a plan, as far as the budget has room for it beside the plan.
    const uint64_t taken = plan_.cache_bytes + plan_.staging_bytes();
    const uint64_t budget = plan_.host_budget_bytes;
    handoff.preload->settle(shards_, plan_, budget - std::min(budget, taken));
  }
  conductor_ = std::make_unique<Conductor>(
      spec_, plan_, *device_, board_, shards_,
      make_readers(options_, any_direct(), plan_.chunk_bytes), arena, std::move(homes),
      std::move(inherited_), handoff.kept, std::move(handoff.preload),
      ConductorOptions{options_.poison, options_.verbose, options_.read_timeout_s});
  conductor_->start();
}

void Engine::open_shards(const std::vector<const void*>& memory) {
  check(memory.size() == spec_.shards.size(), "one memory pointer (or none) for each shard");
  for (size_t i = 0; i < spec_.shards.size(); ++i) {
    const ShardSpec& shard = spec_.shards[i];
    shards_.push_back(memory[i] ? Shard::from_memory(shard.path, memory[i], shard.bytes)
                                : Shard::open(shard.path, options_.direct));
    check<IoError>(shards_[i]->bytes() == shard.bytes, shard.path, " has ", shards_[i]->bytes(),
                   " bytes now and had ", shard.bytes,
                   " when its header was read; open the checkpoint again");
    check(shard.alignment % shards_[i]->alignment() == 0 || !shards_[i]->direct(), shard.path,
          ": the plan reads at multiples of ", shard.alignment, ", direct reads need ",
          shards_[i]->alignment());
  }
}

void Engine::check_same_files(const Handoff& handoff) const {
  check(same_shards(spec_.shards, handoff.shards),
        "a host cache can only be taken over for the same files");
  for (size_t i = 0; i < shards_.size(); ++i) {
    check<IoError>(shards_[i]->same_file(*handoff.files[i]), shards_[i]->path(),
                   " has changed; load the model again");
  }
}

bool Engine::any_direct() const {
  return std::any_of(shards_.begin(), shards_.end(), [](const auto& s) { return s->direct(); });
}

void Engine::tell_refused_files() const {
  const Shard* first = nullptr;
  size_t count = 0;
  for (const auto& shard : shards_) {
    if (!shard->direct_refused()) continue;
    if (!first) first = shard.get();
    ++count;
  }
  if (first) log_direct_refused(first->path(), count - 1, first->mode_reason());
}

// What was asked for, and can make no difference to these files; empty where all can.
std::string Engine::choice_without_effect() const {
  const bool ring = options_.reader == ReaderChoice::kUring;
  const auto file = std::find_if(shards_.begin(), shards_.end(),
                                 [](const auto& shard) { return shard->memory() == nullptr; });
  if (file == shards_.end()) {
    if (ring) return "reader 'uring' (WSM_READER) has no effect: the weights come from RAM";
    if (options_.direct != DirectMode::kOn) return {};
    return "direct reads (WSM_DIRECT=1) are not done: the weights come from RAM";
  }
  if (!ring || any_direct()) return {};
  return concat("reader 'uring' (WSM_READER) has no effect: it does direct reads, and ",
                (*file)->path(), " is read by threads: ", (*file)->mode_reason());
}

}  // namespace wsm
