// A reader that takes requests and never answers.
#pragma once

#include <atomic>
#include <cstdint>
#include <span>

#include "storage/reader.h"

namespace wsm::testing {

class SilentReader final : public Reader {
 public:
  explicit SilentReader(std::atomic<int>* requests = nullptr) : requests_(requests) {}

  bool submit(const ReadRequest&) override {
    if (requests_ != nullptr) ++*requests_;
    return true;
  }
  size_t poll(std::span<ReadCompletion>) override { return 0; }
  int ready_fd() const override { return -1; }
  uint32_t capacity() const override { return 64; }
  bool full() override { return false; }
  const char* name() const override { return "silent"; }

 private:
  std::atomic<int>* const requests_;  // counted, where given
};

}  // namespace wsm::testing
