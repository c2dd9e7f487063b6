// The disk's ceiling on a given file: reader x block x depth x {direct, buffered}, through the
// readers that the engine uses.
//
// Method: each sample reads --bytes-per-cell of the file, the ranges of successive samples rotating
// through it. Before each sample the file is dropped from the page cache and the range is proved
// cold (cachestat, else mincore). The cells are interleaved: all of them once, then all again, so
// that a drift of the disk hits all alike; each cell's figure is the median. Files on tmpfs are
// memory already: buffered cells only, warm.
//
// By default a cell reads into no more memory than it has in flight, again and again: what a drive
// that copies (a virtual one) writes there may never leave the processor's cache. --into names the
// memory that is read into in turn, as one reads who keeps what he reads.
#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cstring>
#include <deque>
#include <optional>
#include <thread>

#include "harness.h"
#include "storage/reader.h"
#include "storage/shard.h"
#include "util/align.h"

namespace wsm::bench {
namespace {

constexpr int kReadTimeoutMs = 30000;

struct Cell {
  std::string reader;
  uint64_t block_bytes = 0;
  uint32_t depth = 0;
  bool direct = false;
  uint64_t into_bytes = 0;  // of memory that it reads into
  std::vector<double> gb_per_second;
};

// Memory that all cells read into, touched beforehand: page faults are not the disk's time.
class Targets {
 public:
  explicit Targets(uint64_t bytes) : bytes_(align_up(bytes, 2 * kMiB)) {
    void* const data =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check<OutOfMemory>(data != MAP_FAILED, "cannot map ", bytes_,
                       " bytes to read into: ", errno_text(errno));
    madvise(data, bytes_, MADV_HUGEPAGE);
    std::memset(data, 1, bytes_);
    data_ = static_cast<std::byte*>(data);
  }
  ~Targets() { munmap(data_, bytes_); }
  Targets(const Targets&) = delete;
  Targets& operator=(const Targets&) = delete;
  std::byte* at(uint64_t offset) const { return data_ + offset; }

