// What the host device's copies reach: memcpy beside copy_past_caches, by the size of a copy, by
// threads, and by where the source lies: in the cache, as a staging slot just read, or in memory,
// as the host cache.
//
// Method: a target of --bytes, in huge pages, is written from one end to the other; all ways take
// turns, --repeats times; the median. The bytes are compared afterwards.
#include <cstring>
#include <thread>

#include "harness.h"
#include "memory/mapped_memory.h"
#include "util/copy_past_caches.h"

namespace wsm::bench {
namespace {

constexpr uint64_t kHotCopies = 4;  // pieces of a source that stays in the cache

using Copy = void (*)(void*, const void*, size_t);

void by_memcpy(void* target, const void* source, size_t bytes) {
  std::memcpy(target, source, bytes);
}

struct Way {
  const char* name;
  Copy copy;
  bool cached;
  uint64_t bytes;
  uint64_t threads;
  std::vector<double> gb_per_s;
};

std::vector<Way> ways() {
  std::vector<Way> all;
  for (const uint64_t bytes : {256ull << 10, 1ull << 20, 16ull << 20}) {
    for (const bool cached : {true, false}) {
      for (const uint64_t threads : {1, 2}) {
        all.push_back({"memcpy", by_memcpy, cached, bytes, threads, {}});
        all.push_back({"past the caches", copy_past_caches, cached, bytes, threads, {}});
      }
    }
  }
  return all;
}

void sample(Way& way, const MappedMemory& target, const MappedMemory& source) {
  const uint64_t share = target.bytes() / way.threads / way.bytes * way.bytes;
  const auto source_of = [&](uint64_t begin, uint64_t done) {
    return begin + (way.cached ? done % (kHotCopies * way.bytes) : done);
  };
  const auto work = [&](uint64_t begin) {
    for (uint64_t done = 0; done < share; done += way.bytes) {
      way.copy(target.data() + begin + done, source.data() + source_of(begin, done), way.bytes);
    }
  };
  const double begin = now_seconds();
  std::vector<std::thread> others;
  for (uint64_t i = 1; i < way.threads; ++i) others.emplace_back(work, i * share);
  work(0);
  for (std::thread& other : others) other.join();
  way.gb_per_s.push_back(static_cast<double>(share * way.threads) / (now_seconds() - begin) / 1e9);
  for (uint64_t i = 0; i < way.threads; ++i) {
    const uint64_t last = share - way.bytes;
    check(std::memcmp(target.data() + i * share + last, source.data() + source_of(i * share, last),
                      way.bytes) == 0,
          way.name, ": bytes differ after the copy");
  }
}

int run(int argc, char** argv) {
  const Arguments arguments(argc, argv, {{"bytes", "2GiB"}, {"repeats", "5"}, {"json", ""}});
  const MappedMemory target(arguments.bytes("bytes"));
  const MappedMemory source(arguments.bytes("bytes"));
  check(target.bytes() >= 256 << 20, "--bytes: at least 256MiB");
  std::memset(target.data(), 1, target.bytes());
  for (uint64_t i = 0; i < source.bytes(); i += 8) std::memcpy(source.data() + i, &i, 8);
  std::vector<Way> all = ways();
  for (uint64_t i = 0; i < arguments.number("repeats"); ++i) {
    for (Way& way : all) sample(way, target, source);
  }
  std::vector<JsonObject> cells;
  std::printf("%-16s %9s %-10s %7s  GB/s\n", "way", "a copy", "source", "threads");
  for (const Way& way : all) {
    const char* const where = way.cached ? "in cache" : "in memory";
    std::printf("%-16s %9s %-10s %7llu  %.2f\n", way.name, format_bytes(way.bytes).c_str(), where,
                static_cast<unsigned long long>(way.threads), median(way.gb_per_s));
    cells.push_back(JsonObject()
                        .add("way", way.name)
                        .add("bytes", way.bytes)
                        .add("source", where)
                        .add("threads", way.threads)
                        .add("GB_per_s", median(way.gb_per_s)));
  }
  if (!arguments.text("json").empty()) {
    write_json(arguments.text("json"),
               JsonObject().add("benchmark", "bench_copy").add("cells", cells));
  }
  return 0;
}

}  // namespace
}  // namespace wsm::bench

int main(int argc, char** argv) {
  return wsm::bench::run_main("bench_copy", wsm::bench::run, argc, argv);
}
