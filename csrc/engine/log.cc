#include "engine/log.h"

#include <unistd.h>

#include <cstdio>
#include <set>
#include <string_view>

#include "util/check.h"
#include "util/mutex.h"

namespace wsm {

namespace {

struct LoggedOnce {
  Mutex mutex;
  std::set<std::string> texts GUARDED_BY(mutex);
};

void write_line(const std::string& text) {
  const std::string line = "[WSM] " + text + "\n";
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, line.data(), line.size());
}

// "layer=6 group=attn" -> "6 group=attn"; "unit=lm_head" -> "lm_head".
std::string_view short_label(const std::string& label) {
  const size_t equals = label.find('=');
  return equals == std::string::npos ? std::string_view(label)
                                     : std::string_view(label).substr(equals + 1);
}

}  // namespace

void log_load(const std::string& label, bool demanded, bool from_disk) {
  write_line(concat(demanded ? "->GPU " : "prefetch ", label,
                    from_disk ? " (SSD→CPU→GPU)" : " (CPU→GPU)"));
}

void log_prefetch(const std::vector<std::string>& labels) {
  std::string list;
  for (const std::string& label : labels) {
    if (!list.empty()) list += ", ";
    list += short_label(label);
  }
  write_line(concat("Async GPU prefetch: layers [", list, "]"));
}

void log_wait(const std::string& label, double milliseconds, const char* cause) {
  char waited[32];
  std::snprintf(waited, sizeof waited, "%.1f", milliseconds);
  write_line(
      concat(label, " timeout, loading immediately (waited ", waited, " ms on ", cause, ")"));
}

void log_warning(const std::string& text) { write_line(text); }

void log_once(const std::string& text) {
  static auto* const logged = new LoggedOnce;  // never freed: threads log until the process ends
  const MutexLock lock(logged->mutex);
  if (logged->texts.insert(text).second) write_line(text);
}

void log_direct_refused(const std::string& path, size_t others, const std::string& why) {
  const std::string more = others == 0 ? "" : concat(" and of ", others, " more files");
  log_once(concat("no direct reads of ", path, more, ": ", why,
                  "; reading through the page cache, and dropping from it what was not there"));
}

}  // namespace wsm