 private:
  uint64_t bytes_;
  std::byte* data_ = nullptr;
};

// Pages of the range that lie in the page cache.
uint64_t cached_pages(const Shard& shard, uint64_t offset, uint64_t bytes) {
#ifdef SYS_cachestat
  constexpr long kCachestat = SYS_cachestat;
#else
  constexpr long kCachestat = 451;
#endif
  struct {
    uint64_t offset, bytes;
  } range{offset, bytes};
  struct {
    uint64_t cached, dirty, writeback, evicted, recently_evicted;
  } answer{};
  if (syscall(kCachestat, shard.buffered_fd(), &range, &answer, 0u) == 0) return answer.cached;

  const uint64_t page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t begin = align_down(offset, page);
  const uint64_t length = offset + bytes - begin;
  void* const view =
      mmap(nullptr, length, PROT_READ, MAP_SHARED, shard.buffered_fd(), static_cast<off_t>(begin));
  check<IoError>(view != MAP_FAILED, "cannot tell what of ", shard.path(),
                 " is cached: ", errno_text(errno));
  std::vector<unsigned char> resident((length + page - 1) / page);
  const int failed = mincore(view, length, resident.data());
  munmap(view, length);
  check<IoError>(failed == 0, "cannot tell what of ", shard.path(),
                 " is cached: ", errno_text(errno));
  return static_cast<uint64_t>(
      std::count_if(resident.begin(), resident.end(), [](auto p) { return p & 1; }));
}

// Drops the whole file: a large folio that straddles the range's edges would survive a drop of the
// range.
void make_cold(const Shard& shard, uint64_t offset, uint64_t bytes) {
  uint64_t left = 0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    shard.drop_from_page_cache(0, shard.bytes());
    left = cached_pages(shard, offset, bytes);
    if (left == 0) return;
    fdatasync(shard.buffered_fd());  // dirty pages cannot be dropped
  }
  check<IoError>(false, shard.path(), " cannot be made cold: ", left, " pages of [", offset, ", +",
                 bytes, ") stay in the page cache; is another process mapping or reading it?");
}

std::unique_ptr<Reader> make_reader(const Cell& cell, std::string* why_not) {
  const ReaderOptions options{.requests = cell.depth,
                              .block_bytes = static_cast<uint32_t>(cell.block_bytes),
                              .depth = cell.depth};
  return cell.reader == "uring" ? make_uring_reader(options, why_not) : make_pread_reader(options);
}

void wait_ready(const Reader& reader, const Shard& shard) {
  pollfd waiting{.fd = reader.ready_fd(), .events = POLLIN, .revents = 0};
  const int ready = ::poll(&waiting, 1, kReadTimeoutMs);
  check<TimeoutError>(ready != 0, "no read of ", shard.path(), " completed in ",
                      kReadTimeoutMs / 1000, " s");
  check<IoError>(ready > 0 || errno == EINTR, "poll failed: ", errno_text(errno));
}

// Reads [offset, +bytes) in blocks, `depth` under way; seconds.
double read_extent(Reader& reader, Shard& shard, const Cell& cell, const Targets& targets,
                   uint64_t offset, uint64_t bytes) {
  std::deque<uint32_t> free_targets(cell.into_bytes / cell.block_bytes);  // the longest free first
  for (uint32_t i = 0; i < free_targets.size(); ++i) free_targets[i] = i;
  std::vector<ReadCompletion> completions(cell.depth);
  uint64_t submitted = 0, completed = 0;
  const double begin = now_seconds();
  while (completed < bytes) {
    while (submitted < bytes && !free_targets.empty()) {
      const uint64_t need = std::min(cell.block_bytes, bytes - submitted);
      ReadRequest request;
      request.shard = &shard;
      request.offset = offset + submitted;
      request.bytes = static_cast<uint32_t>(align_up(need, shard.alignment()));
      request.need_bytes = static_cast<uint32_t>(need);
      request.target = targets.at(free_targets.front() * cell.block_bytes);
      request.tag = (need << 32) | free_targets.front();
      request.buffered = !cell.direct;
      if (!reader.submit(request)) break;
      free_targets.pop_front();
      submitted += need;
    }
    const size_t count = reader.poll(completions);
    for (size_t i = 0; i < count; ++i) {
      check<IoError>(completions[i].error.empty(), completions[i].error);
      completed += completions[i].tag >> 32;
      free_targets.push_back(static_cast<uint32_t>(completions[i].tag));
    }
    if (count == 0) wait_ready(reader, shard);
  }
  return now_seconds() - begin;
}

std::vector<Cell> make_grid(const std::string& name, bool memory_file, uint64_t into) {
  check(name == "small" || name == "full", "--grid is small or full, not ", name);
  const bool full = name == "full";
  std::vector<Cell> cells;
  for (const char* reader : {"uring", "pread"}) {
    for (const uint64_t block : {256 * kKiB, kMiB, 4 * kMiB, 16 * kMiB}) {
      for (const uint32_t depth : {4u, 16u, 64u}) {
        for (const bool direct : {true, false}) {
          if (direct && memory_file) continue;
          // Small: the cells that have won on drives so far, and one buffered for comparison.
          if (!full && (direct || memory_file ? block > 4 * kMiB || depth != 16
                                              : block != kMiB || depth != 16))
            continue;
          const uint64_t flying = block * depth;
          cells.push_back(
              {reader, block, depth, direct, std::max(flying, align_down(into, block)), {}});
        }
      }
    }
  }
  return cells;
}

JsonObject identify(const Cell& cell) {
  return JsonObject()
      .add("reader", cell.reader)
      .add("block_bytes", cell.block_bytes)
      .add("depth", uint64_t{cell.depth})
      .add("mode", cell.direct ? "direct" : "buffered");
}

JsonObject describe(const Cell& cell) {
  const auto [slowest, fastest] =
      std::minmax_element(cell.gb_per_second.begin(), cell.gb_per_second.end());
  return identify(cell)
      .add("GB_per_s", median(cell.gb_per_second))
      .add("samples", uint64_t{cell.gb_per_second.size()})
      .add("min_GB_per_s", *slowest)
      .add("max_GB_per_s", *fastest);
}

void print_line(const char* lead, const Cell& cell) {
  std::printf("%-8s %-6s %8s  depth %2u  %-8s %7.2f GB/s\n", lead, cell.reader.c_str(),
              format_bytes(cell.block_bytes).c_str(), cell.depth,
              cell.direct ? "direct" : "buffered", median(cell.gb_per_second));
}

const Cell* best_of(const std::vector<Cell>& cells, bool direct) {
  const Cell* best = nullptr;
  for (const Cell& cell : cells) {
    if (cell.direct != direct || cell.gb_per_second.empty()) continue;
    if (!best || median(cell.gb_per_second) > median(best->gb_per_second)) best = &cell;
  }
  return best;
}

bool on_tmpfs(const std::string& path) {
  struct statfs info{};
  const int failed = statfs(path.c_str(), &info);
  check<IoError>(failed == 0, "cannot open ", path, ": ", errno_text(errno));
  return static_cast<uint64_t>(info.f_type) == TMPFS_MAGIC;
}

class Run {
 public:
  Run(const std::string& path, bool memory_file, uint64_t cell_bytes)
      : memory_file_(memory_file),
        shard_(Shard::open(path, DirectMode::kAuto)),
        cell_bytes_(align_down(std::min(cell_bytes, shard_->bytes()), shard_->alignment())) {
    check(cell_bytes_ > 0, path, " has ", shard_->bytes(), " bytes: less than one aligned block");
    fdatasync(shard_->buffered_fd());
  }

