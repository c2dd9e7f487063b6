#include "support/tally.h"

#include <utility>

namespace wsm::testing {
namespace {

constexpr std::pair<const char*, uint64_t Tally::*> kFields[] = {
    {"scenarios", &Tally::scenarios},
    {"refused", &Tally::refused},
    {"passes", &Tally::passes},
    {"uses", &Tally::uses},
    {"fetches", &Tally::fetches},
    {"resizes", &Tally::resizes},
    {"read_ahead", &Tally::read_ahead},
    {"aborted_passes", &Tally::aborted_passes},
    {"refused_nestings", &Tally::refused_nestings},
    {"interrupted_waits", &Tally::interrupted_waits},
    {"io_errors", &Tally::io_errors},
    {"timeouts", &Tally::timeouts},
    {"device_errors", &Tally::device_errors},
    {"short_reads", &Tally::short_reads},
    {"interrupted_reads", &Tally::interrupted_reads},
    {"stalled_reads", &Tally::stalled_reads},
    {"failed_reads", &Tally::failed_reads},
    {"lost_reads", &Tally::lost_reads},
    {"flipped_bits", &Tally::flipped_bits},
    {"flipped_bytes_seen", &Tally::flipped_bytes_seen},
};

}  // namespace

void Tally::add(const Tally& more) {
  for (const auto& [name, field] : kFields) this->*field += more.*field;
}

void Tally::write_json(std::ostream& out) const {
  const char* separator = "{";
  for (const auto& [name, field] : kFields) {
    out << separator << '"' << name << "\": " << this->*field;
    separator = ", ";
  }
  out << '}';
}

}  // namespace wsm::testing
