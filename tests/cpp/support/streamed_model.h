// A small model on disk and an engine that streams it to the host device, for tests: every byte
// tells where it came from, so what an acquire brought can be checked to the byte.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/preload.h"
#include "plan/planner.h"
#include "support/temp_file.h"

namespace wsm::testing {

struct ModelShape {
  uint32_t units = 8;
  uint32_t tensors_per_unit = 3;
  uint32_t shards = 2;
  uint64_t least_tensor_bytes = 20'000;
  uint64_t most_tensor_bytes = 90'000;
  bool in_memory = false;    // the shards lie in RAM
  bool transformed = false;  // every third tensor is to become one of half its size
  std::vector<uint32_t> encloses_units;
};

class StreamedModel {
 public:
  explicit StreamedModel(uint64_t seed = 1, ModelShape shape = {});
  // Over shards that are there: files, or where `memory` is not null, bytes in RAM. Their owner,
  // and not wrong_bytes, knows what they hold.
  StreamedModel(ModelSpec spec, std::vector<const void*> memory);

  const ModelSpec& spec() const { return spec_; }
  uint64_t bytes() const { return bytes_; }
  uint64_t largest_unit_bytes() const { return largest_unit_; }
  std::string shard_path(uint32_t shard) const { return spec_.shards[shard].path; }

  Plan plan(const PlanLimits& limits) const { return make_plan(spec_, limits); }
  // Opens an engine by a plan; the memory is the model's, and lives on when the engine is closed.
  Engine& open(const Plan& plan, EngineOptions options = {},
               std::unique_ptr<Device> device = make_host_device(),
               std::shared_ptr<Preload> ahead = nullptr);
  // Opens an engine by a plan that follows the present one's; it takes over the cache, and the
  // homes whose tensors stay and were loaded. Throws, and changes nothing, where the budgets are
  // too small.
  Engine& resize(const PlanLimits& limits, EngineOptions options = {});
  void load_resident();
  Engine& engine() const { return *engine_; }
  void close() { engine_.reset(); }

  // Each tensor of the unit whose image is on the device, and where.
  using Visit = std::function<void(const TensorSpec&, const std::byte* image)>;
  void visit_images(uint32_t unit, const Visit& visit) const;
  // " name@offset" of the first wrong byte, or empty.
  std::string compare(const TensorSpec& tensor, const std::byte* found) const;
  // The names of the unit's tensors whose bytes are not right now; empty when all are.
  std::string wrong_bytes(uint32_t unit) const;
  std::string wrong_fetch(uint32_t unit) const;
  // Acquires, checks, releases. What was wrong, or empty.
  std::string use(uint32_t unit);
  // One pass over `order`.
  std::string pass(const std::vector<uint32_t>& order);
  std::vector<uint32_t> all_units() const;

 private:
  Engine& start(const Plan& plan, EngineOptions options, Handoff handoff,
                const std::vector<bool>& loaded);

  std::optional<TempFolder> folder_;
  uint64_t bytes_ = 0;
  uint64_t largest_unit_ = 0;
  ModelSpec spec_;
  std::vector<std::vector<std::byte>> owned_memory_;
  std::vector<const void*> memory_;  // by shard, where it lies in RAM; else null
  std::vector<std::byte> device_memory_;
  std::byte* arena_ = nullptr;
  std::byte* homes_ = nullptr;  // all blocks, by their offsets
  bool resident_loaded_ = false;
  std::unique_ptr<Engine> engine_;
};

}  // namespace wsm::testing
