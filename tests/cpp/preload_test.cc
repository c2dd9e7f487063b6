#include "engine/preload.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>

#include "storage/shard.h"
#include "support/silent_reader.h"
#include "support/streamed_model.h"
#include "support/wait_until.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

using testing::ModelShape;
using testing::SilentReader;
using testing::StreamedModel;
using testing::TempFile;
using testing::wait_until;
using testing::write_pattern_file;

constexpr uint64_t kSpan = 4 * kMiB;
constexpr uint64_t kAll = 1 * kGiB;
// Two shards of about four spans each.
constexpr ModelShape kShape{.units = 14,
                            .tensors_per_unit = 2,
                            .shards = 2,
                            .least_tensor_bytes = 700'000,
                            .most_tensor_bytes = 1'400'000,
                            .in_memory = false,
                            .encloses_units = {}};

void make_cold(const std::string& path) {
  Shard::open(path, DirectMode::kOff)->drop_from_page_cache(0, UINT64_MAX / 2);
}

std::vector<std::string> paths_of(const StreamedModel& model) {
  std::vector<std::string> paths;
  for (const ShardSpec& shard : model.spec().shards) paths.push_back(shard.path);
  return paths;
}

uint64_t spans_bytes(const StreamedModel& model) {
  uint64_t bytes = 0;
  for (const ShardSpec& shard : model.spec().shards) bytes += align_up(shard.bytes, kSpan);
  return bytes;
}

// Reads until so much is held, and stops.
std::shared_ptr<Preload> read(const std::vector<std::string>& paths, uint64_t most_bytes,
                              uint64_t wait_bytes, EngineOptions options = {}) {
  for (const std::string& path : paths) make_cold(path);
  auto ahead = std::make_shared<Preload>(paths, options, most_bytes);
  wait_until([&] { return ahead->held_bytes() >= wait_bytes; }, "reading so much");
  ahead->stop();
  return ahead;
}

bool no_direct_reads(const StreamedModel& model) {
  return !Shard::open(model.shard_path(0))->direct();
}

// Fails whatever it is asked to read.
class FailingReader final : public Reader {
 public:
  bool submit(const ReadRequest& request) override {
    failed_.push_back({request.tag, 0, "the disk was asked"});
    return true;
  }
  size_t poll(std::span<ReadCompletion> completions) override {
    size_t count = 0;
    while (count < completions.size() && !failed_.empty()) {
      completions[count++] = failed_.back();
      failed_.pop_back();
    }
    return count;
  }
  int ready_fd() const override { return -1; }
  uint32_t capacity() const override { return 64; }
  bool full() override { return false; }
  const char* name() const override { return "failing"; }

 private:
  std::vector<ReadCompletion> failed_;
};

template <typename DirectReader, typename... Arguments>
EngineOptions with_direct_reader(Arguments... arguments) {
  EngineOptions options;
  options.make_readers = [arguments...] {
    Readers readers;
    readers.direct = std::make_unique<DirectReader>(arguments...);
    readers.pool = make_pread_reader({});
    return readers;
  };
  return options;
}

// Whether this process has a thread that reads ahead.
bool reading_ahead() {
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name;
    std::getline(std::ifstream(task.path() / "comm"), name);
    if (name == "wsm-ahead") return true;
  }
  return false;
}

uint64_t planned_host_bytes(const Plan& plan) { return plan.cache_bytes + plan.staging_bytes(); }

TEST(Preload, WhatItHoldsIsNotReadAgain) {
  StreamedModel model(1, kShape);
  if (no_direct_reads(model)) GTEST_SKIP() << "no direct reads here";
  const auto ahead = read(paths_of(model), kAll, spans_bytes(model));
  ASSERT_EQ(ahead->held_bytes(), spans_bytes(model));
  // A disk that is asked for anything answers with an error.
  for (const uint64_t homes : {uint64_t{0}, kAll}) {
    const auto held = homes > 0 ? read(paths_of(model), kAll, spans_bytes(model)) : ahead;
    Engine& engine =
        model.open(model.plan({.device_bytes = 2 * kAll, .host_bytes = kAll, .home_bytes = homes}),
                   with_direct_reader<FailingReader>(), make_host_device(), held);
    model.load_resident();
    for (int pass = 0; pass < 2; ++pass) EXPECT_EQ(model.pass(model.all_units()), "");
    EXPECT_EQ(engine.plan().device_home_bytes > 0, homes > 0);
    EXPECT_EQ(engine.totals().disk_bytes, engine.plan().model_bytes) << "read from files, once";
    EXPECT_EQ(held->held_bytes(), 0u) << "all was used, and is given back";
    EXPECT_EQ(engine.memory().host_bytes, planned_host_bytes(engine.plan()));
    model.close();
  }
}

TEST(Preload, TheRestComesFromTheDisk) {
  StreamedModel model(2, kShape);
  if (no_direct_reads(model)) GTEST_SKIP() << "no direct reads here";
  for (const uint64_t spans : {1, 3}) {
    const auto ahead = read(paths_of(model), spans * kSpan + 5, spans * kSpan);
    EXPECT_EQ(ahead->held_bytes(), spans * kSpan);
    Engine& engine = model.open(
        model.plan({.device_bytes = 10 * kMiB, .host_bytes = 80 * kMiB, .cache_bytes = 8 * kMiB}),
        {}, make_host_device(), ahead);
    EXPECT_GT(engine.plan().disk_home_bytes, 0u);
    model.load_resident();
    for (int pass = 0; pass < 2; ++pass) EXPECT_EQ(model.pass(model.all_units()), "");
    EXPECT_EQ(ahead->held_bytes(), 0u);
    model.close();
  }
}

