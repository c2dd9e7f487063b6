// Log lines (WSM_VERBOSE=1), in fixed forms that users and tools look for. One write each, to
// stderr, so that lines of several threads do not mix.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace wsm {

// "[WSM] prefetch layer=6 (SSD→CPU→GPU)", or "[WSM] ->GPU layer=0 (CPU→GPU)" for a demand.
void log_load(const std::string& label, bool demanded, bool from_disk);
// "[WSM] Async GPU prefetch: layers [6, 7, 8]"; a unit outside a list of layers goes by its name.
void log_prefetch(const std::vector<std::string>& labels);
// "[WSM] layer=9 timeout, loading immediately (waited 12.3 ms on SSD)".
void log_wait(const std::string& label, double milliseconds, const char* cause);
// "[WSM] TEXT", shown whether verbose or not.
void log_warning(const std::string& text);
// The same, but only the first time that the process has this text to say.
void log_once(const std::string& text);
// Files (one, and `others`) refuse direct reads, and are read buffered: said once.
void log_direct_refused(const std::string& path, size_t others, const std::string& why);

}  // namespace wsm
