#include "support/witness.h"

#include <cstring>
#include <vector>

namespace wsm::testing {

void Witness::check_unit(uint32_t unit) {
  model_.visit_images(unit, [&](const TensorSpec& tensor, const std::byte* image) {
    check_tensor(unit, tensor, image);
  });
}

void Witness::check_unit_on(AsyncGpu& gpu, uint32_t unit, StreamHandle stream) {
  model_.visit_images(unit, [&](const TensorSpec& tensor, const std::byte* image) {
    gpu.launch(stream, [this, unit, stream, &tensor, image] {
      try {
        check_tensor(unit, tensor, image);
      } catch (const Wrong& wrong) {
        if (kernels_wrong_.empty()) kernels_wrong_ = concat("on stream ", stream, ": ", wrong.what);
      }
    });
  });
}

void Witness::check_kernels() const { must(kernels_wrong_.empty(), kernels_wrong_); }

void Witness::check_tensor(uint32_t unit, const TensorSpec& tensor, const std::byte* found) {
  for (const Extent& extent : tensor.extents) {
    const Ground::Land& land = ground_.land_of(model_.spec().shards[extent.shard].path);
    const std::byte* const wanted = land.bytes.data() + extent.offset;
    const std::byte* const part = found + extent.tensor_offset;
    if (extent.bytes == 0 || std::memcmp(part, wanted, extent.bytes) == 0) continue;
    for (uint64_t i = 0; i < extent.bytes; ++i) {
      if (part[i] == wanted[i]) continue;
      must(log_.flipped(land.path, extent.offset + i, part[i] ^ wanted[i]), "unit ", unit, ", ",
           tensor.name, ": byte ", extent.tensor_offset + i, " is ", static_cast<int>(part[i]),
           ", not ", static_cast<int>(wanted[i]));
      ++flips_seen_;
    }
  }
}

bool Witness::fetch(uint32_t unit, uint32_t draw) {
  const Engine& engine = model_.engine();
  const UnitPlan& planned = engine.plan().units[unit];
  if (planned.tensors.empty()) return !engine.closed();
  const uint32_t index = draw % static_cast<uint32_t>(planned.tensors.size());
  const TensorSpec& tensor = model_.spec().tensors[model_.spec().units[unit].tensors[index]];
  if (planned.tensors[index].resident && tensor.parameter_bytes == 0) return !engine.closed();
  std::vector<std::byte> copy(tensor.bytes);
  try {
    engine.fetch(unit, index, copy.data());
  } catch (const Error& error) {
    must(engine.closed(), "a fetch of ", tensor.name, " failed: ", error.what());
    return false;
  }
  check_tensor(unit, tensor, copy.data());
  return true;
}

void Witness::expect_fault(const Error& error) {
  const std::string& text = last_error_ = error.what();
  const bool tells_unit = tells(text, "unit '");
  const bool tells_place = tells(text, "shard") && tells(text, "offset");
  if (dynamic_cast<const IoError*>(&error) != nullptr) {
    must(++io_errors_ <= log_.errors, "more errors than failed reads: ", text);
    must(tells_unit && tells_place, "an error that does not say where: ", text);
  } else if (dynamic_cast<const TimeoutError*>(&error) != nullptr) {
    ++timeouts_;
    must(faults_.may_lose(), "a time limit where no read gets lost: ", text);
    must(tells_unit && (tells_place || tells(text, "Is the device healthy?")),
         "a time limit that does not say where: ", text);
  } else {
    must(tells(text, "the device is broken"), "unexpected: ", text);
    ++device_errors_;
    device_broken_ = true;
  }
}

void Witness::count(Tally& tally) const {
  tally.io_errors += io_errors_;
  tally.timeouts += timeouts_;
  tally.device_errors += device_errors_;
  tally.flipped_bytes_seen += flips_seen_;
  tally.short_reads += log_.shorts;
  tally.interrupted_reads += log_.interrupts;
  tally.stalled_reads += log_.stalls;
  tally.failed_reads += log_.errors;
  tally.lost_reads += log_.lost;
  tally.flipped_bits += log_.flips;
}

std::string Bystander::leave() {
  thread_.request_stop();
  if (thread_.joinable()) thread_.join();
  return wrong_;
}

void Bystander::look_on(const std::stop_token& stop, const StreamedModel& model, Witness& witness) {
  Engine& engine = model.engine();
  const auto units = static_cast<uint32_t>(model.spec().units.size());
  try {
    for (uint32_t i = 0; !stop.stop_requested() && witness.fetch(i % units, i / 7); ++i) {
      engine.totals();
      engine.memory();
      engine.shards();
      engine.steady_passes();
      engine.passes();
    }
  } catch (const Wrong& wrong) {
    wrong_ = wrong.what;
  } catch (const std::exception& error) {
    wrong_ = concat("a bystander met ", error.what());
  }
}

}  // namespace wsm::testing
