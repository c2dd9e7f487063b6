// One io_uring, driven by the caller's thread: the way of choice for direct reads, which the kernel
// completes without any thread of ours. Blocks beyond `depth` wait in the queue.
//
//   submit, poll -> push_on: cut blocks into the ring, one io_uring_enter for all
//   poll         -> reap: completions into a list; act: advance each block; push_on
//
// The completions are acted on after the reaping, in one place: what acting prepares never meets a
// completion queue that is being walked.
#include "storage/reader.h"

#if WSM_HAVE_LIBURING

#include <liburing.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <utility>
#include <vector>

#include "storage/block_read.h"
#include "storage/request_queue.h"
#include "util/check.h"
#include "util/event_fd.h"
#include "util/unique_fd.h"

namespace wsm {
namespace {

constexpr unsigned kMaxDepth = 4096;
constexpr long kProbeSeconds = 5;

// Owns a ring, or the errno for which there is none.
class Ring {
 public:
  explicit Ring(unsigned entries) {
    // Cooperative task running spares the thread an interrupt for each completion; since
    // Linux 5.19.
    error_ =
        init(entries, IORING_SETUP_CLAMP | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG);
    if (error_ == EINVAL) error_ = init(entries, IORING_SETUP_CLAMP);
  }
  ~Ring() {
    if (error_ == 0) ::io_uring_queue_exit(&ring_);
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  int error() const { return error_; }
  io_uring* get() { return &ring_; }

 private:
  int init(unsigned entries, unsigned flags) {
    io_uring_params params{};
    params.flags = flags;
    return -::io_uring_queue_init_params(entries, &ring_, &params);
  }

  io_uring ring_{};
  int error_ = 0;
};

std::string likely_cause(int error) {
  if (error == ENOSYS) return "; this kernel or sandbox has no io_uring";
  if (error == ENOMEM) return "; raise the limit on locked memory (ulimit -l)";
  if (error != EPERM && error != EACCES) return {};
  int disabled = 0;
  std::ifstream("/proc/sys/kernel/io_uring_disabled") >> disabled;
  if (disabled != 0) return concat("; the sysctl kernel.io_uring_disabled is ", disabled);
  return "; a seccomp filter, as containers have, is the likely cause";
}

// One real read through the ring: a version, or a ring alone, does not prove that reads are
// allowed. Returns why not, else an empty string.
std::string probe(io_uring* ring) {
  const UniqueFd file(::memfd_create("wsm-probe", MFD_CLOEXEC));
  const char wanted = 'w';
  if (!file.valid() || ::write(file.get(), &wanted, 1) != 1) return {};  // no fault of the ring
  auto got = std::make_unique<char>('\0');
  ::io_uring_prep_read(::io_uring_get_sqe(ring), file.get(), got.get(), 1, 0);
  const int submitted = ::io_uring_submit(ring);
  if (submitted < 0) {
    return concat("io_uring_enter: ", errno_text(-submitted), likely_cause(-submitted));
  }
  __kernel_timespec limit{kProbeSeconds, 0};
  io_uring_cqe* cqe = nullptr;
  int waited = 0;
  do {
    waited = ::io_uring_wait_cqe_timeout(ring, &cqe, &limit);
  } while (waited == -EINTR);
  if (waited < 0) {
    [[maybe_unused]] const auto* const left = got.release();  // the kernel may still write there
    return concat("a first read did not complete: ", errno_text(-waited));
  }
  const int result = cqe->res;
  ::io_uring_cqe_seen(ring, cqe);
  if (result < 0) return concat("a first read: ", errno_text(-result), likely_cause(-result));
  return result == 1 && *got == wanted ? "" : "a first read brought wrong bytes";
}

class UringReader final : public Reader {
 public:
  explicit UringReader(const ReaderOptions& options)
      : queue_(options), ring_(std::min(options.depth, kMaxDepth)) {
    const uint32_t depth = std::min(options.depth, kMaxDepth);
    blocks_.resize(depth);
    free_.reserve(depth);
    prepared_.reserve(depth);
    reaped_.reserve(depth);
    for (uint32_t i = 0; i < depth; ++i) free_.push_back(i);
  }

  // Waits for the kernel: a target must not be written to once the reader is gone.
  ~UringReader() override {
    while (in_kernel() > 0) {
      io_uring_cqe* cqe = nullptr;
      if (::io_uring_wait_cqe(ring_.get(), &cqe) == 0) reap();
    }
  }

  std::string start() {
    if (ring_.error() != 0) {
      return concat("io_uring_setup: ", errno_text(ring_.error()), likely_cause(ring_.error()));
    }
    std::string why_not = probe(ring_.get());
    if (!why_not.empty()) return why_not;
    const int error = -::io_uring_register_eventfd(ring_.get(), done_.fd());
    if (error == 0) return {};
    return concat("io_uring_register_eventfd: ", errno_text(error), likely_cause(error));
  }

