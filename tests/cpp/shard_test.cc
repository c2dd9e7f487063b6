#include "storage/shard.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <filesystem>
#include <fstream>
#include <vector>

#include "storage/page_cache.h"
#include "support/contains.h"
#include "support/temp_file.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm::testing {
namespace {

template <typename Function>
std::string error_of(Function function) {
  try {
    function();
  } catch (const IoError& error) {
    return error.what();
  }
  return {};
}

TEST(Shard, OpensAFile) {
  const TempFile file(12345);
  const auto shard = Shard::open(file.path());
  EXPECT_EQ(shard->path(), file.path());
  EXPECT_EQ(shard->bytes(), 12345u);
  EXPECT_EQ(shard->memory(), nullptr);
  EXPECT_GE(shard->buffered_fd(), 0);
  EXPECT_EQ(::fcntl(shard->buffered_fd(), F_GETFD), FD_CLOEXEC);
  EXPECT_EQ(::fcntl(shard->buffered_fd(), F_GETFL) & O_NONBLOCK, 0) << "io_uring would give EAGAIN";
  EXPECT_NE(shard->mode_reason(), "");
  EXPECT_EQ(shard->direct(), shard->direct_fd() >= 0);
}

TEST(Shard, ReadsDirectlyWhereTheFileSystemDoes) {
  const TempFile file(8192);
  const int probe = ::open(file.path().c_str(), O_RDONLY | O_DIRECT);
  if (probe < 0) GTEST_SKIP() << "no O_DIRECT here";
  ::close(probe);
  const auto shard = Shard::open(file.path(), DirectMode::kOn);
  EXPECT_TRUE(shard->direct());
  EXPECT_NE(::fcntl(shard->direct_fd(), F_GETFL) & O_DIRECT, 0);
  EXPECT_EQ(::fcntl(shard->direct_fd(), F_GETFD), FD_CLOEXEC);
  EXPECT_EQ(shard->alignment(), direct_alignment(file.path()));
  EXPECT_TRUE(std::has_single_bit(shard->alignment()));
  EXPECT_FALSE(shard->direct_refused());
  EXPECT_FALSE(shard->in_memory());
  EXPECT_FALSE(lies_in_memory(file.path()));
}

TEST(Shard, OpensAnEmptyFile) {
  const TempFile file(0);
  EXPECT_EQ(Shard::open(file.path())->bytes(), 0u);
}

TEST(Shard, StaysBufferedWhereTurnedOff) {
  const TempFile file(8192);
  const auto shard = Shard::open(file.path(), DirectMode::kOff);
  EXPECT_FALSE(shard->direct());
  EXPECT_FALSE(shard->direct_refused()) << "nobody asked for them";
  EXPECT_TRUE(contains(shard->mode_reason(), "turned off"));
}

TEST(Shard, StaysBufferedOnTmpfs) {
  const TempFolder folder("/dev/shm");
  write_pattern_file(folder / "shard", 8192);
  const auto shard = Shard::open(folder / "shard");
  EXPECT_FALSE(shard->direct());
  EXPECT_EQ(shard->mode_reason(), "tmpfs");
  EXPECT_FALSE(shard->direct_refused());
  EXPECT_TRUE(shard->in_memory());
  EXPECT_TRUE(lies_in_memory(folder / "shard"));
  EXPECT_TRUE(shard->in_page_cache(0, 8192));
  const auto error = error_of([&] { Shard::open(folder / "shard", DirectMode::kOn); });
  EXPECT_TRUE(contains(error, folder / "shard"));
  EXPECT_TRUE(contains(error, "tmpfs"));
}

TEST(Shard, LatchesOnceAndKeepsTheFirstReason) {
  const TempFile file(8192);
  const auto shard = Shard::open(file.path());
  if (!shard->direct()) GTEST_SKIP() << shard->mode_reason();
  EXPECT_TRUE(shard->refuse_direct("first"));
  EXPECT_TRUE(shard->refuse_direct("second"));
  EXPECT_FALSE(shard->direct());
  EXPECT_TRUE(shard->direct_refused());
  EXPECT_EQ(shard->mode_reason(), "first");
}

TEST(Shard, DoesNotLatchWhereDirectIsRequired) {
  const TempFile file(8192);
  const auto probe = Shard::open(file.path());
  if (!probe->direct()) GTEST_SKIP() << probe->mode_reason();
  const auto shard = Shard::open(file.path(), DirectMode::kOn);
  EXPECT_FALSE(shard->refuse_direct("refused"));
  EXPECT_TRUE(shard->direct());
}

TEST(Shard, BorrowsMemory) {
  const std::vector<std::byte> bytes(100);
  const auto shard = Shard::from_memory("weight", bytes.data(), bytes.size());
  EXPECT_EQ(shard->path(), "weight");
  EXPECT_EQ(shard->bytes(), 100u);
  EXPECT_EQ(shard->memory(), bytes.data());
  EXPECT_EQ(shard->alignment(), 1u);
  EXPECT_FALSE(shard->direct());
  EXPECT_EQ(shard->mode_reason(), "memory");
  EXPECT_TRUE(shard->in_memory());
  EXPECT_TRUE(shard->in_page_cache(0, 100));
  shard->drop_from_page_cache(0, 100);
  shard->check_unchanged();
  EXPECT_NE(Shard::from_memory("empty", nullptr, 0)->memory(), nullptr);
  EXPECT_THROW(Shard::from_memory("lost", nullptr, 1), InvalidArgument);
}

TEST(Shard, FollowsSymbolicLinks) {
  const TempFolder folder;
  write_pattern_file(folder / "blob", 5000);
  std::filesystem::create_symlink("blob", folder / "model.safetensors");
  const auto shard = Shard::open(folder / "model.safetensors");
  EXPECT_EQ(shard->bytes(), 5000u);
  shard->check_unchanged();
  write_pattern_file(folder / "other", 5000);
  std::filesystem::remove(folder / "model.safetensors");
  std::filesystem::create_symlink("other", folder / "model.safetensors");
  EXPECT_TRUE(contains(error_of([&] { shard->check_unchanged(); }), "replaced"));
}

TEST(Shard, RefusesWhatIsNoRegularFile) {
  const TempFolder folder;
  EXPECT_TRUE(
      contains(error_of([&] { Shard::open(folder.path()); }), folder.path() + " is a directory"));
  EXPECT_TRUE(contains(error_of([&] { Shard::open(folder / "absent"); }),
                       folder / "absent: No such file or directory (errno 2)"));
  EXPECT_TRUE(contains(error_of([&] { direct_alignment(folder / "absent"); }), "(errno 2)"));
  ASSERT_EQ(::mkfifo((folder / "fifo").c_str(), 0600), 0);
  EXPECT_TRUE(contains(error_of([&] { Shard::open(folder / "fifo"); }), "not a regular file"));
}

TEST(Shard, TellsWhetherARangeIsCachedAndDropsIt) {
  const uint64_t size = 8 * kMiB + 100;
  const TempFile file(size);
  const auto shard = Shard::open(file.path());
  shard->drop_from_page_cache(0, size);
  EXPECT_FALSE(shard->in_page_cache(0, size));
  EXPECT_FALSE(shard->in_page_cache(size - 1, 1));

  const UniqueFd fd(::open(file.path().c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_EQ(::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_RANDOM), 0);
  std::vector<char> buffer(kMiB);
  ASSERT_EQ(::pread(fd.get(), buffer.data(), kMiB, 4 * kMiB), static_cast<ssize_t>(kMiB));
  EXPECT_TRUE(shard->in_page_cache(4 * kMiB, kMiB));
  EXPECT_TRUE(shard->in_page_cache(4 * kMiB + 1, kMiB - 2));
  EXPECT_FALSE(shard->in_page_cache(4 * kMiB - 3 * page_bytes(), kMiB)) << "three are not there";
  EXPECT_FALSE(shard->in_page_cache(0, size));

  shard->drop_from_page_cache(4 * kMiB, kMiB);
  EXPECT_FALSE(shard->in_page_cache(4 * kMiB, kMiB));
  ASSERT_EQ(::pread(fd.get(), buffer.data(), kMiB, 8 * kMiB), 100);
  EXPECT_TRUE(shard->in_page_cache(8 * kMiB, kMiB)) << "the range is cut at the end of the file";
  EXPECT_FALSE(shard->in_page_cache(size, 4096)) << "nothing is there to be cached";
}

TEST(PageCache, BothWaysAgree) {
  const uint64_t size = 20 * kMiB;  // more pages than mincore is asked about at once
  const TempFile file(size);
  const auto shard = Shard::open(file.path());
  shard->drop_from_page_cache(0, size);
  const int fd = shard->buffered_fd();
  const bool told = cached_by_cachestat(fd, 0, size) != Cached::kUnknown;  // not by older kernels
  const auto expect = [&](Cached wanted, uint64_t offset, uint64_t bytes) {
    EXPECT_EQ(cached_by_mincore(fd, offset, bytes), wanted) << bytes << " bytes at " << offset;
    EXPECT_EQ(cached_by_cachestat(fd, offset, bytes), told ? wanted : Cached::kUnknown);
    EXPECT_EQ(cached(fd, offset, bytes), wanted);
  };
  expect(Cached::kNone, 0, size);
  std::vector<char> buffer(size);
  ASSERT_EQ(::pread(fd, buffer.data(), size, 0), static_cast<ssize_t>(size));
  expect(Cached::kAll, 0, size);
  shard->drop_from_page_cache(size - kMiB, kMiB);
  expect(Cached::kSome, 0, size);
  expect(Cached::kSome, size - kMiB - 1, 2);
  expect(Cached::kAll, 0, size - kMiB);
  expect(Cached::kNone, size - kMiB, kMiB);
  // One page in 128 may lack: of 2 MiB, four.
  const uint64_t page = page_bytes();
  for (const uint64_t at : {3, 100, 101, 200}) shard->drop_from_page_cache(at * page, page);
  if (page != 4096) return;
  expect(Cached::kMost, 0, 2 * kMiB);
  EXPECT_TRUE(shard->in_page_cache(0, 2 * kMiB));
  shard->drop_from_page_cache(300 * page, page);
  expect(Cached::kSome, 0, 2 * kMiB);
  EXPECT_FALSE(shard->in_page_cache(0, 2 * kMiB));
}

class ChangedShard : public ::testing::Test {
 protected:
  std::string change() {
    return error_of([&] { shard_->check_unchanged(); });
  }
  TempFolder folder_;
  std::string path_ = folder_ / "shard";
  std::unique_ptr<Shard> shard_ = (write_pattern_file(path_, 5000), Shard::open(path_));
};

TEST_F(ChangedShard, IsLeftAloneUnchanged) { EXPECT_EQ(change(), ""); }

TEST_F(ChangedShard, IsFoundReplaced) {
  write_pattern_file(folder_ / "new", 5000);
  std::filesystem::rename(folder_ / "new", path_);
  EXPECT_TRUE(contains(change(), path_ + " was replaced"));
}

TEST_F(ChangedShard, IsFoundTruncated) {
  std::filesystem::resize_file(path_, 4999);
  EXPECT_TRUE(contains(change(), "truncated from 5000 to 4999 bytes"));
}

TEST_F(ChangedShard, IsFoundGrown) {
  std::filesystem::resize_file(path_, 5001);
  EXPECT_TRUE(contains(change(), "grown from 5000 to 5001 bytes"));
}

TEST_F(ChangedShard, IsFoundModified) {
  const auto time = std::filesystem::last_write_time(path_);
  std::filesystem::last_write_time(path_, time + std::chrono::nanoseconds(4));
  EXPECT_TRUE(contains(change(), "modified"));
}

TEST_F(ChangedShard, IsFoundDeleted) {
  std::filesystem::remove(path_);
  EXPECT_TRUE(contains(change(), "deleted"));
}

}  // namespace
}  // namespace wsm::testing
