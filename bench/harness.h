// What the C++ benchmarks share: arguments, medians, tables, JSON. Header only, no state.
#pragma once

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "util/check.h"

namespace wsm::bench {

inline double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline double median(std::vector<double> values) {
  check(!values.empty(), "no samples to take a median of");
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

// "64 KiB", "1.5 GiB".
inline std::string format_bytes(uint64_t bytes) {
  const char* const names[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  for (; value >= 1024 && unit + 1 < std::size(names); ++unit) value /= 1024;
  char text[32];
  std::snprintf(text, sizeof text, "%.4g %s", value, names[unit]);
  return text;
}

inline std::string json_string(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      (out += '\\') += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(c));
      out += escape;
    } else {
      out += c;
    }
  }
  return out + '"';
}

// A JSON object, put together member by member; values keep the order in which they were added.
class JsonObject {
 public:
  JsonObject& add(std::string_view key, std::string_view value) {
    return put(key, json_string(value));
  }
  JsonObject& add(std::string_view key, const char* value) { return put(key, json_string(value)); }
  JsonObject& add(std::string_view key, uint64_t value) { return put(key, std::to_string(value)); }
  JsonObject& add(std::string_view key, bool value) { return put(key, value ? "true" : "false"); }
  JsonObject& add(std::string_view key, double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", value);
    return put(key, text);
  }
  JsonObject& add(std::string_view key, const JsonObject& value) { return put(key, value.text()); }
  JsonObject& add(std::string_view key, const std::vector<JsonObject>& values) {
    std::vector<std::string> texts;
    for (const JsonObject& value : values) texts.push_back(value.text());
    return put(key, list(texts));
  }
  JsonObject& add(std::string_view key, const std::vector<std::string>& values) {
    std::vector<std::string> texts;
    for (const std::string& value : values) texts.push_back(json_string(value));
    return put(key, list(texts));
  }
  std::string text() const { return "{" + members_ + "}"; }

 private:
  static std::string list(const std::vector<std::string>& texts) {
    std::string out = "[";
    for (const std::string& text : texts) (out += out.size() > 1 ? "," : "") += text;
    return out + "]";
  }
  JsonObject& put(std::string_view key, const std::string& value) {
    if (!members_.empty()) members_ += ",";
    members_ += json_string(key) + ":" + value;
    return *this;
  }

  std::string members_;
};

inline void write_json(const std::string& path, const JsonObject& object) {
  std::ofstream out(path);
  out << object.text() << "\n";
  out.flush();
  check<IoError>(out.good(), "cannot write ", path);
}

// "--name value" pairs and positional words. An option that is not known is an error that lists the
// known ones.
class Arguments {
 public:
  Arguments(int argc, char** argv, std::map<std::string, std::string> defaults)
      : values_(std::move(defaults)) {
    for (int i = 1; i < argc; ++i) {
      const std::string word = argv[i];
      if (!word.starts_with("--")) {
        positional_.push_back(word);
        continue;
      }
      check(values_.contains(word.substr(2)), "unknown option ", word, "; known: ", known());
      check(i + 1 < argc, word, " wants a value");
      values_[word.substr(2)] = argv[++i];
    }
  }

  const std::vector<std::string>& positional() const { return positional_; }
  const std::string& text(const std::string& name) const { return values_.at(name); }
  uint64_t number(const std::string& name) const { return to_number(name, values_.at(name), ""); }
  // "512", "512KiB", "512MiB", "2GiB".
  uint64_t bytes(const std::string& name) const {
    const std::string& value = values_.at(name);
    for (const auto& [suffix, shift] : {std::pair{"KiB", 10}, {"MiB", 20}, {"GiB", 30}}) {
      if (value.ends_with(suffix)) return to_number(name, value, suffix) << shift;
    }
    return to_number(name, value, "");
  }

 private:
  static uint64_t to_number(const std::string& name, const std::string& value,
                            std::string_view suffix) {
    const char* const end = value.data() + value.size() - suffix.size();
    uint64_t number = 0;
    const auto [rest, error] = std::from_chars(value.data(), end, number);
    check(error == std::errc() && rest == end && number < (1ull << 32), "--", name, " ", value,
          " is not a number that can be used; try 8, 512MiB or 2GiB");
    return number;
  }
  std::string known() const {
    std::string out;
    for (const auto& [name, value] : values_) out += (out.empty() ? "--" : ", --") + name;
    return out;
  }

  std::map<std::string, std::string> values_;
  std::vector<std::string> positional_;
};

// What `run` returns; what it throws is said on stderr, and 1 is returned.
inline int run_main(const char* name, int (*run)(int, char**), int argc, char** argv) try {
  return run(argc, argv);
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s: %s\n", name, error.what());
  return 1;
}

}  // namespace wsm::bench
