// SPDX-License-Identifier: Apache-2.0
#include "base/units.h"

#include "base/error.h"

#include <fmt/format.h>

#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <utility>

namespace quern {

std::uint64_t parse_size(const std::string& text, const std::string& option) {
  const auto refuse = [&]() -> UsageError {
    return {
        "not a size",
        option,
        "expected a number with an optional unit, found \"" + text + "\"",
        "write it like 18GiB, 512MiB or 1.5GB"};
  };
  double number = 0;
  const char* end = text.data() + text.size();
  const auto [rest, code] = std::from_chars(text.data(), end, number);
  if (code != std::errc() || !(number >= 0)) {
    throw refuse();
  }
  std::string unit(rest, end);
  for (char& c : unit) {
    c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  while (!unit.empty() && unit.front() == ' ') {
    unit.erase(0, 1);
  }
  static constexpr std::array<std::pair<const char*, double>, 15> kUnits = {{
      {"", 1},
      {"b", 1},
      {"k", 0x1p10},
      {"kib", 0x1p10},
      {"kb", 1e3},
      {"m", 0x1p20},
      {"mib", 0x1p20},
      {"mb", 1e6},
      {"g", 0x1p30},
      {"gib", 0x1p30},
      {"gb", 1e9},
      {"t", 0x1p40},
      {"tib", 0x1p40},
      {"tb", 1e12},
      {"bytes", 1},
  }};
  for (const auto& [name, factor] : kUnits) {
    if (unit == name) {
      const double bytes = number * factor;
      if (bytes >= 0x1p62) {
        throw refuse();
      }
      return static_cast<std::uint64_t>(bytes);
    }
  }
  throw refuse();
}

std::string human_bytes(double bytes) {
  static constexpr std::array<const char*, 5> kNames = {"B", "KiB", "MiB", "GiB", "TiB"};
  std::size_t unit = 0;
  while (std::fabs(bytes) >= 1024 && unit + 1 < kNames.size()) {
    bytes /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{:.0f} B", bytes)
                   : fmt::format("{:.1f} {}", bytes, kNames.at(unit));
}

std::string human_duration(double seconds) {
  if (seconds < 60) {
    return seconds < 9.95 ? fmt::format("{:.1f} s", seconds) : fmt::format("{:.0f} s", seconds);
  }
  const auto minutes = static_cast<std::int64_t>(std::llround(seconds / 60));
  if (minutes < 60) {
    const auto whole = static_cast<std::int64_t>(seconds);
    return fmt::format("{} min {} s", whole / 60, whole % 60);
  }
  return fmt::format("{} h {:02} min", minutes / 60, minutes % 60);
}

}  // namespace quern
