// How fast files are read: by the readers that the engine would take, each piece as the conductor
// would route it. Blocks until the reads are done; nothing is kept.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "engine/readers.h"
#include "plan/host_memory.h"

namespace wsm {

// Part of a file, its ends aligned as direct reads need.
struct FileExtent {
  uint32_t file = 0;  // into the paths
  uint64_t offset = 0;
  uint32_t bytes = 0;
};

// Bytes per second by each method of reading, the spans in chunks of at most `chunk_bytes`, a
// multiple of what direct reads need; `rounds` samples of each, the methods by turns:
// [method][round]. A sample reads on where the last one stopped, from the first span again behind
// the last, as many chunks as are begun within `seconds`. A method whose reader cannot be had has
// no samples. After `most_seconds` in all no further sample is taken: a slow drive has fewer, and
// not as many of each method. Throws IoError where a file cannot be read, TimeoutError where
// nothing moves for a method's `read_timeout_s`, InvalidArgument for no spans or one without a
// file.
std::vector<std::vector<double>> time_reads(const std::vector<std::string>& paths,
                                            const std::vector<FileExtent>& spans,
                                            const std::vector<EngineOptions>& methods,
                                            double seconds, uint32_t rounds = 1,
                                            double most_seconds = 3600,
                                            uint64_t chunk_bytes = kDiskChunk);

}  // namespace wsm
