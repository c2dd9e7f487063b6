// EXPECT_TRUE(contains(error, "offset 4096")): shows the whole text when it does not.
#pragma once

#include <gtest/gtest.h>

#include <string>

namespace wsm::testing {

inline ::testing::AssertionResult contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "\"" << part << "\" is not in \"" << text << "\"";
}

}  // namespace wsm::testing
