// The engine over faulty storage: the right bytes or a clear error, never a hang.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <random>
#include <thread>

#include "support/faulty_reader.h"
#include "support/streamed_model.h"
#include "util/align.h"

namespace wsm {
namespace {

using testing::FaultyOptions;
using testing::FaultyReader;
using testing::StreamedModel;

constexpr uint64_t kChunk = 64 * kKiB;

Limits small_limits(const StreamedModel& model, double cached, uint32_t slots = 4) {
  Limits l;
  l.device_bytes = 64 * kMiB;
  l.arena_bytes = 2 * model.largest_unit_bytes() + 8 * kKiB;
  l.home_bytes = 0;
  l.staging_bytes = slots * kChunk;
  l.cache_bytes = static_cast<uint64_t>(cached * static_cast<double>(model.bytes()));
  l.host_bytes = *l.staging_bytes + *l.cache_bytes;
  l.chunk_bytes = kChunk;
  return l;
}

EngineOptions faulty(uint64_t seed, FaultyOptions options) {
  options.reader.block_bytes = 16 * kKiB;
  options.reader.requests = 8;
  EngineOptions engine;
  engine.poison = true;
  engine.read_timeout_s = 0.4;
  engine.make_readers = [seed, options] {
    Readers readers;
    readers.pool = std::make_unique<FaultyReader>(seed, options);
    return readers;
  };
  return engine;
}

// A pass over a random order, with skips, repeats, nesting refused or not, and aborts.
void wild_pass(StreamedModel& model, std::mt19937_64& random) {
  Engine& engine = model.engine();
  const auto units = static_cast<uint32_t>(model.spec().units.size());
  engine.begin_pass(0);
  for (uint32_t i = 0; i < units; ++i) {
    const uint32_t unit = random() % 4 == 0 ? static_cast<uint32_t>(random() % units) : i;
    if (random() % 6 == 0) continue;
    ASSERT_EQ(model.use(unit), "");
    if (random() % 40 == 0) {
      engine.acquire(unit, 0, {});
      return;  // aborted: neither released nor ended
    }
  }
  engine.end_pass(0);
}

TEST(EngineFaults, ShortReadsDelaysAndDisorderChangeNothing) {
  const uint64_t first = testing::test_seed();
  for (uint64_t seed = first; seed < first + 12; ++seed) {
    SCOPED_TRACE(seed);
    StreamedModel model(seed);
    std::mt19937_64 random(seed);
    FaultyOptions options;
    options.short_chance = 0.2;
    options.interrupt_chance = 0.1;
    options.max_delay_polls = 6;
    options.shuffled = true;
    const double cached = static_cast<double>(random() % 3) / 2;
    model.open(model.plan(small_limits(model, cached, 2 + random() % 6)), faulty(seed, options));
    for (int pass = 0; pass < 12; ++pass) wild_pass(model, random);
    if (HasFatalFailure()) return;
  }
}

TEST(EngineFaults, AFailedReadIsAnErrorThatNamesFileOffsetAndUnit_AndTheNextPassWorks) {
  for (uint64_t at = 0; at < 40; at += 3) {
    SCOPED_TRACE(at);
    StreamedModel model;
    FaultyOptions options;
    options.eio_from_read = at;
    options.eio_reads = 1;
    model.open(model.plan(small_limits(model, 0.3)), faulty(7, options));
    std::string message;
    for (int pass = 0; pass < 3 && message.empty(); ++pass) {
      try {
        ASSERT_EQ(model.pass(model.all_units()), "");
      } catch (const IoError& error) {
        message = error.what();
      }
    }
    EXPECT_NE(message.find("shard"), std::string::npos) << message;
    EXPECT_NE(message.find("offset"), std::string::npos) << message;
    EXPECT_NE(message.find("unit '"), std::string::npos) << message;
    EXPECT_EQ(model.pass(model.all_units()), "");
    EXPECT_EQ(model.pass(model.all_units()), "");
  }
}

TEST(EngineFaults, ADriveThatIsGoneFailsEveryPassAndHangsNone) {
  StreamedModel model;
  FaultyOptions options;
  options.eio_from_read = 10;
  options.eio_reads = testing::kNever;
  model.open(model.plan(small_limits(model, 0)), faulty(7, options));
  int failed = 0;
  for (int pass = 0; pass < 4; ++pass) {
    try {
      ASSERT_EQ(model.pass(model.all_units()), "");
    } catch (const IoError&) {
      ++failed;
    }
  }
  EXPECT_EQ(failed, 4);
}

TEST(EngineFaults, AReadThatNeverEndsIsATimeoutThatNamesIt) {
  StreamedModel model;
  FaultyOptions options;
  options.lost_read = 5;
  model.open(model.plan(small_limits(model, 0)), faulty(7, options));
  for (int pass = 0; pass < 2; ++pass) {
    try {
      std::string wrong = model.pass(model.all_units());
      FAIL() << "no error" << wrong;
    } catch (const TimeoutError& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find("unit '"), std::string::npos) << message;
      EXPECT_NE(message.find("shard"), std::string::npos) << message;
      EXPECT_NE(message.find("offset"), std::string::npos) << message;
    }
  }
}

// A host device whose copies fail from the n-th on, for ever.
class BrokenDevice final : public Device {
 public:
  explicit BrokenDevice(uint64_t good_copies) : good_copies_(good_copies) {}

