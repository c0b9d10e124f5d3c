// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// Objects keep their order, so that a file that is read and written back stays recognisable.
using Json = nlohmann::ordered_json;

// Parses untrusted text. `where` names the file for messages. Throws ParseError for bad syntax,
// duplicate keys of one object, invalid UTF-8, and nesting deeper than 64.
[[nodiscard]] Json parse_json(std::string_view text, const std::string& where);
[[nodiscard]] Json read_json(const std::filesystem::path& path, std::uint64_t limit = 256U << 20U);

// Typed reads of an object; the message names file and key. get_* throws ParseError when the key is
// missing or of another type; the *_or forms take an absent or null key as `fallback`.
class JsonReader {
 public:
  JsonReader(const Json& object, std::string where);  // `object` must outlive the reader

  [[nodiscard]] bool has(const std::string& key) const;  // present and not null
  [[nodiscard]] std::int64_t get_int(const std::string& key) const;
  [[nodiscard]] std::int64_t get_int_or(const std::string& key, std::int64_t fallback) const;
  // A count or size: an integer within [low, high].
  [[nodiscard]] std::int64_t get_int_in(
      const std::string& key, std::int64_t low, std::int64_t high) const;
  [[nodiscard]] std::int64_t get_int_in_or(
      const std::string& key, std::int64_t low, std::int64_t high, std::int64_t fallback) const;
  [[nodiscard]] double get_number(const std::string& key) const;
  [[nodiscard]] double get_number_or(const std::string& key, double fallback) const;
  [[nodiscard]] bool get_bool_or(const std::string& key, bool fallback) const;
  [[nodiscard]] std::string get_string(const std::string& key) const;
  [[nodiscard]] std::string get_string_or(
      const std::string& key, const std::string& fallback) const;
  [[nodiscard]] JsonReader get_object(const std::string& key) const;
  [[nodiscard]] const Json& get_array(const std::string& key) const;

  [[nodiscard]] const Json& json() const noexcept { return *object_; }
  [[nodiscard]] const std::string& where() const noexcept { return where_; }
  // For messages: "config.json: rope_scaling.factor".
  [[nodiscard]] std::string place(const std::string& key) const;

 private:
  [[nodiscard]] const Json& at(const std::string& key) const;
  [[noreturn]] void wrong_type(const std::string& key, const char* expected) const;

  const Json* object_;
  std::string where_;
};

}  // namespace quern