TEST(Preload, TheBudgetHoldsBothItAndThePlan) {
  StreamedModel model(3, kShape);
  if (no_direct_reads(model)) GTEST_SKIP() << "no direct reads here";
  for (const uint64_t room : {uint64_t{0}, kSpan, 3 * kSpan}) {
    const auto ahead = read(paths_of(model), kAll, spans_bytes(model));
    const PlanLimits limits{.device_bytes = 10 * kMiB,
                            .host_bytes = 24 * kMiB + room,
                            .staging_bytes = 16 * kMiB,
                            .cache_bytes = 8 * kMiB};
    Engine& engine = model.open(model.plan(limits), {}, make_host_device(), ahead);
    EXPECT_LE(engine.memory().host_bytes, limits.host_bytes);
    EXPECT_EQ(ahead->held_bytes() > 0, room > 0);
    model.load_resident();
    EXPECT_EQ(model.pass(model.all_units()), "");
    model.close();
  }
}

TEST(Preload, UnitsThatAPassLeavesOutKeepNothing) {
  StreamedModel model(4, kShape);
  if (no_direct_reads(model)) GTEST_SKIP() << "no direct reads here";
  const auto ahead = read(paths_of(model), kAll, spans_bytes(model));
  Engine& engine = model.open(
      model.plan(
          {.device_bytes = 10 * kMiB, .host_bytes = kAll, .home_bytes = 0, .read_ahead_bytes = 1}),
      {}, make_host_device(), ahead);
  EXPECT_EQ(model.pass({0, 1, 2}), "");
  EXPECT_EQ(model.pass({0, 1, 2}), "");  // the conductor has seen that a pass is over
  const auto all_given_back = [&] {
    EXPECT_EQ(model.pass({0, 1, 2}), "");
    return engine.memory().host_bytes == planned_host_bytes(engine.plan());
  };
  wait_until(all_given_back, "giving back what no pass wants");
  EXPECT_EQ(model.pass(model.all_units()), "");
}

TEST(Preload, AFileThatWasReplacedIsReadAnew) {
  StreamedModel model(5, kShape);
  if (no_direct_reads(model)) GTEST_SKIP() << "no direct reads here";
  const std::string path = model.shard_path(0);
  const std::string right = path + ".right";
  std::filesystem::rename(path, right);
  write_pattern_file(path, model.spec().shards[0].bytes, 77);
  const auto ahead = read(paths_of(model), kAll, spans_bytes(model));
  ASSERT_EQ(ahead->held_bytes(), spans_bytes(model));
  std::filesystem::rename(right, path);
  model.open(model.plan({.device_bytes = 10 * kMiB, .host_bytes = kAll}), {}, make_host_device(),
             ahead);
  model.load_resident();
  EXPECT_EQ(model.pass(model.all_units()), "");
}

TEST(Preload, ThePageCacheIsMemoryAlready) {
  const TempFile file(3 * kSpan + 100);
  std::vector<std::byte> bytes(3 * kSpan + 100);
  const int fd = ::open(file.path().c_str(), O_RDONLY);
  ASSERT_EQ(::read(fd, bytes.data(), bytes.size()), static_cast<ssize_t>(bytes.size()));
  ::close(fd);
  std::atomic<int> requests{0};
  std::atomic<bool> begun{false};
  EngineOptions options = with_direct_reader<SilentReader>(&requests);
  options.make_readers = [&begun, make = options.make_readers] {
    begun = true;
    return make();
  };
  if (!Shard::open(file.path())->direct()) GTEST_SKIP() << "no direct reads here";
  Preload ahead({file.path()}, options, kAll);
  const auto over = [&] { return requests > 0 || (begun && !reading_ahead()); };
  wait_until(over, "the end of the reading");
  ahead.stop();
  EXPECT_EQ(requests, 0);
}

TEST(Preload, WhatCannotBeReadIsLeftToTheEngine) {
  const TempFile file(2 * kSpan);
  EXPECT_EQ(read({file.path()}, kAll, 0, with_direct_reader<FailingReader>())->held_bytes(), 0u);
  Preload gone({file.path() + ".gone"}, {}, kAll);
  gone.stop();
  EXPECT_EQ(gone.held_bytes(), 0u);
  Preload no_room({file.path()}, {}, kSpan - 1);
  no_room.stop();
  EXPECT_EQ(no_room.held_bytes(), 0u);
}

TEST(Preload, ADriveThatDoesNotAnswerHoldsNobodyUp) {
  const TempFile file(2 * kSpan);
  if (!Shard::open(file.path())->direct()) GTEST_SKIP() << "no direct reads here";
  make_cold(file.path());
  std::atomic<int> requests{0};
  EngineOptions options = with_direct_reader<SilentReader>(&requests);
  options.read_timeout_s = 0.05;
  Preload ahead({file.path()}, options, kAll);
  wait_until([&] { return requests > 0; }, "a read");
  ahead.stop();
  EXPECT_EQ(ahead.held_bytes(), 0u);
  ahead.stop();  // and once more does nothing
}

}  // namespace
}  // namespace wsm
