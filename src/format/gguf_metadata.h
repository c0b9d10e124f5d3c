// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace quern {

// An array of the metadata; index() is the number of its element type in the file. Arrays of arrays
// (monostate) are not read and not written: no known key has one.
using GgufArray = std::variant<
    std::vector<std::uint8_t>,
    std::vector<std::int8_t>,
    std::vector<std::uint16_t>,
    std::vector<std::int16_t>,
    std::vector<std::uint32_t>,
    std::vector<std::int32_t>,
    std::vector<float>,
    std::vector<bool>,
    std::vector<std::string>,
    std::monostate,
    std::vector<std::uint64_t>,
    std::vector<std::int64_t>,
    std::vector<double>>;

// A value of the metadata; index() is the number of its type in the file.
using GgufValue = std::variant<
    std::uint8_t,
    std::int8_t,
    std::uint16_t,
    std::int16_t,
    std::uint32_t,
    std::int32_t,
    float,
    bool,
    std::string,
    GgufArray,
    std::uint64_t,
    std::int64_t,
    double>;

// The key-value pairs of a GGUF file, in the order of the file. Strings are the bytes of the file;
// nothing promises that they are UTF-8.
class GgufMetadata {
 public:
  struct Entry {
    std::string key;
    GgufValue value;
  };

  explicit GgufMetadata(std::string where = "GGUF metadata") : where_(std::move(where)) {}

  // Appends a pair; false, and no change, when the key is there already.
  bool add(std::string key, GgufValue value);
  [[nodiscard]] const std::vector<Entry>& entries() const noexcept { return entries_; }
  [[nodiscard]] const GgufValue* find(const std::string& key) const noexcept;
  [[nodiscard]] bool has(const std::string& key) const noexcept { return find(key) != nullptr; }

  // Typed reads; ParseError, naming file and key, when the key is missing or of another type. An
  // integer may be of any integer type, a number of any but bool.
  [[nodiscard]] std::int64_t get_int(const std::string& key) const;
  [[nodiscard]] std::int64_t get_int_in(
      const std::string& key, std::int64_t low, std::int64_t high) const;
  [[nodiscard]] std::int64_t get_int_or(const std::string& key, std::int64_t fallback) const;
  [[nodiscard]] double get_number(const std::string& key) const;
  [[nodiscard]] double get_number_or(const std::string& key, double fallback) const;
  [[nodiscard]] bool get_bool_or(const std::string& key, bool fallback) const;
  [[nodiscard]] const std::string& get_string(const std::string& key) const;
  [[nodiscard]] std::string get_string_or(
      const std::string& key, const std::string& fallback) const;
  [[nodiscard]] const std::vector<std::string>& get_strings(const std::string& key) const;
  // An array of any integer type.
  [[nodiscard]] std::vector<std::int64_t> get_ints(const std::string& key) const;

  [[nodiscard]] const std::string& where() const noexcept { return where_; }
  // For messages: "model.gguf: general.architecture".
  [[nodiscard]] std::string place(const std::string& key) const;

 private:
  [[nodiscard]] const GgufValue& at(const std::string& key) const;
  [[noreturn]] void wrong_type(const std::string& key, const char* expected) const;

  std::string where_;
  std::vector<Entry> entries_;
  std::map<std::string, std::size_t> places_;
};

// "u32", "string", "array of i32": for messages.
[[nodiscard]] std::string gguf_type_name(const GgufValue& value);

}  // namespace quern
