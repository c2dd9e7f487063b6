#include "memory/mapped_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include "util/align.h"
#include "util/check.h"

namespace wsm {
namespace {

constexpr uint64_t kHugePage = 2 * kMiB;

}  // namespace

uint64_t map_page_bytes() {
  static const auto bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Maps one huge page more than is wanted, and gives back what lies around the aligned part.
MappedMemory::MappedMemory(uint64_t bytes) {
  if (bytes == 0) return;
  const uint64_t mapped = align_up(bytes, map_page_bytes());
  const uint64_t reserved = checked_add(mapped, kHugePage);
  void* base = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED) {
    throw OutOfMemory(
        concat("cannot map ", static_cast<double>(mapped) / static_cast<double>(kMiB),
               " MiB of host memory: ", errno_text(errno),
               ". Lower host_memory, or raise the limit (ulimit -v, vm.overcommit_memory)"));
  }
  const auto begin = reinterpret_cast<uintptr_t>(base);
  const uint64_t head = align_up(begin, kHugePage) - begin;
  auto* const first = static_cast<std::byte*>(base);
  if (head > 0) munmap(first, head);
  munmap(first + head + mapped, kHugePage - head);
  data_ = first + head;
  bytes_ = mapped;
  // A kernel without huge pages refuses this: the memory is only slower to fill then.
  const uint64_t huge = align_down(bytes_, kHugePage);
  if (huge > 0) madvise(data_, huge, MADV_HUGEPAGE);
  if (madvise(data_, bytes_, MADV_DONTFORK) == 0) return;
  const int error = errno;
  munmap(data_, bytes_);
  throw Error(concat("cannot keep host memory out of forked children: ", errno_text(error)));
}

MappedMemory::~MappedMemory() {
  if (data_) munmap(data_, bytes_);
}

void MappedMemory::release(uint64_t begin, uint64_t bytes) {
  check(begin % map_page_bytes() == 0 && bytes % map_page_bytes() == 0 &&
            checked_add(begin, bytes) <= bytes_,
        bytes, " bytes at ", begin, " of ", bytes_, " are no whole pages to give back");
  madvise(data_ + begin, bytes, MADV_DONTNEED);
}

void MappedMemory::truncate(uint64_t bytes) {
  if (bytes >= bytes_) return;
  munmap(data_ + bytes, bytes_ - bytes);
  bytes_ = bytes;
  if (bytes == 0) data_ = nullptr;
}

}  // namespace wsm
