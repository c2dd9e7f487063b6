#include "storage/request_queue.h"

#include <gtest/gtest.h>

#include <array>
#include <cstddef>

#include "storage/shard.h"

namespace wsm {
namespace {

// A reader that has as much under way as it asked for takes no more until a request is done.
TEST(RequestQueue, TakesNoMoreThanTheBytesAskedFor) {
  std::array<std::byte, 4096> memory{};
  const auto shard = Shard::from_memory("memory", memory.data(), memory.size());
  RequestQueue queue({.requests = 8, .block_bytes = 1000, .depth = 1, .open_bytes = 3000});
  ReadRequest request;
  request.shard = shard.get();
  request.bytes = request.need_bytes = 1400;
  request.target = memory.data();
  ASSERT_TRUE(queue.add(request));
  ASSERT_TRUE(queue.add(request));
  EXPECT_FALSE(queue.full());  // 2800 bytes: the next goes over it
  ASSERT_TRUE(queue.add(request));
  EXPECT_TRUE(queue.full());
  EXPECT_FALSE(queue.add(request));

  BlockRead block;
  ASSERT_TRUE(queue.next(&block));
  block.fail("for the test");
  ASSERT_TRUE(queue.finish(block));
  EXPECT_FALSE(queue.full());
  EXPECT_TRUE(queue.add(request));
  EXPECT_TRUE(queue.full());
}

TEST(RequestQueue, WhatIsNotReadIsNotUnderWay) {
  RequestQueue queue({.requests = 2, .open_bytes = 1});
  ReadRequest request;  // without a shard: done at once, with an error
  request.bytes = 1000;
  ASSERT_TRUE(queue.add(request));
  EXPECT_FALSE(queue.full());
  ASSERT_TRUE(queue.add(request));
  EXPECT_TRUE(queue.full());  // there are two requests
  std::array<ReadCompletion, 2> done;
  EXPECT_EQ(queue.pop_done(done), 2u);
  EXPECT_FALSE(queue.full());
}

}  // namespace
}  // namespace wsm
