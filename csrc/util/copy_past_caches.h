// memcpy for bytes that are next read much later, or by nobody soon: a layer's weights on the host
// device, gigabytes of them between two uses.
//
// Ordinary stores first read the line that they are about to overwrite, and leave it in the cache
// in the place of something that is wanted: here, of the staging slots that the disk is read into.
// Non-temporal stores do neither. On a virtual machine of 2 cores they copy 13 GB/s instead of 7.5
// out of slots that are in the cache, and 6.8 instead of 5.6 out of memory (bench/bench_copy).
// What is small stays with memcpy: it may well be used at once.
//
// All is stored when the call returns, in the order that other threads may expect.
#pragma once

#include <cstddef>

namespace wsm {

void copy_past_caches(void* target, const void* source, size_t bytes);

}  // namespace wsm
