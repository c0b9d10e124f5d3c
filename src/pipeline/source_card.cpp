// SPDX-License-Identifier: Apache-2.0
#include "pipeline/source_card.h"

#include "base/file.h"

#include <sstream>
#include <string>
#include <system_error>

namespace quern {
namespace {

constexpr std::uint64_t kLargestCard = 4U << 20U;

std::string trimmed(const std::string& text) {
  const auto first = text.find_first_not_of(" \t\r\"'");
  const auto last = text.find_last_not_of(" \t\r\"'");
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

}  // namespace

CardSource read_card_source(const std::filesystem::path& directory) {
  CardSource card;
  const std::filesystem::path path = directory / "README.md";
  std::error_code code;
  const auto size = std::filesystem::file_size(path, code);
  if (code || size > kLargestCard) {
    return card;
  }
  std::istringstream lines(read_file(path, kLargestCard));
  std::string line;
  if (!std::getline(lines, line) || trimmed(line) != "---") {
    return card;
  }
  std::string key;
  while (std::getline(lines, line) && trimmed(line) != "---") {
    const bool item = line.starts_with("- ") || line.starts_with("  - ");
    const std::size_t colon = line.find(':');
    if (item && key == "language") {
      card.languages.push_back(trimmed(line.substr(line.find('-') + 1)));
      continue;
    }
    if (item || line.starts_with(" ") || colon == std::string::npos) {
      continue;
    }
    key = trimmed(line.substr(0, colon));
    const std::string value = trimmed(line.substr(colon + 1));
    if (key == "license") {
      card.license = value;
    } else if (key == "license_name") {
      card.license_name = value;
    } else if (key == "license_link") {
      card.license_link = value;
    } else if (key == "library_name") {
      card.library_name = value;
    } else if (key == "pipeline_tag") {
      card.pipeline_tag = value;
    } else if (key == "language" && !value.empty()) {
      card.languages.push_back(value);
    }
  }
  return card;
}

}  // namespace quern
