#include "storage/block_read.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "storage/page_cache.h"
#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

constexpr uint32_t kRangeBlockBytes = kMiB;

uint64_t strip_bytes(uint32_t block_bytes) {
  return align_up((block_bytes + BlockRead::kStrips - 1) / BlockRead::kStrips, page_bytes());
}

}  // namespace

BlockRead::BlockRead(const ReadRequest& request, uint32_t slot, uint32_t begin, uint32_t bytes)
    : shard_(request.shard),
      offset_(request.offset + begin),
      target_(request.target + begin),
      bytes_(bytes),
      need_(std::min(bytes, request.need_bytes - std::min(begin, request.need_bytes))),
      slot_(slot),
      buffered_(request.buffered) {}

void BlockRead::start() {
  direct_ = !buffered_ && shard_->direct();
  cold_strips_.reset();
  if (!direct_ && !shard_->in_memory()) cold_strips_ = find_cold_strips();
}

std::bitset<BlockRead::kStrips> BlockRead::find_cold_strips() const {
  std::bitset<kStrips> cold;
  const Cached whole = shard_->cached(offset_, bytes_);
  if (whole == Cached::kAll) return cold;
  if (whole < Cached::kSome) return cold.set();
  const uint64_t step = strip_bytes(bytes_);
  for (uint64_t strip = 0, at = 0; at < bytes_; ++strip, at += step) {
    const uint64_t length = std::min<uint64_t>(step, bytes_ - at);
    if (shard_->cached(offset_ + at, length) == Cached::kNone) cold.set(strip);
  }
  return cold;
}

void BlockRead::drop_cold_strips() const {
  if (cold_strips_.all()) return shard_->drop_from_page_cache(offset_, bytes_);
  const uint64_t step = strip_bytes(bytes_);
  for (uint64_t strip = 0, at = 0; at < bytes_; ++strip, at += step) {
    if (!cold_strips_[strip]) continue;
    shard_->drop_from_page_cache(offset_ + at, std::min<uint64_t>(step, bytes_ - at));
  }
}

uint32_t BlockRead::from() const {
  if (!direct_) return done_;
  return static_cast<uint32_t>(align_down(done_, shard_->alignment()));
}

bool BlockRead::advance(int64_t result) {
  return result < 0 ? retry_after(static_cast<int>(-result))
                    : advance_by(static_cast<uint32_t>(result));
}

bool BlockRead::advance_by(uint32_t got) {
  const uint32_t reached = from() + got;
  if (reached > done_) {
    done_ = reached;
    idle_reads_ = 0;
    return done_ >= std::max(need_, 1u) ? finish() : false;
  }
  // A short direct read may end where the last one did, before the end of the file.
  if (got == 0 || file_end() <= offset_ + done_) return finish_at_end();
  return retry_idle("reads bring nothing new");
}

bool BlockRead::retry_after(int error) {
  if (error == EINTR || error == EAGAIN) return retry_idle(errno_text(error));
  if (direct_ && (error == EINVAL || error == EOPNOTSUPP)) {
    const bool latched = shard_->refuse_direct(
        concat("a direct read of ", length(), " bytes at offset ", offset(), " to address ",
               static_cast<const void*>(target()), " was refused: ", errno_text(error)));
    if (latched) {
      start();
      return false;
    }
  }
  return fail(errno_text(error));
}

bool BlockRead::retry_idle(const std::string& why) {
  if (++idle_reads_ <= kMaxIdleReads) return false;
  return fail(concat(why, ", ", kMaxIdleReads, " times in a row"));
}

uint64_t BlockRead::file_end() const {
  struct stat info{};
  const bool told = ::fstat(shard_->buffered_fd(), &info) == 0;
  return told ? static_cast<uint64_t>(info.st_size) : UINT64_MAX;
}

bool BlockRead::finish_at_end() {
  if (done_ >= need_) return finish();
  const uint64_t end = std::min(file_end(), offset_ + done_);
  return fail(concat("truncated: the file ends at ", end, ", but must reach to ", offset_ + need_,
                     "; it changed, or was not copied whole"));
}

bool BlockRead::finish() {
  if (cold_strips_.any()) drop_cold_strips();
  return true;
}

bool BlockRead::fail(const std::string& why) {
  error_ = concat("cannot read ", length(), " bytes at offset ", offset(), " of ", shard_->path(),
                  ": ", why);
  return finish();
}

void read_extent(Shard& shard, uint64_t offset, uint64_t bytes, std::byte* target) {
  for (uint64_t done = 0; done < bytes;) {
    const auto count = static_cast<uint32_t>(std::min<uint64_t>(bytes - done, kRangeBlockBytes));
    ReadRequest request;
    request.shard = &shard;
    request.offset = offset + done;
    request.bytes = request.need_bytes = count;
    request.target = target + done;
    request.buffered = true;
    BlockRead block(request, 0, 0, count);
    block.start();
    while (!block.advance(read_now(block))) continue;
    check<IoError>(block.error().empty(), block.error());
    done += count;
  }
}

int64_t read_now(const BlockRead& block) {
  const Shard& shard = block.shard();
  if (shard.memory() == nullptr) {
    const ssize_t got =
        ::pread(block.fd(), block.target(), block.length(), static_cast<off_t>(block.offset()));
    return got < 0 ? -errno : got;
  }
  if (block.offset() >= shard.bytes()) return 0;
  const uint64_t left = shard.bytes() - block.offset();
  const uint64_t bytes = std::min<uint64_t>(block.length(), left);
  std::memcpy(block.target(), shard.memory() + block.offset(), bytes);
  return static_cast<int64_t>(bytes);
}

}  // namespace wsm
