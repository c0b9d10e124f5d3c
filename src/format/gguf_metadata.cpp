// SPDX-License-Identifier: Apache-2.0
#include "format/gguf_metadata.h"

#include "base/error.h"

#include <fmt/format.h>

#include <array>
#include <limits>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>

namespace quern {
namespace {

constexpr std::array<std::string_view, 13> kTypeNames = {
    "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"};

template <class T>
constexpr bool kIsInteger = std::is_integral_v<T> && !std::is_same_v<T, bool>;

// Nothing for values of other types and for integers beyond 63 bits.
std::optional<std::int64_t> integer_of(const GgufValue& value) {
  return std::visit(
      [](const auto& held) -> std::optional<std::int64_t> {
        using T = std::decay_t<decltype(held)>;
        if constexpr (kIsInteger<T>) {
          if (std::in_range<std::int64_t>(held)) {
            return static_cast<std::int64_t>(held);
          }
        }
        return std::nullopt;
      },
      value);
}

}  // namespace

std::string gguf_type_name(const GgufValue& value) {
  const GgufArray* array = std::get_if<GgufArray>(&value);
  return array == nullptr ? std::string(kTypeNames[value.index()])
                          : fmt::format("array of {}", kTypeNames[array->index()]);
}

bool GgufMetadata::add(std::string key, GgufValue value) {
  if (!places_.emplace(key, entries_.size()).second) {
    return false;
  }
  entries_.push_back({std::move(key), std::move(value)});
  return true;
}

const GgufValue* GgufMetadata::find(const std::string& key) const noexcept {
  const auto place = places_.find(key);
  return place == places_.end() ? nullptr : &entries_[place->second].value;
}

std::string GgufMetadata::place(const std::string& key) const {
  return where_ + ": " + printable(key);
}

const GgufValue& GgufMetadata::at(const std::string& key) const {
  const GgufValue* value = find(key);
  if (value == nullptr) {
    throw ParseError(
        "a required key is missing",
        place(key),
        fmt::format("expected it among {} keys, found nothing", entries_.size()),
        "use a GGUF file of a complete model");
  }
  return *value;
}

void GgufMetadata::wrong_type(const std::string& key, const char* expected) const {
  throw ParseError(
      "a key has the wrong type",
      place(key),
      fmt::format("expected {}, found {}", expected, gguf_type_name(at(key))),
      "convert the model again");
}

std::int64_t GgufMetadata::get_int(const std::string& key) const {
  const std::optional<std::int64_t> value = integer_of(at(key));
  if (!value) {
    wrong_type(key, "an integer");
  }
  return *value;
}

std::int64_t GgufMetadata::get_int_in(
    const std::string& key, std::int64_t low, std::int64_t high) const {
  const std::int64_t value = get_int(key);
  if (value < low || value > high) {
    throw ParseError(
        "a key is out of range",
        place(key),
        fmt::format("expected {} to {}, found {}", low, high, value),
        "convert the model again");
  }
  return value;
}

std::int64_t GgufMetadata::get_int_or(const std::string& key, std::int64_t fallback) const {
  return has(key) ? get_int(key) : fallback;
}

double GgufMetadata::get_number(const std::string& key) const {
  const GgufValue& value = at(key);
  if (const float* single = std::get_if<float>(&value)) {
    return *single;
  }
  if (const double* number = std::get_if<double>(&value)) {
    return *number;
  }
  if (const std::optional<std::int64_t> integer = integer_of(value)) {
    return static_cast<double>(*integer);
  }
  wrong_type(key, "a number");
}

double GgufMetadata::get_number_or(const std::string& key, double fallback) const {
  return has(key) ? get_number(key) : fallback;
}

bool GgufMetadata::get_bool_or(const std::string& key, bool fallback) const {
  if (!has(key)) {
    return fallback;
  }
  const bool* value = std::get_if<bool>(&at(key));
  if (value == nullptr) {
    wrong_type(key, "true or false");
  }
  return *value;
}

const std::string& GgufMetadata::get_string(const std::string& key) const {
  const std::string* value = std::get_if<std::string>(&at(key));
  if (value == nullptr) {
    wrong_type(key, "a string");
  }
  return *value;
}

std::string GgufMetadata::get_string_or(const std::string& key, const std::string& fallback) const {
  return has(key) ? get_string(key) : fallback;
}

const std::vector<std::string>& GgufMetadata::get_strings(const std::string& key) const {
  const GgufArray* array = std::get_if<GgufArray>(&at(key));
  const auto* strings = array == nullptr ? nullptr : std::get_if<std::vector<std::string>>(array);
  if (strings == nullptr) {
    wrong_type(key, "an array of strings");
  }
  return *strings;
}

std::vector<std::int64_t> GgufMetadata::get_ints(const std::string& key) const {
  const GgufArray* array = std::get_if<GgufArray>(&at(key));
  if (array == nullptr) {
    wrong_type(key, "an array of integers");
  }
  return std::visit(
      [&](const auto& values) -> std::vector<std::int64_t> {
        using Values = std::decay_t<decltype(values)>;
        if constexpr (!std::is_same_v<Values, std::monostate>) {
          if constexpr (kIsInteger<typename Values::value_type>) {
            std::vector<std::int64_t> out;
            out.reserve(values.size());
            for (const auto value : values) {
              if (!std::in_range<std::int64_t>(value)) {
                wrong_type(key, "integers below 2^63");
              }
              out.push_back(static_cast<std::int64_t>(value));
            }
            return out;
          }
        }
        wrong_type(key, "an array of integers");
      },
      *array);
}

}  // namespace quern
