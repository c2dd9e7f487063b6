// What every reader must do, as functions of how one is made: each reader's test file calls them
// all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "storage/reader.h"

namespace wsm::testing {

using MakeReader = std::function<std::unique_ptr<Reader>(const ReaderOptions&)>;

// Memory that direct reads accept, filled with a guard byte, with more guard bytes behind its end.
class AlignedBuffer {
 public:
  explicit AlignedBuffer(size_t bytes);
  std::byte* data() const { return data_.get(); }
  std::span<std::byte> span(size_t offset, size_t bytes) const { return {data() + offset, bytes}; }
  bool guard_whole() const;                  // nothing was written behind the end
  bool untouched_from(size_t offset) const;  // nothing was written from there on

 private:
  size_t bytes_;
  std::unique_ptr<std::byte, decltype(&std::free)> data_{nullptr, &std::free};
};

// Waits for exactly `count` completions, by ready_fd; fails the test when none comes for long.
std::vector<ReadCompletion> wait_for(Reader& reader, size_t count);
ReadCompletion read_one(Reader& reader, const ReadRequest& request);

// True when ready_fd polls as readable now.
bool is_ready(const Reader& reader);

void reads_sizes_around_a_block(const MakeReader& make);
void reads_unaligned_heads_and_tails(const MakeReader& make);
void accepts_the_end_of_the_file_when_enough_is_there(const MakeReader& make);
void tells_a_truncated_shard(const MakeReader& make);
void tells_path_offset_and_errno(const MakeReader& make);
void answers_false_when_all_requests_are_used(const MakeReader& make);
void completes_many_requests_once_each(const MakeReader& make);
void latches_a_refused_direct_read(const MakeReader& make);
void fails_a_refused_direct_read_where_required(const MakeReader& make);
void drops_behind_only_what_was_not_cached(const MakeReader& make);
void completes_requests_that_cannot_be_read(const MakeReader& make);
void stays_ready_while_completions_are_left(const MakeReader& make);
void writes_nothing_after_its_end(const MakeReader& make);
void works_in_another_thread_than_its_maker(const MakeReader& make);
void refuses_useless_options(const MakeReader& make);

}  // namespace wsm::testing
