// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// Lenient reads of a document: nothing when a key on the path is absent or of another type.
using JsonPath = std::initializer_list<const char*>;
[[nodiscard]] const Json* find_json(const Json& document, JsonPath path);
[[nodiscard]] std::optional<double> find_number(const Json& document, JsonPath path);  // finite
[[nodiscard]] std::string find_text(const Json& document, JsonPath path);  // empty if absent
[[nodiscard]] const Json& find_list(const Json& document, JsonPath path);  // empty array if absent
// A scalar as a person reads it: text without quotes, numbers with up to 6 digits.
[[nodiscard]] std::string plain_value(const Json& value);

struct LinearFacts {
  std::string name;
  std::string role;
  std::optional<std::int64_t> layer;
  std::string shape;  // "896 × 4864"
  double parameters = 0;
  std::string method;
  std::optional<double> bits;
  std::string group;  // "128", "channel" or empty
  std::string fallback;  // empty: none
  std::string rule;
  std::optional<double> bytes;
  std::optional<double> tokens;
  std::optional<double> damping;
  std::optional<double> dead_columns;
  std::optional<double> relative_error;
  std::optional<double> holdout_error;
  std::optional<double> rtn_error;

  // Error over that of plain rounding; none when either is unknown or rounding was exact.
  [[nodiscard]] std::optional<double> rtn_ratio() const;
};

struct KeptFacts {
  std::string name;
  std::string dtype;
  std::string reason;
  std::string kind;  // "embedding", "output head", "norms", "biases", "other"
  double bytes = 0;
  double parameters = 0;  // 0 for a dtype whose width is unknown
};

[[nodiscard]] std::vector<LinearFacts> linears_of(const Json& manifest);
[[nodiscard]] std::vector<KeptFacts> kept_of(const Json& manifest);

// The roles that occur, attention first, then feed-forward, then unknown ones as they come.
[[nodiscard]] std::vector<std::string> roles_of(const std::vector<LinearFacts>& linears);

// One tile of a file: bytes and parameters of a role or of a kind of tensor that was kept.
struct StorageShare {
  std::string label;
  bool quantized = false;
  double bytes = 0;
  double parameters = 0;
};
[[nodiscard]] std::vector<StorageShare> storage_of(const Json& manifest);

[[nodiscard]] std::string with_thousands(double value);  // "1,234,567"
[[nodiscard]] std::string short_number(double value);  // 4 significant digits
[[nodiscard]] std::string target_of(const Json& manifest);  // "gptq, 4 bit, groups of 128"

}  // namespace quern
