#include "support/temp_file.h"

#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "util/check.h"
#include "util/unique_fd.h"

namespace wsm::testing {
namespace {

std::string parent_folder() {
  const char* folder = std::getenv("TMPDIR");
  return folder != nullptr && *folder != '\0' ? folder : "/var/tmp";
}

// Eight pattern bytes, the lowest first (splitmix64).
uint64_t pattern_word(uint64_t index, uint64_t seed) {
  uint64_t z = (index + 1) * 0x9e3779b97f4a7c15ull ^ seed * 0xd1342543de82ef95ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

}  // namespace

std::byte pattern_at(uint64_t offset, uint64_t seed) {
  return static_cast<std::byte>(pattern_word(offset / 8, seed) >> (offset % 8 * 8));
}

void fill_pattern(std::span<std::byte> bytes, uint64_t offset, uint64_t seed) {
  static_assert(std::endian::native == std::endian::little);
  size_t i = 0;
  for (; i < bytes.size() && (offset + i) % 8 != 0; ++i) bytes[i] = pattern_at(offset + i, seed);
  for (; i + 8 <= bytes.size(); i += 8) {
    const uint64_t word = pattern_word((offset + i) / 8, seed);
    std::memcpy(&bytes[i], &word, 8);
  }
  for (; i < bytes.size(); ++i) bytes[i] = pattern_at(offset + i, seed);
}

size_t first_mismatch(std::span<const std::byte> bytes, uint64_t offset, uint64_t seed) {
  std::vector<std::byte> wanted(bytes.size());
  fill_pattern(wanted, offset, seed);
  // The quick way first: byte by byte is slow under the sanitizers.
  if (bytes.empty() || std::memcmp(bytes.data(), wanted.data(), bytes.size()) == 0) {
    return bytes.size();
  }
  const auto at = std::mismatch(bytes.begin(), bytes.end(), wanted.begin()).first;
  return static_cast<size_t>(at - bytes.begin());
}

void write_pattern_file(const std::string& path, uint64_t bytes, uint64_t seed) {
  const UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  check<IoError>(fd.valid(), "cannot make ", path, ": ", errno_text(errno));
  std::vector<std::byte> piece(std::min<uint64_t>(bytes, 1 << 20));
  for (uint64_t at = 0; at < bytes; at += piece.size()) {
    const std::span part = std::span(piece).first(std::min<uint64_t>(piece.size(), bytes - at));
    fill_pattern(part, at, seed);
    const ssize_t put = ::write(fd.get(), part.data(), part.size());
    check<IoError>(put == static_cast<ssize_t>(part.size()), "cannot write ", path);
  }
  check<IoError>(::fsync(fd.get()) == 0, "cannot sync ", path, ": ", errno_text(errno));
}

TempFolder::TempFolder() : TempFolder(parent_folder()) {}

TempFolder::TempFolder(const std::string& parent) {
  std::string name = parent + "/wsm-test-XXXXXX";
  check<IoError>(::mkdtemp(name.data()) != nullptr, "cannot make a folder in ", parent, ": ",
                 errno_text(errno));
  path_ = name;
}

TempFolder::~TempFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace wsm::testing
