// Runs a fuzz target on what is named: every input of a packed corpus (NAME.hex, see corpus.py), or
// a file that is one input. For compilers without libFuzzer, and for the tests.
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Bytes = std::vector<uint8_t>;

Bytes from_hex(const std::string& text) {
  Bytes bytes(text.size() / 2);
  bool valid = text.size() % 2 == 0;
  for (size_t i = 0; i < bytes.size(); ++i) {
    const char* const begin = text.data() + 2 * i;
    valid &= std::from_chars(begin, begin + 2, bytes[i], 16).ptr == begin + 2;
  }
  if (!valid) throw std::runtime_error("not an even number of hexadecimal digits");
  return bytes;
}

void run(const Bytes& input) { LLVMFuzzerTestOneInput(input.data(), input.size()); }

size_t replay(const std::string& name) {
  std::ifstream file(name, std::ios::binary);
  if (!file) throw std::runtime_error(name + " cannot be read");
  if (!name.ends_with(".hex")) {
    std::fprintf(stderr, "%s\n", name.c_str());
    run(Bytes{std::istreambuf_iterator<char>(file), {}});
    return 1;
  }
  size_t line = 0;
  for (std::string text; std::getline(file, text);) {
    // The last one named is the one that crashed.
    std::fprintf(stderr, "%s:%zu\n", name.c_str(), ++line);
    run(from_hex(text));
  }
  return line;
}

}  // namespace

int main(int count, char** names) {
  size_t replayed = 0;
  try {
    for (int i = 1; i < count; ++i) replayed += replay(names[i]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return EXIT_FAILURE;
  }
  std::fprintf(stderr, "%zu inputs replayed\n", replayed);
  return replayed > 0 ? EXIT_SUCCESS : EXIT_FAILURE;  // an empty corpus tests nothing
}
