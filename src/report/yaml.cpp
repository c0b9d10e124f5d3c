// SPDX-License-Identifier: Apache-2.0
#include "report/yaml.h"

#include "base/json.h"

#include <algorithm>
#include <array>
#include <cctype>

namespace quern {
namespace {

bool is_letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

bool is_plain_character(char c) {
  return is_letter(c) || (c >= '0' && c <= '9') || c == '-' || c == '_' || c == '.' || c == '/' ||
         c == '+';
}

bool means_something_else(std::string_view text) {
  static constexpr std::array<std::string_view, 11> kWords = {
      "true", "false", "yes", "no", "on", "off", "y", "n", "null", "nan", "inf"};
  std::string lower(text);
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) {
    return static_cast<char>(std::tolower(c));
  });
  return std::find(kWords.begin(), kWords.end(), lower) != kWords.end();
}

}  // namespace

std::string yaml_scalar(std::string_view text) {
  // A leading digit, dot or sign could be read as a number or a date.
  const bool plain = !text.empty() && is_letter(text.front()) && !means_something_else(text) &&
                     std::all_of(text.begin(), text.end(), is_plain_character);
  return plain ? std::string(text) : Json(text).dump(-1, ' ', true, Json::error_handler_t::replace);
}

}  // namespace quern
