#include "storage/block_read.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "util/align.h"
#include "util/check.h"

namespace wsm {

BlockRead::BlockRead(const ReadRequest& request, uint32_t slot, uint32_t begin, uint32_t bytes)
    : shard_(request.shard),
      offset_(request.offset + begin),
      target_(request.target + begin),
      bytes_(bytes),
      need_(std::min(bytes, request.need_bytes - std::min(begin, request.need_bytes))),
      slot_(slot),
      cache_wanted_(request.buffered) {}

void BlockRead::start() {
  direct_ = !cache_wanted_ && shard_->direct();
  drop_behind_ = !direct_ && !cache_wanted_ && shard_->drops_behind() &&
                 !shard_->in_page_cache(offset_, bytes_);
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
  if (got == 0 || at_end_of_file()) return finish_at_end();
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

bool BlockRead::at_end_of_file() const {
  struct stat info{};
  return ::fstat(shard_->buffered_fd(), &info) == 0 &&
         static_cast<uint64_t>(info.st_size) <= offset_ + done_;
}

bool BlockRead::finish_at_end() {
  if (done_ >= need_) return finish();
  return fail(concat("truncated: the file ends at ", offset_ + done_, ", but must reach to ",
                     offset_ + need_, "; it changed, or was not copied whole"));
}

bool BlockRead::finish() {
  if (drop_behind_) shard_->drop_from_page_cache(offset_, bytes_);
  return true;
}

bool BlockRead::fail(const std::string& why) {
  error_ = concat("cannot read ", length(), " bytes at offset ", offset(), " of ", shard_->path(),
                  ": ", why);
  return finish();
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
