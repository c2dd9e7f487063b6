// What a scenario of chaos starts from, drawn from bytes: a model over shards that are there, its
// budgets, how the storage and the device fail.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "plan/planner.h"
#include "support/async_device.h"
#include "support/draws.h"
#include "support/faulty_device.h"
#include "support/faulty_reader.h"
#include "support/temp_file.h"

namespace wsm::testing {

// Patterned shards that all scenarios share, as files and in memory: so that the bytes of any model
// are known, and a scenario writes none.
class Ground {
 public:
  explicit Ground(uint64_t shard_bytes);

  struct Land {
    std::string path;
    uint32_t alignment = 1;  // what direct reads of the file need
    std::vector<std::byte> bytes;
  };
  const std::vector<Land>& lands() const { return lands_; }
  const Land& land_of(const std::string& path) const;

 private:
  TempFolder folder_;
  std::vector<Land> lands_;
};

// How far scenarios may go, by who runs them.
struct Terrain {
  const Ground& ground;
  bool real_readers = false;  // uring and pread too
  bool bystanders = true;     // a second thread fetches and asks for reports
  int most_passes = 40;
  uint64_t most_late_bytes = 512 << 10;  // see FaultyDeviceOptions
  uint32_t longest_stall_us = 300;
  double lost_limit_s = 0.02;  // read_timeout_s where reads may get lost
};

struct DrawnModel {
  ModelSpec spec;
  std::vector<const void*> memory;
};

DrawnModel draw_model(Draws& draws, const Ground& ground);
PlanLimits draw_limits(Draws& draws, const ModelSpec& spec);
FaultyOptions draw_faults(Draws& draws, const Terrain& terrain);
FaultyDeviceOptions draw_device(Draws& draws, const Terrain& terrain);
std::shared_ptr<AsyncGpu> draw_gpu(Draws& draws);  // null: the host device
// Over readers with these faults, or, where the terrain allows it, now and then the real ones.
EngineOptions draw_options(Draws& draws, const Terrain& terrain, const FaultyOptions& faults);

}  // namespace wsm::testing
