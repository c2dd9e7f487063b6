#include "support/reader_cases.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <random>
#include <set>
#include <thread>

#include "storage/block_read.h"
#include "support/contains.h"
#include "support/temp_file.h"
#include "support/wait_until.h"
#include "util/align.h"

namespace wsm::testing {
namespace {

constexpr uint32_t kBlock = 64 * kKiB;
constexpr std::byte kGuard{0xEE};
constexpr size_t kGuardBytes = 4096;

ReaderOptions small_options() {
  ReaderOptions options;
  options.requests = 8;
  options.block_bytes = kBlock;
  options.depth = 4;
  return options;
}

enum class Way { kDirect, kBuffered };

// The aligned superset for a direct read, else the very bytes.
ReadRequest request_for(Shard& shard, uint64_t offset, uint32_t bytes, Way way) {
  const uint32_t alignment = way == Way::kDirect ? shard.alignment() : 1;
  ReadRequest request;
  request.shard = &shard;
  request.offset = align_down(offset, alignment);
  request.bytes = static_cast<uint32_t>(align_up(offset + bytes, alignment) - request.offset);
  request.need_bytes = static_cast<uint32_t>(offset + bytes - request.offset);
  request.buffered = way == Way::kBuffered;
  return request;
}

void expect_reads(Reader& reader, Shard& shard, uint64_t offset, uint32_t bytes, Way way) {
  SCOPED_TRACE(::testing::Message() << bytes << " bytes at " << offset
                                    << (way == Way::kDirect ? " direct" : " buffered"));
  ReadRequest request = request_for(shard, offset, bytes, way);
  const AlignedBuffer buffer(request.bytes);
  request.target = buffer.data();
  const ReadCompletion completion = read_one(reader, request);
  ASSERT_EQ(completion.error, "");
  EXPECT_GE(completion.bytes, request.need_bytes);
  EXPECT_LE(completion.bytes, request.bytes);
  EXPECT_EQ(first_mismatch(buffer.span(offset - request.offset, bytes), offset), bytes);
  EXPECT_TRUE(buffer.guard_whole());
}

// A shard whose direct reads the kernel can refuse; null where this file system never does.
std::unique_ptr<Shard> shard_that_refuses_unaligned(const std::string& path, DirectMode mode) {
  auto shard = Shard::open(path, mode);
  if (!shard->direct()) return nullptr;
  const AlignedBuffer buffer(4096);
  const bool refused = ::pread(shard->direct_fd(), buffer.data(), 4096, 1) < 0 && errno == EINVAL;
  return refused ? std::move(shard) : nullptr;
}

}  // namespace

AlignedBuffer::AlignedBuffer(size_t bytes) : bytes_(bytes) {
  const size_t whole = align_up(bytes + kGuardBytes, 4096);
  data_.reset(static_cast<std::byte*>(std::aligned_alloc(4096, whole)));
  std::memset(data_.get(), static_cast<int>(kGuard), bytes + kGuardBytes);
}

bool AlignedBuffer::untouched_from(size_t offset) const {
  const std::vector<std::byte> wanted(bytes_ + kGuardBytes - offset, kGuard);
  return std::memcmp(data() + offset, wanted.data(), wanted.size()) == 0;
}

bool AlignedBuffer::guard_whole() const { return untouched_from(bytes_); }

bool is_ready(const Reader& reader) {
  pollfd entry{reader.ready_fd(), POLLIN, 0};
  return ::poll(&entry, 1, 0) == 1;
}

std::vector<ReadCompletion> wait_for(Reader& reader, size_t count) {
  constexpr int kLimitMs = std::chrono::milliseconds(kHangLimit).count();
  std::vector<ReadCompletion> all;
  std::array<ReadCompletion, 3> some;  // fewer than are there: the rest must come too
  while (all.size() < count) {
    pollfd entry{reader.ready_fd(), POLLIN, 0};
    if (::poll(&entry, 1, kLimitMs) != 1) {
      ADD_FAILURE() << "only " << all.size() << " of " << count << " completions came";
      all.resize(count);
      return all;
    }
    const size_t got =
        reader.poll(std::span(some).first(std::min(some.size(), count - all.size())));
    std::move(some.begin(), some.begin() + static_cast<ptrdiff_t>(got), std::back_inserter(all));
  }
  EXPECT_EQ(all.size(), count);
  return all;
}

ReadCompletion read_one(Reader& reader, const ReadRequest& request) {
  EXPECT_TRUE(reader.submit(request));
  return wait_for(reader, 1).front();
}

void reads_sizes_around_a_block(const MakeReader& make) {
  const auto reader = make(small_options());
  const TempFile file(12 * kBlock + 4096);
  const auto shard = Shard::open(file.path());
  for (const Way way : {Way::kDirect, Way::kBuffered}) {
    for (const uint32_t bytes :
         {1u, 4096u, kBlock - 1, kBlock, kBlock + 1, 2 * kBlock, 11 * kBlock + 7}) {
      expect_reads(*reader, *shard, 0, bytes, way);
      expect_reads(*reader, *shard, 4096, bytes, way);
    }
  }
}

void reads_unaligned_heads_and_tails(const MakeReader& make) {
  const auto reader = make(small_options());
  const uint64_t size = 5 * kBlock + 1234;
  const TempFile file(size);
  const auto shard = Shard::open(file.path());
  for (const Way way : {Way::kDirect, Way::kBuffered}) {
    for (const uint64_t offset :
         {1ul, 4095ul, 4097ul, uint64_t{kBlock} - 1, size - 5000, size - 1}) {
      for (const uint64_t bytes : {1ul, 511ul, 4097ul, uint64_t{kBlock}, size}) {
        const auto inside = static_cast<uint32_t>(std::min(bytes, size - offset));
        expect_reads(*reader, *shard, offset, inside, way);
      }
    }
  }
}

void accepts_the_end_of_the_file_when_enough_is_there(const MakeReader& make) {
  const auto reader = make(small_options());
  const uint32_t size = 2 * kBlock + 100;
  const TempFile file(size);
  const auto shard = Shard::open(file.path());
  for (const bool buffered : {false, true}) {
    for (const uint32_t bytes : {2 * kBlock + 4096, 6 * kBlock}) {
      const AlignedBuffer buffer(bytes);
      const ReadCompletion completion =
          read_one(*reader, {shard.get(), 0, bytes, size, buffer.data(), 7, buffered});
      EXPECT_EQ(completion.error, "");
      EXPECT_EQ(completion.tag, 7u);
      EXPECT_EQ(completion.bytes, size);
      EXPECT_EQ(first_mismatch(buffer.span(0, size), 0), size);
      EXPECT_TRUE(buffer.guard_whole());
    }
  }
}

void tells_a_truncated_shard(const MakeReader& make) {
  const auto reader = make(small_options());
  const TempFile file(6 * kBlock);
  const auto shard = Shard::open(file.path());
  ASSERT_EQ(::truncate(file.path().c_str(), 2 * kBlock + 5000), 0);
  for (const Way way : {Way::kDirect, Way::kBuffered}) {
    ReadRequest request = request_for(*shard, 0, 6 * kBlock, way);
    const AlignedBuffer buffer(request.bytes);
    request.target = buffer.data();
    const std::string error = read_one(*reader, request).error;
    EXPECT_TRUE(contains(error, concat("truncated: the file ends at ", 2 * kBlock + 5000, ",")));
    EXPECT_TRUE(contains(error, file.path()));
    // The rest of a failed request is not read, and the next one is not harmed.
    expect_reads(*reader, *shard, 100, 2 * kBlock, way);
  }
}

void tells_path_offset_and_errno(const MakeReader& make) {
  const auto reader = make(small_options());
  const TempFile file(4 * kBlock);
  const auto shard = Shard::open(file.path());
  void* forbidden = ::mmap(nullptr, kBlock, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(forbidden, MAP_FAILED);
  auto* target = static_cast<std::byte*>(forbidden);
  for (const bool buffered : {false, true}) {
    const std::string error =
        read_one(*reader, {shard.get(), 8192, 4096, 4096, target, 0, buffered}).error;
    EXPECT_TRUE(contains(error, file.path()));
    EXPECT_TRUE(contains(error, "offset 8192"));
    EXPECT_TRUE(contains(error, "(errno 14)"));
  }
  ::munmap(forbidden, kBlock);
  EXPECT_EQ(shard->direct(), Shard::open(file.path())->direct()) << "such an error must not latch";
}

void answers_false_when_all_requests_are_used(const MakeReader& make) {
  ReaderOptions options = small_options();
  options.requests = 3;
  const auto reader = make(options);
  EXPECT_EQ(reader->capacity(), 3u);
  const TempFile file(kBlock);
  const auto shard = Shard::open(file.path());
  const AlignedBuffer buffer(4 * 4096);
  const auto request = [&](uint64_t tag) {
    return ReadRequest{shard.get(), tag * 4096, 4096, 4096, buffer.data() + tag * 4096, tag, false};
  };
  for (uint64_t tag = 0; tag < 3; ++tag) EXPECT_TRUE(reader->submit(request(tag)));
  EXPECT_FALSE(reader->submit(request(3)));
  wait_for(*reader, 3);
  EXPECT_TRUE(buffer.untouched_from(3 * 4096)) << "what was not taken must not be read";
  EXPECT_EQ(read_one(*reader, request(3)).tag, 3u);
  EXPECT_EQ(first_mismatch(buffer.span(0, 4 * 4096), 0), 4 * 4096u);
}

void completes_many_requests_once_each(const MakeReader& make) {
  constexpr uint64_t kRequests = 150;
  const auto reader = make(small_options());
  const uint64_t size = 40 * kBlock + 77;
  const TempFile file(size);
  const auto shard = Shard::open(file.path());
  std::mt19937_64 random(20);
  std::vector<ReadRequest> requests;
  std::vector<AlignedBuffer> buffers;
  std::set<uint64_t> seen;
  const auto take = [&](size_t count) {
    for (const ReadCompletion& completion : wait_for(*reader, count)) {
      EXPECT_EQ(completion.error, "");
      EXPECT_TRUE(seen.insert(completion.tag).second) << "completed twice: " << completion.tag;
    }
  };
  size_t under_way = 0;
  for (uint64_t tag = 0; tag < kRequests; ++tag) {
    const uint64_t offset = random() % size;
    const uint64_t bytes = 1 + random() % std::min<uint64_t>(size - offset, 5 * kBlock);
    const Way way = random() % 4 == 0 ? Way::kBuffered : Way::kDirect;
    ReadRequest request = request_for(*shard, offset, static_cast<uint32_t>(bytes), way);
    request.target = buffers.emplace_back(request.bytes).data();
    request.tag = tag;
    requests.push_back(request);
    for (; !reader->submit(request); --under_way) take(1);
    ++under_way;
  }
  take(under_way);
  EXPECT_EQ(seen.size(), kRequests);
  for (size_t i = 0; i < kRequests; ++i) {
    const uint32_t need = requests[i].need_bytes;
    EXPECT_EQ(first_mismatch(buffers[i].span(0, need), requests[i].offset), need)
        << "request " << i;
    EXPECT_TRUE(buffers[i].guard_whole());
  }
}

void latches_a_refused_direct_read(const MakeReader& make) {
  const TempFile file(4 * kBlock);
  const auto shard = shard_that_refuses_unaligned(file.path(), DirectMode::kAuto);
  if (!shard) GTEST_SKIP() << "this file system refuses no direct read";
  const auto reader = make(small_options());
  const AlignedBuffer buffer(3 * kBlock);
  // Not aligned: a real EINVAL from the kernel, in several blocks at once.
  const ReadCompletion completion =
      read_one(*reader, {shard.get(), 1, 3 * kBlock, 3 * kBlock, buffer.data(), 0, false});
  EXPECT_EQ(completion.error, "");
  EXPECT_EQ(completion.bytes, 3 * kBlock);
  EXPECT_EQ(first_mismatch(buffer.span(0, 3 * kBlock), 1), 3 * kBlock);
  EXPECT_FALSE(shard->direct());
  EXPECT_TRUE(contains(shard->mode_reason(), "(errno 22)"));
  expect_reads(*reader, *shard, 0, 2 * kBlock, Way::kDirect);
}

void fails_a_refused_direct_read_where_required(const MakeReader& make) {
  const TempFile file(4 * kBlock);
  const auto shard = shard_that_refuses_unaligned(file.path(), DirectMode::kOn);
  if (!shard) GTEST_SKIP() << "this file system refuses no direct read";
  const auto reader = make(small_options());
  const AlignedBuffer buffer(kBlock);
  const ReadCompletion completion =
      read_one(*reader, {shard.get(), 1, kBlock, kBlock, buffer.data(), 0, false});
  EXPECT_TRUE(contains(completion.error, "(errno 22)"));
  EXPECT_TRUE(shard->direct());
  expect_reads(*reader, *shard, 4096, kBlock, Way::kDirect);
}

void drops_behind_only_what_was_not_cached(const MakeReader& make) {
  constexpr uint64_t kBytes = 8 * kBlock;
  // In the middle of blocks, of the parts in which they are dropped, and of pages.
  constexpr uint64_t kWarmBegin = 2 * kBlock + 40'001, kWarmEnd = 5 * kBlock + 90'001;
  constexpr uint64_t kEdge = kBlock / BlockRead::kStrips + 4096;
  const TempFile file(kBytes);
  const auto reader = make(small_options());
  for (const bool refused : {false, true}) {
    const auto shard = Shard::open(file.path());
    shard->drop_from_page_cache(0, kBytes);
    if (shard->cached(0, kBytes) != Cached::kNone) GTEST_SKIP() << "pages cannot be dropped here";
    std::vector<char> warmed(kWarmEnd - kWarmBegin);
    ASSERT_EQ(::pread(shard->buffered_fd(), warmed.data(), warmed.size(), kWarmBegin),
              static_cast<ssize_t>(warmed.size()));
    if (refused) {
      ASSERT_TRUE(shard->refuse_direct("for the test"));
    }
    for (int pass = 0; pass < 2; ++pass) {
      expect_reads(*reader, *shard, 0, kBytes, refused ? Way::kDirect : Way::kBuffered);
      EXPECT_EQ(shard->cached(kWarmBegin, kWarmEnd - kWarmBegin), Cached::kAll)
          << "it was there before: it stays";
      EXPECT_EQ(shard->cached(0, kWarmBegin - kEdge), Cached::kNone) << "only this brought it";
      EXPECT_EQ(shard->cached(kWarmEnd + kEdge, kBytes - kWarmEnd - kEdge), Cached::kNone);
    }
  }
}

void completes_requests_that_cannot_be_read(const MakeReader& make) {
  const auto reader = make(small_options());
  const TempFile file(kBlock);
  const auto shard = Shard::open(file.path());
  const AlignedBuffer buffer(kBlock);
  const ReadCompletion nothing = read_one(*reader, {shard.get(), 0, 0, 0, buffer.data(), 5, false});
  EXPECT_EQ(nothing.error, "");
  EXPECT_EQ(nothing.bytes, 0u);
  EXPECT_EQ(nothing.tag, 5u);
  const auto error_of = [&](const ReadRequest& request) {
    return read_one(*reader, request).error;
  };
  EXPECT_TRUE(contains(error_of({shard.get(), 0, 4096, 4097, buffer.data(), 0, false}), "4097"));
  EXPECT_TRUE(contains(error_of({nullptr, 0, 4096, 4096, buffer.data(), 0, false}), "shard"));
  EXPECT_TRUE(contains(error_of({shard.get(), 0, 4096, 4096, nullptr, 0, false}), "null"));
  EXPECT_TRUE(buffer.untouched_from(0));
  expect_reads(*reader, *shard, 0, kBlock, Way::kDirect);
}

void stays_ready_while_completions_are_left(const MakeReader& make) {
  const auto reader = make(small_options());
  EXPECT_FALSE(is_ready(*reader));
  const TempFile file(kBlock);
  const auto shard = Shard::open(file.path());
  const AlignedBuffer buffer(kBlock);
  for (uint64_t tag = 0; tag < 5; ++tag) {
    ASSERT_TRUE(
        reader->submit({shard.get(), 0, 4096, 4096, buffer.data() + tag * 4096, tag, false}));
  }
  std::array<ReadCompletion, 1> one;
  for (size_t left = 5; left > 0;) {
    pollfd entry{reader->ready_fd(), POLLIN, 0};
    ASSERT_EQ(::poll(&entry, 1, 30'000), 1) << left << " completions never came";
    left -= reader->poll(one);
  }
  EXPECT_EQ(reader->poll(one), 0u);
  EXPECT_FALSE(is_ready(*reader));
}

void writes_nothing_after_its_end(const MakeReader& make) {
  constexpr uint32_t kBytes = 64 * kBlock;
  const TempFile file(kBytes);
  const auto shard = Shard::open(file.path());
  const AlignedBuffer buffer(kBytes);
  for (int round = 0; round < 4; ++round) {
    shard->drop_from_page_cache(0, kBytes);
    ReaderOptions options = small_options();
    options.depth = 32;
    auto reader = make(options);
    ASSERT_TRUE(reader->submit({shard.get(), 0, kBytes, kBytes, buffer.data(), 0, false}));
    reader.reset();
    std::memset(buffer.data(), static_cast<int>(kGuard), kBytes);
    expect_reads(*make(small_options()), *shard, 0, kBytes, Way::kDirect);  // the drive is drained
    EXPECT_TRUE(buffer.untouched_from(0));
  }
}

void works_in_another_thread_than_its_maker(const MakeReader& make) {
  const TempFile file(8 * kBlock);
  const auto shard = Shard::open(file.path());
  const AlignedBuffer buffer(8 * kBlock);
  auto reader = make(small_options());
  std::thread([&] {
    expect_reads(*reader, *shard, 3, 5 * kBlock, Way::kDirect);
    EXPECT_TRUE(reader->submit({shard.get(), 0, 8 * kBlock, 8 * kBlock, buffer.data(), 0, false}));
  }).join();
  reader.reset();  // waits for the read that the thread left under way
  EXPECT_TRUE(buffer.guard_whole());
}

void refuses_useless_options(const MakeReader& make) {
  const auto with = [](auto change) {
    ReaderOptions options = small_options();
    change(options);
    return options;
  };
  EXPECT_THROW(make(with([](auto& options) { options.requests = 0; })), InvalidArgument);
  EXPECT_THROW(make(with([](auto& options) { options.depth = 0; })), InvalidArgument);
  EXPECT_THROW(make(with([](auto& options) { options.block_bytes = 0; })), InvalidArgument);
  EXPECT_THROW(make(with([](auto& options) { options.block_bytes = 2u << 30; })), InvalidArgument);
}

}  // namespace wsm::testing
