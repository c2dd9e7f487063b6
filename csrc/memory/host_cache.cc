#include "memory/host_cache.h"

namespace wsm {

HostCache::HostCache(Device& device, const Plan& plan)
    : buffer_(device, plan.cache_bytes, plan.cache_segments), filled_(plan.chunks.size()) {}

}  // namespace wsm