  // Empty: the cell can be measured. Else why not.
  std::string skip_reason(const Cell& cell) const {
    if (cell.direct && !shard_->direct()) return "direct reads refused: " + shard_->mode_reason();
    if (cell.block_bytes * cell.depth * 2 > cell_bytes_)
      return "fewer than two blocks for each place in flight";
    std::string why;
    if (!make_reader(cell, &why)) return why;
    return {};
  }

  void sample(Cell& cell, const Targets& targets) {
    std::string why;
    const std::unique_ptr<Reader> reader = make_reader(cell, &why);
    check<IoError>(reader != nullptr, why);
    if (cursor_ + cell_bytes_ > shard_->bytes()) cursor_ = 0;
    if (!memory_file_) make_cold(*shard_, cursor_, cell_bytes_);
    const double seconds = read_extent(*reader, *shard_, cell, targets, cursor_, cell_bytes_);
    check<IoError>(!cell.direct || shard_->direct(),
                   "direct reads were refused: ", shard_->mode_reason());
    cell.gb_per_second.push_back(static_cast<double>(cell_bytes_) / seconds / 1e9);
    cursor_ += cell_bytes_;
  }
  // So that a cell does not meet the same range again in the next round.
  void shift() { cursor_ += cell_bytes_; }

  const Shard& shard() const { return *shard_; }
  uint64_t cell_bytes() const { return cell_bytes_; }

 private:
  bool memory_file_;
  std::unique_ptr<Shard> shard_;
  uint64_t cell_bytes_;
  uint64_t cursor_ = 0;
};

// The cells that can be measured; the others go to `skipped`, each with its reason.
std::vector<Cell> select_cells(const Run& run, std::vector<Cell> grid,
                               std::vector<JsonObject>* skipped) {
  std::vector<Cell> cells;
  std::string last_why;
  for (Cell& cell : grid) {
    const std::string why = run.skip_reason(cell);
    if (why.empty()) {
      cells.push_back(std::move(cell));
      continue;
    }
    skipped->push_back(identify(cell).add("why", why));
    last_why = why;
  }
  check(!cells.empty(), "nothing to measure on ", run.shard().path(), " (", run.shard().bytes(),
        " bytes); the last cell: ", last_why);
  return cells;
}

JsonObject report(const Run& run, const std::vector<Cell>& cells, uint64_t into) {
  JsonObject out;
  std::vector<JsonObject> results;
  for (const Cell& cell : cells) {
    print_line("", cell);
    results.push_back(describe(cell));
  }
  for (const bool direct : {true, false}) {
    const Cell* const best = best_of(cells, direct);
    if (!best) continue;
    print_line("best", *best);
    out.add(direct ? "best_direct" : "best_buffered", describe(*best));
  }
  return out.add("file_bytes", run.shard().bytes())
      .add("alignment", uint64_t{run.shard().alignment()})
      .add("bytes_per_cell", run.cell_bytes())
      .add("into_bytes", into)
      .add("cores", uint64_t{std::thread::hardware_concurrency()})
      .add("cells", results);
}

int run(int argc, char** argv) {
  const Arguments arguments(argc, argv,
                            {{"grid", "small"},
                             {"bytes-per-cell", "512MiB"},
                             {"into", "0"},
                             {"repeats", "3"},
                             {"json", ""}});
  check(arguments.positional().size() == 1,
        "usage: bench_read FILE [--grid small|full] [--bytes-per-cell 512MiB] "
        "[--into 0] [--repeats 3] [--json OUT]");
  const std::string path = arguments.positional()[0];
  const uint64_t repeats = arguments.number("repeats");
  check(repeats > 0, "--repeats must be at least 1");
  const bool memory_file = on_tmpfs(path);
  Run run(path, memory_file, arguments.bytes("bytes-per-cell"));

  std::vector<JsonObject> skipped;
  const std::vector<Cell> grid =
      make_grid(arguments.text("grid"), memory_file, arguments.bytes("into"));
  std::vector<Cell> cells = select_cells(run, grid, &skipped);
  uint64_t target_bytes = 0;
  for (const Cell& cell : cells) {
    target_bytes = std::max(target_bytes, cell.into_bytes);
  }
  const Targets targets(target_bytes);
  for (uint64_t repeat = 0; repeat < repeats; ++repeat) {
    for (Cell& cell : cells) run.sample(cell, targets);
    run.shift();
  }

  JsonObject out = report(run, cells, arguments.bytes("into"));
  out.add("benchmark", "bench_read").add("storage", memory_file ? "memory" : "disk");
  out.add("cold", !memory_file).add("grid", arguments.text("grid")).add("repeats", repeats);
  out.add("skipped", skipped);
  if (!skipped.empty()) std::printf("%zu cells skipped; the JSON says why\n", skipped.size());
  if (!arguments.text("json").empty()) write_json(arguments.text("json"), out);
  return 0;
}

}  // namespace
}  // namespace wsm::bench

int main(int argc, char** argv) {
  return wsm::bench::run_main("bench_read", wsm::bench::run, argc, argv);
}
