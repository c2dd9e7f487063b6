#include "memory/staging_ring.h"

#include <gtest/gtest.h>

#include <cstring>
#include <set>

#include "util/check.h"

namespace wsm {
namespace {

using State = StagingRing::State;
constexpr uint64_t kSlotBytes = 64 << 10;
constexpr StreamHandle kStream = 1;

struct ManualEvent final : Event {
  bool done = true;
};

// Its events are done when the test says so.
class ManualDevice final : public Device {
 public:
  std::vector<ManualEvent*> recorded;
  std::vector<uint64_t> segments;
  bool broken = false;

  std::unique_ptr<Event> make_event(bool) override { return std::make_unique<ManualEvent>(); }
  void record(Event& event, StreamHandle) override {
    if (broken) throw Error("the device is gone");
    recorded.push_back(static_cast<ManualEvent*>(&event));
    recorded.back()->done = false;
  }
  bool done(const Event& event) override { return static_cast<const ManualEvent&>(event).done; }
  bool register_host(void*, size_t bytes, std::string*) override {
    segments.push_back(bytes);
    return true;
  }

  void unregister_host(void*) noexcept override {}
  const char* kind() const override { return "manual"; }
  int index() const override { return 0; }
  void copy_to_device(void*, const void*, size_t) override {}
  void fill(void*, uint8_t, size_t) override {}
  StreamHandle copy_stream() const override { return kStream; }
  void wait(StreamHandle, const Event&) override {}
  double elapsed_seconds(const Event&, const Event&) override { return 0; }
  void drain() override {}
};

class StagingRingTest : public testing::Test {
 protected:
  uint32_t fill_one() {
    const uint32_t slot = ring_.acquire(true);
    ring_.read_done(slot);
    return slot;
  }
  uint32_t copy_one() {
    const uint32_t slot = fill_one();
    ring_.copying(slot, kStream);
    return slot;
  }

