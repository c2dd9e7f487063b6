// Host memory by mmap, in huge pages where the kernel has them. Not inherited by a forked child
// (MADV_DONTFORK). Pages are taken when they are first written to; huge ones are asked for in whole
// 2 MiB pieces only, so no more becomes resident than was asked for.
//
// Lifecycle: mapped at construction, begun at a multiple of 2 MiB; unmapped by the destructor.
// Failure: what cannot be mapped throws OutOfMemory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace wsm {

uint64_t map_page_bytes();  // what mappings are rounded to

class MappedMemory {
 public:
  explicit MappedMemory(uint64_t bytes);
  ~MappedMemory();
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;

  std::byte* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }  // whole pages; 0: nothing is mapped
  // Both by whole pages. A part that is given back may be written to again.
  void release(uint64_t begin, uint64_t bytes);
  void truncate(uint64_t bytes);

 private:
  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
};

}  // namespace wsm
