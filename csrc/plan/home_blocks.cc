#include "plan/home_blocks.h"

#include "plan/device_blocks.h"
#include "plan/planner.h"

namespace wsm {

bool HomeBlocks::add(uint64_t tensor_bytes) {
  const bool begins = open_bytes_ == 0;
  open_bytes_ += tensor_bytes;
  if (open_bytes_ >= kHomeBlockBytes) {
    closed_bytes_ += open_bytes_;
    closed_cost_ += device_block_bytes(open_bytes_);
    open_bytes_ = 0;
  }
  return begins;
}

HomeBlocks HomeBlocks::with(uint64_t tensor_bytes) const {
  HomeBlocks more = *this;
  more.add(tensor_bytes);
  return more;
}

uint64_t HomeBlocks::cost_bytes() const {
  return closed_cost_ + device_block_bytes(open_request_bytes());
}

uint64_t HomeBlocks::open_request_bytes() const {
  const uint64_t left = limit_ > closed_bytes_ ? limit_ - closed_bytes_ : 0;
  return block_request_bytes(open_bytes_, left);
}

}  // namespace wsm
