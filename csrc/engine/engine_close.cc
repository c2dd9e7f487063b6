// The engine's end: what is waited for, what the next engine gets, what is left to the process.
#include "engine/engine.h"
#include "engine/log.h"
#include "util/abandon.h"
#include "util/deadline.h"

namespace wsm {

Engine::~Engine() {
  close();
  if (abandoned_) abandon_buffers();
}

void Engine::close() {
  if (forked()) {
    gate_.shut();
    abandoned_ = true;  // the threads and the device context are the parent's
    return;
  }
  const MutexLock closing(closing_);
  if (std::exchange(close_ended_, true)) return;
  gate_.shut();
  const bool reads_ended = conductor_->stop();  // and whoever waits in an acquire is told
  if (!reads_ended) {
    log_warning(concat("closing: a read has not ended in ", options_.read_timeout_s,
                       " s; its memory is left to the process"));
    abandoned_ = true;
  }
  if (!gate_.wait_until_empty(deadline_after(options_.read_timeout_s))) {
    log_warning(concat("closing: a call of another thread has not ended in ",
                       options_.read_timeout_s, " s; what it uses is left to the process"));
    abandoned_ = true;
  }
  try {
    device_->drain();
  } catch (const std::exception& error) {
    log_warning(concat("closing: ", error.what()));
  }
}

KeptCache Engine::kept_cache() const {
  check_process();
  const MutexLock closing(closing_);
  check<Error>(conductor_ != nullptr, "this streamed model has no host cache any more");
  for (const auto& shard : shards_) shard->check_unchanged();
  return conductor_->kept_cache();
}

Handoff Engine::hand_over() {
  check_process();
  close();
  const MutexLock closing(closing_);
  check<Error>(!abandoned_ && conductor_, "this streamed model has nothing to hand over");
  Handoff handoff{.shards = spec_.shards};
  handoff.kept = conductor_->kept_cache();
  handoff.cache = conductor_->release_cache();
  // Events, and all that has them, go before the device.
  conductor_.reset();
  board_.trace.drop();
  board_.ready.clear();
  {
    const MutexLock reports(reports_mutex_);
    const MutexLock lock(board_.mutex);
    probes_.reset();
    for (UnitState& state : board_.units) state = {};
    for (PassRecord& record : records_) record = {};
  }
  handoff.device = std::move(device_);
  handoff.files = std::move(shards_);
  return handoff;
}

// Never freed: something outside our control may still write into them.
void Engine::abandon_buffers() {
  abandon(conductor_);
  abandon(probes_);
  auto trace = std::make_unique<std::shared_ptr<Trace::Recording>>(board_.trace.detach());
  abandon(trace);
  for (auto& shard : shards_) abandon(shard);
  for (auto& event : board_.ready) abandon(event);
  for (UnitState& state : board_.units) {
    for (auto& [stream, event] : state.released) abandon(event);
  }
  for (PassRecord& record : records_) {
    abandon(record.begin);
    abandon(record.end);
  }
  auto device = std::make_unique<std::shared_ptr<Device>>(std::move(device_));
  abandon(device);
}

}  // namespace wsm
