#include "support/scenario.h"

#include <algorithm>
#include <utility>

#include "storage/shard.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm::testing {
namespace {

constexpr uint64_t kLeastChunk = 64 * kKiB;
constexpr double kPatience_s = 30;  // nothing gets lost, so no wait comes near it

// Draws the tensors of a model out of some of the ground's shards.
class ModelDraw {
 public:
  ModelDraw(Draws& draws, const Ground& ground) : draws_(draws), ground_(ground) {}

  DrawnModel draw() {
    draw_shards();
    const uint64_t units = draws_.between(1, 8);
    for (uint64_t u = 0; u < units; ++u) draw_unit(u);
    return std::move(model_);
  }

 private:
  void draw_shards() {
    for (const Ground::Land& land : ground_.lands()) {
      if (!model_.spec.shards.empty() && draws_.one_in(3)) continue;
      const bool in_memory = draws_.one_in(2);
      const uint32_t alignment = draws_.one_of<uint32_t>({1, 512, 4096, 65536});
      model_.memory.push_back(in_memory ? land.bytes.data() : nullptr);
      model_.spec.shards.push_back({land.path, land.bytes.size(),
                                    in_memory ? alignment : std::max(alignment, land.alignment)});
      ends_.push_back(draws_.below(5000));
    }
  }

  void draw_unit(uint64_t index) {
    UnitSpec unit{"unit" + std::to_string(index), "layer=" + std::to_string(index), {}, false};
    unit.encloses_units = draws_.one_in(7);
    const uint64_t tensors = 1 + draws_.below(5) - draws_.one_in(16);
    for (uint64_t t = 0; t < tensors; ++t) {
      const uint64_t known = model_.spec.tensors.size();
      uint32_t tensor = static_cast<uint32_t>(known);
      if (known > 0 && draws_.one_in(10)) {
        tensor = static_cast<uint32_t>(draws_.below(known));  // tied
      } else {
        draw_tensor();
      }
      if (std::ranges::count(unit.tensors, tensor) == 0) unit.tensors.push_back(tensor);
    }
    model_.spec.units.push_back(std::move(unit));
  }

  void draw_tensor() {
    TensorSpec tensor;
    tensor.name = "t" + std::to_string(model_.spec.tensors.size());
    const uint64_t parts = draws_.one_in(6) ? draws_.between(2, 4) : 1;
    for (uint64_t p = 0; p < parts; ++p) {
      tensor.extents.push_back(draw_extent(tensor.bytes));
      tensor.bytes += tensor.extents.back().bytes;
    }
    if (draws_.one_in(4)) std::ranges::reverse(tensor.extents);
    if (draws_.one_in(8) && tensor.bytes > 0) {
      tensor.parameter_bytes = draws_.between(1, 2 * tensor.bytes);
    }
    model_.spec.tensors.push_back(std::move(tensor));
  }