  const char* kind() const override { return host_->kind(); }
  int index() const override { return host_->index(); }
  bool register_host(void* data, size_t bytes, std::string* why) override {
    return host_->register_host(data, bytes, why);
  }
  void unregister_host(void* data) noexcept override { host_->unregister_host(data); }
  void copy_to_device(void* target, const void* source, size_t bytes) override {
    check<Error>(good_copies_-- > 0, "the device is broken");
    host_->copy_to_device(target, source, bytes);
  }
  void fill(void* target, uint8_t value, size_t bytes) override {
    host_->fill(target, value, bytes);
  }
  StreamHandle copy_stream() const override { return host_->copy_stream(); }
  std::unique_ptr<Event> make_event(bool timed) override { return host_->make_event(timed); }
  void record(Event& event, StreamHandle stream) override { host_->record(event, stream); }
  void wait(StreamHandle stream, const Event& event) override { host_->wait(stream, event); }
  bool done(const Event& event) override { return host_->done(event); }
  double elapsed_seconds(const Event& begin, const Event& end) override {
    return host_->elapsed_seconds(begin, end);
  }
  void drain() override { host_->drain(); }

 private:
  std::unique_ptr<Device> host_ = make_host_device();
  int64_t good_copies_;
};

TEST(EngineFaults, ABrokenDeviceFailsEveryLaterAcquireAndHangsNone) {
  for (uint64_t good = 0; good < 24; ++good) {
    SCOPED_TRACE(good);
    StreamedModel model;
    model.open(model.plan(small_limits(model, 0.3)), {}, std::make_unique<BrokenDevice>(good));
    for (int pass = 0; pass < 3; ++pass) {
      try {
        ASSERT_EQ(model.pass(model.all_units()), "");
        FAIL() << "no error";
      } catch (const Error& error) {
        EXPECT_NE(std::string(error.what()).find("the device is broken"), std::string::npos);
      }
    }
  }
}

TEST(EngineFaults, CloseWakesWhoeverWaitsInAnAcquire) {
  StreamedModel model;
  FaultyOptions options;
  options.lost_read = 0;
  EngineOptions engine_options = faulty(7, options);
  engine_options.read_timeout_s = 2;
  Engine& engine = model.open(model.plan(small_limits(model, 0)), engine_options);
  std::atomic<bool> waiting{false};
  std::string message;
  std::thread worker([&] {
    try {
      engine.begin_pass(0);
      engine.acquire(0, 0, [&] { waiting = true; });
    } catch (const Error& error) {
      message = error.what();
    }
  });
  while (!waiting) std::this_thread::yield();
  engine.close();
  worker.join();
  EXPECT_NE(message.find("closed while unit 'unit0'"), std::string::npos) << message;
}

}  // namespace
}  // namespace wsm