  bool submit(const ReadRequest& request) override {
    const bool memory = request.shard != nullptr && request.shard->memory() != nullptr;
    if (!queue_.add(request, memory ? "the uring reader does not read memory shards" : "")) {
      return false;
    }
    push_on();
    return true;
  }

  size_t poll(std::span<ReadCompletion> completions) override {
    done_.clear();  // before the reaping: what completes after it raises the flag again
    reap();
    act();
    const size_t count = queue_.pop_done(completions);
    push_on();
    return count;
  }

  int ready_fd() const override { return done_.fd(); }
  uint32_t capacity() const override { return queue_.capacity(); }
  bool full() override { return queue_.full(); }
  const char* name() const override { return "uring"; }
  int broken() const override { return broken_; }

 private:
  struct Reaped {
    uint32_t block;
    int32_t result;
  };

  size_t in_kernel() const {
    return blocks_.size() - free_.size() - prepared_.size() - reaped_.size();
  }

  void reap() {
    std::array<io_uring_cqe*, 64> batch;
    unsigned count = 0;
    do {
      count = ::io_uring_peek_batch_cqe(ring_.get(), batch.data(), batch.size());
      for (unsigned i = 0; i < count; ++i) {
        reaped_.push_back({static_cast<uint32_t>(batch[i]->user_data), batch[i]->res});
      }
      ::io_uring_cq_advance(ring_.get(), count);
    } while (count == batch.size());
  }

  void act() {
    for (const Reaped& reaped : reaped_) {
      if (blocks_[reaped.block].advance(reaped.result)) {
        finish(reaped.block);
      } else {
        prepare(reaped.block);
      }
    }
    reaped_.clear();
  }

  void push_on() {
    while (!free_.empty() && queue_.any_waiting()) {
      const uint32_t index = free_.back();
      free_.pop_back();
      queue_.next(&blocks_[index]);
      blocks_[index].start();
      prepare(index);
    }
    submit_prepared();
    if (queue_.any_done() || !prepared_.empty()) done_.raise();
  }

  void prepare(uint32_t index) {
    prepared_.push_back(index);
    if (broken_ != 0) return;
    const BlockRead& block = blocks_[index];
    // Never null: the submission queue is as long as there are blocks.
    io_uring_sqe* sqe = ::io_uring_get_sqe(ring_.get());
    ::io_uring_prep_read(sqe, block.fd(), block.target(), block.length(), block.offset());
    ::io_uring_sqe_set_data64(sqe, index);
    // A buffered read would copy in this thread, here and now: leave it to the kernel's workers.
    if (!block.direct()) ::io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
  }

  void submit_prepared() {
    if (prepared_.empty()) return;
    if (broken_ == 0) {
      const int taken = ::io_uring_submit(ring_.get());
      if (taken >= 0) prepared_.erase(prepared_.begin(), prepared_.begin() + taken);
      // What the kernel does not take for the moment is submitted by the next poll.
      if (taken >= 0 || taken == -EINTR || taken == -EAGAIN || taken == -EBUSY) return;
      broken_ = -taken;
    }
    for (const uint32_t index : prepared_) {
      blocks_[index].fail(concat("io_uring_enter: ", errno_text(broken_), likely_cause(broken_)));
      finish(index);
    }
    prepared_.clear();
  }

  void finish(uint32_t index) {
    queue_.finish(blocks_[index]);
    free_.push_back(index);
  }

  EventFd done_;
  RequestQueue queue_;
  Ring ring_;
  std::atomic<int> broken_{0};  // then nothing is submitted any more

  // Each block is in one of: free_, prepared_ (in the submission queue, in this order), the kernel,
  // reaped_.
  std::vector<BlockRead> blocks_;
  std::vector<uint32_t> free_;
  std::vector<uint32_t> prepared_;
  std::vector<Reaped> reaped_;
};

}  // namespace

std::unique_ptr<Reader> make_uring_reader(const ReaderOptions& options, std::string* why_not) {
  auto reader = std::make_unique<UringReader>(options);
  std::string why = reader->start();
  if (why.empty()) return reader;
  if (why_not != nullptr) *why_not = std::move(why);
  return nullptr;
}

}  // namespace wsm

#else

namespace wsm {

std::unique_ptr<Reader> make_uring_reader(const ReaderOptions&, std::string* why_not) {
  if (why_not != nullptr) *why_not = "built without liburing";
  return nullptr;
}

}  // namespace wsm

#endif  // WSM_HAVE_LIBURING
