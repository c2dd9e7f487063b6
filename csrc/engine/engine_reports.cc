// The engine's reports: counters, memory, readers; and the fetch of one tensor's bytes.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "engine/engine.h"
#include "storage/block_read.h"

namespace wsm {

namespace {

constexpr uint32_t kMostTraceRecords = 1 << 24;
constexpr uint64_t kFetchPiece = 16 << 20;

}  // namespace

uint64_t Engine::passes() const {
  const MutexLock lock(reports_mutex_);
  return passes_ended_;
}

Counts Engine::totals() {
  const CallGate::Visit visit(gate_);
  const MutexLock lock(reports_mutex_);
  if (visit.inside() && !forked()) probes_->collect();
  return board_.counters.read();
}

PassReport Engine::last_pass(const Interrupt& interrupt) {
  CallGate::Visit visit(gate_);
  const MutexLock lock(reports_mutex_);
  while (passes_ended_ > 0 && visit.inside() && !closed()) {
    const uint64_t pass = passes_ended_ - 1;
    // Passes that were begun since, and never ended, have taken its record.
    if (passes_ - pass > records_.size()) return {};
    if (device_->done(*record_of(pass).end)) {
      probes_->collect();
      return report_of(pass);
    }
    const MutexUnlock unlocked(reports_mutex_);
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    if (!interrupt) continue;
    const CallGate::Absence absence(visit);
    interrupt();
  }
  return {};
}

// The pass has ended on the device, and the probes were collected since.
PassReport Engine::report_of(uint64_t pass) {
  const PassRecord& record = record_of(pass);
  PassReport report{device_->elapsed_seconds(*record.begin, *record.end), record.counts};
  report.counts.stall_ns[static_cast<int>(Stall::kH2d)] = probes_->stall_ns(pass);
  return report;
}

// Asks the device, and never waits for it.
void Engine::sum_ended_passes() {
  probes_->collect();
  const uint64_t kept = records_.size();
  if (passes_ > kept) next_to_sum_ = std::max(next_to_sum_, passes_ - kept);
  for (; next_to_sum_ < passes_ended_; ++next_to_sum_) {
    if (!record_of(next_to_sum_).ended) continue;
    if (!device_->done(*record_of(next_to_sum_).end)) return;
    const PassReport report = report_of(next_to_sum_);
    ++steady_.passes;
    steady_.seconds += report.seconds;
    steady_.counts.add(report.counts);
  }
}

PassSums Engine::steady_passes() {
  const CallGate::Visit visit(gate_);
  const MutexLock lock(reports_mutex_);
  if (visit.inside() && !forked()) sum_ended_passes();
  return steady_;
}

void Engine::start_trace(StreamHandle stream, uint32_t most_records, const Interrupt& interrupt) {
  check_process();
  CallGate::Visit visit(gate_);
  check_inside(visit);
  check(most_records > 0 && most_records <= kMostTraceRecords, "a trace of ", most_records,
        " events: at least 1, at most ", kMostTraceRecords);
  const auto units = static_cast<uint32_t>(plan_.units.size());
  const auto outside = [&] {
    if (!interrupt) return;
    {
      const CallGate::Absence absence(visit);
      interrupt();
    }
    check_inside(visit);
  };
  board_.trace.start(device_, stream, units, most_records, outside);
}

Timeline Engine::stop_trace(const Interrupt& interrupt) {
  check_process();
  return board_.trace.stop(interrupt);
}

MemoryUse Engine::memory() const {
  MemoryUse use;
  const CallGate::Visit visit(gate_);
  if (!visit.inside() || forked()) return use;
  const PinnedBuffer& ring = conductor_->ring().buffer();
  const HostCache& cache = conductor_->cache();
  const uint64_t planned = ring.mapped_bytes() + cache.mapped_bytes();  // kept until `close`
  use.host_bytes = planned + conductor_->preload_bytes();
  use.host_peak_bytes = planned + conductor_->preload_peak_bytes();
  use.host_pinned_bytes = ring.pinned_bytes() + cache.pinned_bytes();
  return use;
}

std::vector<ShardReport> Engine::shards() const {
  std::vector<ShardReport> reports;
  const CallGate::Visit visit(gate_);
  if (!visit.inside() || forked()) return reports;
  for (uint32_t i = 0; i < shards_.size(); ++i) {
    const Shard& shard = *shards_[i];
    const ShardUse& use = conductor_->use_of(i);
    const Readers& readers = conductor_->readers();
    std::string why = shard.mode_reason();
    if (shard.direct() && use.buffered_bytes > 0) why += "; what the page cache had: buffered";
    if (use.direct_bytes > 0) why += "; " + readers.why();
    reports.push_back(
        {shard.path(), readers.for_direct().name(), use.direct_bytes, use.buffered_bytes, why});
  }
  return reports;
}

std::vector<std::string> Engine::warnings() const {
  std::vector<std::string> all = plan_.warnings;
  const CallGate::Visit visit(gate_);
  if (!visit.inside() || forked()) return all;
  if (!choice_without_effect_.empty()) all.push_back(choice_without_effect_);
  for (const auto& some :
       {conductor_->ring().buffer().warnings(), conductor_->cache().warnings()}) {
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

// In pieces: whoever closes the engine waits for one at most.
void Engine::read(uint32_t shard, uint64_t offset, uint64_t bytes, std::byte* target) const {
  for (uint64_t done = 0; done < bytes; done += kFetchPiece) {
    check<Error>(!gate_.is_shut(), "this streamed model was closed during a fetch");
    read_extent(*shards_[shard], offset + done, std::min(kFetchPiece, bytes - done), target + done);
  }
}

void Engine::fetch(uint32_t unit, uint32_t tensor, std::byte* target) const {
  check_process();
  const CallGate::Visit visit(gate_);
  check_inside(visit);
  check(unit < plan_.units.size(), "there is no unit ", unit);
  const UnitPlan& planned = plan_.units[unit];
  check(tensor < planned.tensors.size(), "unit ", unit, " has no tensor ", tensor);
  const TensorSpec& spec = spec_.tensors[spec_.units[unit].tensors[tensor]];
  if (planned.tensors[tensor].resident) {
    check(spec.parameter_bytes > 0, "a resident tensor is fetched from its home");
    for (const Extent& extent : spec.extents) {
      read(extent.shard, extent.offset, extent.bytes, target + extent.tensor_offset);
    }
    return;
  }
  const uint64_t begin = planned.tensors[tensor].image_offset;
  const uint64_t end = begin + spec.bytes;
  const auto [first, count] = conductor_->chunks_of(unit);
  for (uint32_t c = first; c < first + count; ++c) {
    const Chunk& chunk = plan_.chunks[c];
    const auto overlaps = [&](const Copy& copy) {
      return copy.target_offset < end && copy.target_offset + copy.bytes > begin;
    };
    const Copy* copies = plan_.copies.data() + chunk.first_copy;
    if (std::none_of(copies, copies + chunk.copy_count, overlaps)) continue;
    const std::byte* const cached = conductor_->cached(c);
    for (uint32_t i = chunk.first_copy; i < chunk.first_copy + chunk.copy_count; ++i) {
      const Copy& copy = plan_.copies[i];
      const uint64_t from = std::max(begin, copy.target_offset);
      const uint64_t to = std::min(end, copy.target_offset + copy.bytes);
      if (from >= to) continue;
      const uint64_t in_chunk = copy.source_offset + (from - copy.target_offset);
      if (cached) {
        std::memcpy(target + (from - begin), cached + in_chunk, to - from);
      } else {
        read(chunk.shard, chunk.read_offset + in_chunk, to - from, target + (from - begin));
      }
    }
  }
}

}  // namespace wsm
