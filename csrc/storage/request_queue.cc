#include "storage/request_queue.h"

#include <algorithm>
#include <utility>

#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

constexpr uint64_t kMaxBlockBytes = kGiB;  // Linux cuts a read at 2 GiB less a page

std::string refusal_of(const ReadRequest& request) {
  if (request.shard == nullptr) return "read request without a shard";
  if (request.target == nullptr) return concat("read of ", request.shard->path(), " to null");
  if (request.need_bytes > request.bytes) {
    return concat("read of ", request.bytes, " bytes at offset ", request.offset, " of ",
                  request.shard->path(), " cannot bring the ", request.need_bytes, " needed");
  }
  return {};
}

}  // namespace

RequestQueue::RequestQueue(const ReaderOptions& options)
    : block_bytes_(options.block_bytes),
      most_open_bytes_(options.open_bytes),
      slots_(options.requests),
      free_(options.requests),
      waiting_(options.requests),
      done_(options.requests) {
  check(options.requests > 0 && options.depth > 0,
        "a reader needs requests and depth of at least 1");
  check(options.block_bytes > 0 && options.block_bytes <= kMaxBlockBytes,
        "a reader's block_bytes must be in 1 .. ", kMaxBlockBytes, ", not ", options.block_bytes);
  for (uint32_t index = 0; index < options.requests; ++index) free_.push(index);
}

bool RequestQueue::add(const ReadRequest& request, std::string refusal) {
  if (full()) return false;
  const uint32_t index = free_.pop();
  Slot& slot = slots_[index];
  slot.request = request;
  slot.cut_bytes = 0;
  slot.done_bytes = 0;
  slot.error = refusal.empty() ? refusal_of(request) : std::move(refusal);
  const bool nothing_to_read = !slot.error.empty() || request.bytes == 0;
  (nothing_to_read ? done_ : waiting_).push(index);
  if (!nothing_to_read) open_bytes_ += request.bytes;
  return true;
}

bool RequestQueue::next(BlockRead* block) {
  if (waiting_.empty()) return false;
  const uint32_t index = waiting_.front();
  Slot& slot = slots_[index];
  const uint32_t alignment = slot.request.shard->alignment();
  const uint32_t step = std::max(block_bytes_ - block_bytes_ % alignment, alignment);
  const uint32_t bytes = std::min(step, slot.request.bytes - slot.cut_bytes);
  *block = BlockRead(slot.request, index, slot.cut_bytes, bytes);
  slot.cut_bytes += bytes;
  ++slot.flying_blocks;
  if (slot.cut_bytes == slot.request.bytes) waiting_.pop();
  return true;
}

bool RequestQueue::finish(BlockRead& block) {
  Slot& slot = slots_[block.slot()];
  slot.done_bytes += block.done();
  --slot.flying_blocks;
  if (!block.error().empty()) {
    if (slot.error.empty()) slot.error = std::move(block.error());
    if (slot.cut_bytes < slot.request.bytes) waiting_.pop();  // it is the first: see waiting_
    slot.cut_bytes = slot.request.bytes;
  }
  if (slot.flying_blocks > 0 || slot.cut_bytes < slot.request.bytes) return false;
  open_bytes_ -= slot.request.bytes;
  done_.push(block.slot());
  return true;
}

size_t RequestQueue::pop_done(std::span<ReadCompletion> completions) {
  size_t count = 0;
  for (; count < completions.size() && !done_.empty(); ++count) {
    const uint32_t index = done_.pop();
    Slot& slot = slots_[index];
    completions[count].tag = slot.request.tag;
    completions[count].bytes = slot.done_bytes;
    completions[count].error = std::move(slot.error);
    free_.push(index);
  }
  return count;
}

}  // namespace wsm
