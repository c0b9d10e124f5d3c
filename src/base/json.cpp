// SPDX-License-Identifier: Apache-2.0
#include "base/json.h"

#include "base/error.h"
#include "base/file.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <unordered_set>
#include <utility>

namespace quern {
namespace {

constexpr std::size_t kMaxDepth = 64;

// Builds the document while refusing what nlohmann's own parser lets pass: duplicate keys (the last
// would win silently) and nesting that would exhaust the stack of recursive code. Members are
// appended without the look-up that makes an ordered object quadratic: headers and vocabularies
// have a hundred thousand of them.
class StrictReader : public nlohmann::json_sax<Json> {
 public:
  explicit StrictReader(Json& root) : root_(&root) {}

  bool null() override { return put(nullptr); }
  bool boolean(bool value) override { return put(value); }
  bool number_integer(number_integer_t value) override { return put(value); }
  bool number_unsigned(number_unsigned_t value) override { return put(value); }
  bool number_float(number_float_t value, const string_t& text) override {
    if (!std::isfinite(value)) {
      problem_ = "a number out of range: " + text;
      return false;
    }
    return put(value);
  }
  bool string(string_t& value) override { return put(std::move(value)); }
  bool binary(binary_t& value) override { return put(std::move(value)); }
  bool start_object(std::size_t size) override {
    (void)size;
    keys_.emplace_back();
    return enter(Json::object());
  }
  bool key(string_t& value) override {
    if (!keys_.back().insert(value).second) {
      problem_ = "the key \"" + value + "\" stands twice in one object";
      return false;
    }
    auto& members = open_.back()->get_ref<Json::object_t&>();
    slot_ = &members.emplace_back(value, nullptr).second;
    return true;
  }
  bool end_object() override {
    keys_.pop_back();
    open_.pop_back();
    return true;
  }
  bool start_array(std::size_t size) override {
    (void)size;
    return enter(Json::array());
  }
  bool end_array() override {
    open_.pop_back();
    return true;
  }
  bool parse_error(
      std::size_t position,
      const std::string& token,
      const nlohmann::detail::exception& error) override {
    (void)token;
    // Without the library's own label: "[json.exception.parse_error.101] ".
    std::string_view text = error.what();
    text.remove_prefix(std::min(text.size(), text.find("] ") + 2));
    problem_ = fmt::format("byte {}: {}", position, text);
    return false;
  }

  [[nodiscard]] const std::string& problem() const { return problem_; }

 private:
  // Stores a value where the document goes on; `slot_` is then the stored one.
  bool put(Json value) {
    if (!open_.empty() && open_.back()->is_array()) {
      auto& items = open_.back()->get_ref<Json::array_t&>();
      slot_ = &items.emplace_back(std::move(value));
      return true;
    }
    slot_ = open_.empty() ? root_ : slot_;
    *slot_ = std::move(value);
    return true;
  }

  bool enter(Json container) {
    if (open_.size() >= kMaxDepth) {
      problem_ = fmt::format("nested deeper than {}", kMaxDepth);
      return false;
    }
    put(std::move(container));
    // Stays valid: a container grows only after everything inside its last element was closed.
    open_.push_back(slot_);
    return true;
  }

  Json* root_;
  Json* slot_ = nullptr;  // the value that follows the last key
  std::vector<Json*> open_;
  std::vector<std::unordered_set<std::string>> keys_;
  std::string problem_;
};

}  // namespace

Json parse_json(std::string_view text, const std::string& where) {
  Json root;
  StrictReader reader(root);
  if (!Json::sax_parse(text.begin(), text.end(), &reader)) {
    throw ParseError("not valid JSON", where, reader.problem(), "get the file again");
  }
  return root;
}

Json read_json(const std::filesystem::path& path, std::uint64_t limit) {
  return parse_json(read_file(path, limit), path.string());
}

JsonReader::JsonReader(const Json& object, std::string where)
    : object_(&object), where_(std::move(where)) {
  if (!object.is_object()) {
    throw ParseError(
        "not a JSON object", where_, fmt::format("found {}", object.type_name()), "check the file");
  }
}

std::string JsonReader::place(const std::string& key) const {
  return where_ + ": " + key;
}

bool JsonReader::has(const std::string& key) const {
  const auto found = object_->find(key);
  return found != object_->end() && !found->is_null();
}

const Json& JsonReader::at(const std::string& key) const {
  if (!has(key)) {
    throw ParseError(
        "a required key is missing",
        place(key),
        "nothing found",
        "check that the file is complete");
  }
  return *object_->find(key);
}

void JsonReader::wrong_type(const std::string& key, const char* expected) const {
  const Json& value = at(key);
  throw ParseError(
      "a key has the wrong type",
      place(key),
      fmt::format(
          "expected {}, found {} {}",
          expected,
          value.type_name(),
          printable(value.dump(-1, ' ', false, Json::error_handler_t::replace), 60)),
      "check the file");
}

std::int64_t JsonReader::get_int(const std::string& key) const {
  const Json& value = at(key);
  if (!value.is_number_integer() ||
      (value.is_number_unsigned() &&
       value.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX))) {
    wrong_type(key, "an integer");
  }
  return value.get<std::int64_t>();
}

std::int64_t JsonReader::get_int_or(const std::string& key, std::int64_t fallback) const {
  return has(key) ? get_int(key) : fallback;
}

std::int64_t JsonReader::get_int_in(
    const std::string& key, std::int64_t low, std::int64_t high) const {
  const std::int64_t value = get_int(key);
  if (value < low || value > high) {
    throw ParseError(
        "a key is out of range",
        place(key),
        fmt::format("expected {} to {}, found {}", low, high, value),
        "check the file");
  }
  return value;
}

std::int64_t JsonReader::get_int_in_or(
    const std::string& key, std::int64_t low, std::int64_t high, std::int64_t fallback) const {
  return has(key) ? get_int_in(key, low, high) : fallback;
}

double JsonReader::get_number(const std::string& key) const {
  const Json& value = at(key);
  if (!value.is_number()) {
    wrong_type(key, "a number");
  }
  return value.get<double>();
}

double JsonReader::get_number_or(const std::string& key, double fallback) const {
  return has(key) ? get_number(key) : fallback;
}

bool JsonReader::get_bool_or(const std::string& key, bool fallback) const {
  if (!has(key)) {
    return fallback;
  }
  const Json& value = at(key);
  if (!value.is_boolean()) {
    wrong_type(key, "true or false");
  }
  return value.get<bool>();
}

std::string JsonReader::get_string(const std::string& key) const {
  const Json& value = at(key);
  if (!value.is_string()) {
    wrong_type(key, "a string");
  }
  return value.get<std::string>();
}

std::string JsonReader::get_string_or(const std::string& key, const std::string& fallback) const {
  return has(key) ? get_string(key) : fallback;
}

JsonReader JsonReader::get_object(const std::string& key) const {
  const Json& value = at(key);
  if (!value.is_object()) {
    wrong_type(key, "an object");
  }
  return {value, place(key)};
}

const Json& JsonReader::get_array(const std::string& key) const {
  const Json& value = at(key);
  if (!value.is_array()) {
    wrong_type(key, "an array");
  }
  return value;
}

}  // namespace quern
