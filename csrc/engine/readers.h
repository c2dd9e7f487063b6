// The readers of an engine: which ones its options ask for, and which one takes a read.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "storage/reader.h"
#include "storage/shard.h"
#include "util/check.h"

namespace wsm {

// Where the bytes of one chunk come from.
enum class ReadRoute : uint8_t {
  kDirect,     // past the page cache (O_DIRECT)
  kBuffered,   // through the page cache
  kPreloaded,  // out of what was read before there was a plan
  kMemory,     // the shard lies in RAM
};

// The readers at hand. `direct` takes the cold extents of a drive, `pool` all others (page cache,
// tmpfs, RAM), and all where there is no other, or it has broken.
struct Readers {
  std::unique_ptr<Reader> direct;
  std::unique_ptr<Reader> pool;
  std::string why_direct;      // why this one reads directly, for stats()
  bool always_direct = false;  // even where the page cache has the bytes

  Reader& for_direct() const { return direct && !direct->broken() ? *direct : *pool; }
  std::string why() const {
    const int error = direct ? direct->broken() : 0;
    return error == 0 ? why_direct : concat("io_uring failed: ", errno_text(error));
  }
};

enum class ReaderChoice : uint8_t { kAuto, kUring, kPread };

struct EngineOptions {
  ReaderChoice reader = ReaderChoice::kAuto;     // of direct reads; asked for: it or an error
  ReaderChoice preferred = ReaderChoice::kAuto;  // where it is not: the faster one, as measured
  uint32_t block_bytes = 0;                      // of direct reads; 0: as suits the reader
  DirectMode direct = DirectMode::kAuto;         // kOn: never through the page cache
  uint32_t read_threads = 0;  // of the pread pool; 0: as many as there are cores, at most 16
  double read_timeout_s = 30;
  bool poison = false;
  bool verbose = false;
  std::function<Readers()> make_readers;  // tests: instead of the real ones
};

// The readers that these options ask for; throws where they cannot be had. `any_direct`: some file
// is to be read directly. `chunk_bytes`: what most requests will be for.
Readers make_readers(const EngineOptions& options, bool any_direct, uint64_t chunk_bytes);

}  // namespace wsm