  ManualDevice device_;
  StagingRing ring_{device_, 3, kSlotBytes};
};

TEST_F(StagingRingTest, SlotsAreApartAndHoldTheirBytes) {
  std::set<std::byte*> places;
  for (uint32_t i = 0; i < 3; ++i) {
    const uint32_t slot = ring_.acquire(true);
    EXPECT_TRUE(places.insert(ring_.data(slot)).second);
    EXPECT_EQ((ring_.data(slot) - ring_.buffer().data()) % static_cast<int64_t>(kSlotBytes), 0);
    std::memset(ring_.data(slot), static_cast<int>(i), kSlotBytes);
  }
  EXPECT_EQ(ring_.buffer().mapped_bytes(), 3 * kSlotBytes);
}

TEST_F(StagingRingTest, TheWayOfASlot) {
  const uint32_t slot = ring_.acquire(false);
  EXPECT_EQ(ring_.state(slot), State::kReading);
  EXPECT_EQ(ring_.free_slots(), 2u);
  EXPECT_TRUE(ring_.read_done(slot));
  EXPECT_EQ(ring_.state(slot), State::kFilled);
  EXPECT_FALSE(ring_.copies_pending());
  ring_.copying(slot, kStream);
  EXPECT_EQ(ring_.state(slot), State::kCopying);
  EXPECT_TRUE(ring_.copies_pending());
  EXPECT_EQ(ring_.recycle(), 0u);
  device_.recorded[0]->done = true;
  EXPECT_EQ(ring_.recycle(), 1u);
  EXPECT_EQ(ring_.state(slot), State::kFree);
  EXPECT_FALSE(ring_.copies_pending());
  EXPECT_EQ(ring_.free_slots(), 3u);
}

TEST_F(StagingRingTest, LastSlotIsKeptForDemands) {
  EXPECT_NE(ring_.acquire(false), kNoSlot);
  EXPECT_NE(ring_.acquire(false), kNoSlot);
  EXPECT_EQ(ring_.acquire(false), kNoSlot);
  EXPECT_NE(ring_.acquire(true), kNoSlot);
  EXPECT_EQ(ring_.acquire(true), kNoSlot);
}

TEST_F(StagingRingTest, RecycleFreesTheOldestCopiesOnly) {
  copy_one();
  copy_one();
  const uint32_t third = copy_one();
  device_.recorded[1]->done = true;  // the second is seen when the first is
  EXPECT_EQ(ring_.recycle(), 0u);
  device_.recorded[0]->done = true;
  EXPECT_EQ(ring_.recycle(), 2u);
  EXPECT_EQ(ring_.state(third), State::kCopying);
  EXPECT_EQ(ring_.free_slots(), 2u);
}

TEST_F(StagingRingTest, SlotBeingReadIsDoomedUntilItsReadIsDone) {
  const uint32_t slot = ring_.acquire(true);
  ring_.discard(slot);
  EXPECT_EQ(ring_.state(slot), State::kDoomed);
  EXPECT_EQ(ring_.free_slots(), 2u);
  EXPECT_FALSE(ring_.read_done(slot)) << "its bytes are not wanted";
  EXPECT_EQ(ring_.state(slot), State::kFree);
  EXPECT_EQ(ring_.free_slots(), 3u);
}

TEST_F(StagingRingTest, FilledSlotIsDiscardedAtOnce) {
  const uint32_t slot = fill_one();
  ring_.discard(slot);
  EXPECT_EQ(ring_.state(slot), State::kFree);
  EXPECT_EQ(ring_.free_slots(), 3u);
}

TEST_F(StagingRingTest, StepsThatAreNotDrawnThrow) {
  const uint32_t free = 2;  // slots are taken from 0 up
  const uint32_t filled = fill_one();
  const uint32_t reading = ring_.acquire(true);
  ASSERT_EQ(ring_.state(free), State::kFree);
  EXPECT_THROW(ring_.read_done(free), Error);
  EXPECT_THROW(ring_.discard(free), Error);
  EXPECT_THROW(ring_.copying(free, kStream), Error);
  EXPECT_THROW(ring_.copying(reading, kStream), Error);
  EXPECT_THROW(ring_.read_done(filled), Error);
  ring_.discard(reading);
  EXPECT_THROW(ring_.discard(reading), Error);
  EXPECT_THROW(ring_.copying(reading, kStream), Error);
  ring_.copying(filled, kStream);
  EXPECT_THROW(ring_.copying(filled, kStream), Error);
  EXPECT_THROW(ring_.discard(filled), Error);
  EXPECT_THROW(ring_.read_done(filled), Error);
  EXPECT_THROW(ring_.read_done(3), Error);
  EXPECT_THROW(ring_.discard(kNoSlot), Error);
  EXPECT_EQ(ring_.free_slots(), 1u) << "what throws changes nothing";
}

TEST_F(StagingRingTest, SlotWhoseEventCouldNotBeRecordedIsNotRecycled) {
  const uint32_t slot = fill_one();
  device_.broken = true;
  EXPECT_THROW(ring_.copying(slot, kStream), Error);
  EXPECT_EQ(ring_.state(slot), State::kFilled);
  EXPECT_EQ(ring_.recycle(), 0u);
}

TEST(StagingRing, OneSlotServesAll) {
  ManualDevice device;
  StagingRing ring(device, 1, kSlotBytes);
  EXPECT_EQ(ring.acquire(false), 0u);
  EXPECT_EQ(ring.acquire(true), kNoSlot);
}

TEST(StagingRing, NoSlotsHaveNothingToGive) {
  ManualDevice device;
  StagingRing ring(device, 0, 0);
  EXPECT_EQ(ring.acquire(true), kNoSlot);
  EXPECT_EQ(ring.recycle(), 0u);
  EXPECT_EQ(ring.buffer().mapped_bytes(), 0u);
}

TEST(StagingRing, SlotOfHalfAPageIsRefused) {
  ManualDevice device;
  EXPECT_THROW(StagingRing(device, 2, 2048), InvalidArgument);
  EXPECT_THROW(StagingRing(device, 2, 0), InvalidArgument);
}

TEST(StagingRing, NoSlotLiesInTwoSegments) {
  ManualDevice device;
  const uint64_t slot_bytes = uint64_t{96} << 20;
  StagingRing ring(device, 3, slot_bytes);
  EXPECT_EQ(device.segments, (std::vector<uint64_t>{2 * slot_bytes, slot_bytes}));
}

TEST(StagingRing, ManyRoundsOnTheHostDevice) {
  const auto device = make_host_device();
  StagingRing ring(*device, 4, kSlotBytes);
  std::vector<std::byte> target(64 * kSlotBytes);
  for (uint32_t i = 0; i < 64; ++i) {
    uint32_t slot = kNoSlot;
    while ((slot = ring.acquire(false)) == kNoSlot) ring.recycle();
    std::memset(ring.data(slot), static_cast<int>(i + 1), kSlotBytes);
    ring.read_done(slot);
    device->copy_to_device(target.data() + i * kSlotBytes, ring.data(slot), kSlotBytes);
    ring.copying(slot, device->copy_stream());
  }
  device->drain();
  EXPECT_GT(ring.recycle(), 0u);
  EXPECT_EQ(ring.free_slots(), 4u);
  for (uint32_t i = 0; i < 64; ++i) {
    ASSERT_EQ(target[i * kSlotBytes], std::byte(i + 1));
    ASSERT_EQ(target[(i + 1) * kSlotBytes - 1], std::byte(i + 1));
  }
}

}  // namespace
}  // namespace wsm
