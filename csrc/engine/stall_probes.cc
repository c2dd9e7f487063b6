#include "engine/stall_probes.h"

namespace wsm {

StallProbes::StallProbes(Device& device, Counters& counters, size_t pairs)
    : device_(device), counters_(counters), pairs_(pairs) {
  for (Pair& pair : pairs_) {
    pair.begin = device.make_event(true);
    pair.end = device.make_event(true);
  }
}

void StallProbes::wait(StreamHandle stream, const Event& ready, uint64_t pass) {
  // What is done is there for all that is enqueued from now on: nothing to wait for, or to measure.
  if (device_.done(ready)) return;
  Pair& pair = pairs_[next_];
  if (pair.pending && !collect(pair)) {
    device_.wait(stream, ready);
    return;
  }
  next_ = (next_ + 1) % pairs_.size();
  device_.record(*pair.begin, stream);
  device_.wait(stream, ready);
  device_.record(*pair.end, stream);
  pair.pass = pass;
  pair.pending = true;
}

void StallProbes::collect() {
  for (Pair& pair : pairs_) {
    if (pair.pending) collect(pair);
  }
}

bool StallProbes::collect(Pair& pair) {
  if (!device_.done(*pair.end)) return false;
  const auto ns = static_cast<uint64_t>(device_.elapsed_seconds(*pair.begin, *pair.end) * 1e9);
  counters_.stall_ns[static_cast<int>(Stall::kH2d)] += ns;
  by_pass_[pair.pass % kPassesKept] += ns;
  pair.pending = false;
  return true;
}

}  // namespace wsm
