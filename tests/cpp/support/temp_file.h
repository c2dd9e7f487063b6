// Temporary files on a real disk, filled with a pattern that tells any byte by its place in the
// file.
//
// TempFolder lies under $TMPDIR, else /var/tmp (/tmp may be a tmpfs, which has no direct reads),
// and is removed with all that is in it by its destructor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

namespace wsm::testing {

// The byte at `offset` of a patterned file, for any offset and seed.
std::byte pattern_at(uint64_t offset, uint64_t seed = 0);
void fill_pattern(std::span<std::byte> bytes, uint64_t offset, uint64_t seed = 0);
// Index of the first byte that is not the pattern's; bytes.size() when all are.
size_t first_mismatch(std::span<const std::byte> bytes, uint64_t offset, uint64_t seed = 0);

// Writes a file of the pattern, and syncs it, so that its pages can be dropped from the page cache.
void write_pattern_file(const std::string& path, uint64_t bytes, uint64_t seed = 0);

class TempFolder {
 public:
  TempFolder();
  explicit TempFolder(const std::string& parent);
  ~TempFolder();
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  std::string path() const { return path_.string(); }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

// A patterned file in a folder of its own.
class TempFile {
 public:
  explicit TempFile(uint64_t bytes, uint64_t seed = 0) : path_(folder_ / "shard") {
    write_pattern_file(path_, bytes, seed);
  }
  const std::string& path() const { return path_; }

 private:
  TempFolder folder_;
  std::string path_;
};

}  // namespace wsm::testing
