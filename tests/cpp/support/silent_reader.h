// A reader that takes requests and never answers.
#pragma once

#include <cstdint>
#include <span>

#include "storage/reader.h"

namespace wsm::testing {

class SilentReader final : public Reader {
 public:
  bool submit(const ReadRequest&) override { return true; }
  size_t poll(std::span<ReadCompletion>) override { return 0; }
  int ready_fd() const override { return -1; }
  uint32_t capacity() const override { return 64; }
  bool full() override { return false; }
  const char* name() const override { return "silent"; }
};

}  // namespace wsm::testing