  // Behind the one before it in its shard, with a gap or none; from the start again at the end.
  Extent draw_extent(uint64_t tensor_offset) {
    const auto shard = static_cast<uint32_t>(draws_.below(ends_.size()));
    const uint64_t room = model_.spec.shards[shard].bytes;
    const uint64_t scale = std::max<uint64_t>(1, room / 6);
    const uint64_t sizes[] = {align_up(draws_.below(scale), 256), draws_.below(scale),
                              draws_.below(5000), draws_.below(3),
                              align_up(draws_.below(scale), 4096)};
    const uint64_t bytes = std::min(sizes[draws_.below(5)], room);
    uint64_t offset = ends_[shard] + (draws_.one_in(4) ? draws_.below(100'000) : 0);
    if (offset + bytes > room) offset = 0;
    ends_[shard] = offset + bytes;
    return {.shard = shard, .offset = offset, .bytes = bytes, .tensor_offset = tensor_offset};
  }

  Draws& draws_;
  const Ground& ground_;
  DrawnModel model_;
  std::vector<uint64_t> ends_;  // by shard
};

uint64_t image_bytes(const ModelSpec& spec, const UnitSpec& unit) {
  uint64_t bytes = 0;
  for (const uint32_t t : unit.tensors) {
    bytes += align_up(spec.tensors[t].bytes, kTensorAlignment) +
             align_up(spec.tensors[t].parameter_bytes, kTensorAlignment);
  }
  return bytes;
}

std::unique_ptr<Reader> draw_real_reader(Draws& draws, const ReaderOptions& options) {
  std::string why_not;
  std::unique_ptr<Reader> reader;
  if (draws.one_in(2)) reader = make_uring_reader(options, &why_not);
  return reader ? std::move(reader) : make_pread_reader(options);
}

ReaderOptions draw_reader(Draws& draws) {
  return {.requests = static_cast<uint32_t>(draws.between(1, 9)),
          .block_bytes = draws.one_of<uint32_t>({65536, 16384, 1 << 20, 4096, 3000}),
          .depth = static_cast<uint32_t>(draws.between(1, 6)),
          .open_bytes = draws.one_of<uint64_t>({UINT64_MAX, 200000, 70000, 1})};
}

double chance_up_to(Draws& draws, double most) {
  return most * static_cast<double>(draws.between(1, 8)) / 8;
}

}  // namespace

Ground::Ground(uint64_t shard_bytes) {
  for (const uint64_t bytes : {shard_bytes, shard_bytes / 3 + 77, uint64_t{4096}}) {
    const uint64_t seed = lands_.size();
    Land land{folder_ / ("shard" + std::to_string(seed)), 1, std::vector<std::byte>(bytes)};
    fill_pattern(land.bytes, 0, seed);
    write_pattern_file(land.path, bytes, seed);
    land.alignment = direct_alignment(land.path);
    lands_.push_back(std::move(land));
  }
}

const Ground::Land& Ground::land_of(const std::string& path) const {
  return *std::ranges::find(lands_, path, &Land::path);
}

DrawnModel draw_model(Draws& draws, const Ground& ground) {
  return ModelDraw(draws, ground).draw();
}

PlanLimits draw_limits(Draws& draws, const ModelSpec& spec) {
  uint64_t largest = 0, all = 0, exclusive = 0;
  for (const UnitSpec& unit : spec.units) {
    const uint64_t bytes = image_bytes(spec, unit);
    largest = std::max(largest, bytes);
    all += bytes;
    exclusive += unit.encloses_units ? bytes : 0;
  }
  uint64_t least_chunk = kLeastChunk;
  for (const ShardSpec& shard : spec.shards) {
    least_chunk = std::max<uint64_t>(least_chunk, 2 * shard.alignment);
  }
  PlanLimits l;
  l.device_bytes = 1 * kGiB;
  // From less than can work to room for all, in steps of half the largest unit.
  l.arena_bytes = exclusive + largest / 2 * draws.one_of<uint64_t>({4, 2, 3, 5, 6, 8, 30, 1});
  l.home_bytes = all * draws.one_of<uint64_t>({0, 0, 1, 2, 3, 4, 0, 8}) / 8;
  l.chunk_bytes = least_chunk * draws.one_of<uint64_t>({1, 2, 3});
  l.staging_bytes = *l.chunk_bytes * draws.between(2, 7);
  l.cache_bytes = all * draws.below(5) / 4;
  l.host_bytes = *l.staging_bytes + *l.cache_bytes - (draws.one_in(20) ? *l.staging_bytes : 0);
  if (draws.one_in(2)) l.lookahead_units = draws.one_of<uint32_t>({1, 0, 2, 5});
  if (draws.one_in(4)) l.seam_units = static_cast<uint32_t>(draws.below(3));
  if (draws.one_in(3)) l.read_ahead_bytes = draws.below(all + 1);
  return l;
}

FaultyOptions draw_faults(Draws& draws, const Terrain& terrain) {
  FaultyOptions faults;
  faults.log = std::make_shared<FaultLog>();
  faults.shuffled = draws.one_in(2);
  faults.max_delay_polls = draws.one_of<uint32_t>({0, 1, 6, 40});
  if (draws.one_in(3)) faults.short_chance = chance_up_to(draws, 0.5);
  if (draws.one_in(3)) faults.interrupt_chance = chance_up_to(draws, 0.3);
  if (draws.one_in(4)) faults.flip_chance = chance_up_to(draws, 0.5);
  if (draws.one_in(6)) {
    faults.stall_chance = chance_up_to(draws, 0.1);
    faults.stall_us = static_cast<uint32_t>(draws.between(1, terrain.longest_stall_us));
  }
  if (draws.one_in(4)) faults.eio_chance = chance_up_to(draws, 0.2);
  if (draws.one_in(5)) faults.eio_from_read = draws.below(60);
  if (draws.one_in(3)) faults.eio_reads = draws.one_of<uint64_t>({1, 2, 10, kNever});
  if (draws.one_in(10)) faults.lost_chance = chance_up_to(draws, 0.1);
  if (draws.one_in(10)) faults.lost_read = draws.below(40);
  return faults;
}

FaultyDeviceOptions draw_device(Draws& draws, const Terrain& terrain) {
  FaultyDeviceOptions device;
  if (draws.one_in(4)) device.late_bytes = terrain.most_late_bytes >> 2 * draws.below(3);
  if (draws.one_in(6)) device.most_registered_bytes = draws.below(200'000);
  if (draws.one_in(24)) device.good_copies = draws.below(60);
  return device;
}

std::shared_ptr<AsyncGpu> draw_gpu(Draws& draws) {
  if (draws.one_in(2)) return std::make_shared<AsyncGpu>(draws.below(1 << 16));
  return nullptr;
}

EngineOptions draw_options(Draws& draws, const Terrain& terrain, const FaultyOptions& faults) {
  EngineOptions options;
  options.poison = !draws.one_in(4);
  options.direct = draws.one_of<DirectMode>({DirectMode::kAuto, DirectMode::kOff});
  options.read_timeout_s = faults.may_lose() ? terrain.lost_limit_s : kPatience_s;
  const bool two = draws.one_in(2);
  const bool always_direct = draws.one_in(4);
  const ReaderOptions pool = draw_reader(draws), direct = draw_reader(draws);
  const bool real = terrain.real_readers && draws.one_in(3);
  const uint64_t seed = draws.below(1 << 16);
  if (real) {
    const std::vector<uint8_t> kinds{static_cast<uint8_t>(seed), static_cast<uint8_t>(seed >> 8)};
    options.read_timeout_s = kPatience_s;
    options.make_readers = [=] {
      Draws which(kinds);
      Readers readers;
      readers.pool = make_pread_reader(pool);
      if (two) readers.direct = draw_real_reader(which, direct);
      readers.always_direct = always_direct;
      return readers;
    };
    return options;
  }
  options.make_readers = [=] {
    FaultyOptions of_pool = faults, of_direct = faults;
    of_pool.reader = pool;
    of_direct.reader = direct;
    Readers readers;
    readers.pool = std::make_unique<FaultyReader>(seed, of_pool);
    if (two) readers.direct = std::make_unique<FaultyReader>(seed + 1, of_direct);
    readers.always_direct = always_direct;
    return readers;
  };
  return options;
}

}  // namespace wsm::testing
