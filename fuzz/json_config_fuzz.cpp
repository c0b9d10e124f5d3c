// SPDX-License-Identifier: Apache-2.0
// Configurations and the shard index as arbitrary text: parsed, read through typed getters, and
// what is accepted must survive being written and parsed again.
#include "base/error.h"
#include "base/json.h"
#include "format/safetensors.h"

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string_view>

namespace {

void expect_error_or_value(const std::function<void()>& read) {
  try {
    read();
  } catch (const quern::Error& error) {
    (void)error.three_lines();
  }
}

void read_keys(const quern::Json& json) {
  const quern::JsonReader reader(json, "input");
  for (const auto& [key, value] : json.items()) {
    const auto& name = key;
    expect_error_or_value([&] { (void)reader.get_int(name); });
    expect_error_or_value([&] { (void)reader.get_int_in_or(name, 1, 1 << 20, 7); });
    expect_error_or_value([&] { (void)reader.get_number_or(name, 1.0); });
    expect_error_or_value([&] { (void)reader.get_bool_or(name, true); });
    expect_error_or_value([&] { (void)reader.get_string_or(name, "x"); });
    expect_error_or_value([&] { (void)reader.get_array(name).size(); });
    if (value.is_object()) {
      read_keys(value);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  expect_error_or_value([&] { (void)quern::parse_safetensors_index(text, "index"); });
  expect_error_or_value([&] {
    const quern::Json json = quern::parse_json(text, "input");
    if (quern::parse_json(json.dump(), "again") != json) {
      std::abort();
    }
    read_keys(json);
  });
  return 0;
}
