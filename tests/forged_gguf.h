// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

// GGUF files put together by hand, so that each field can lie.
namespace quern::testing {

template <class T>
std::string raw(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof(T)};
}

inline std::string gguf_string(const std::string& text) {
  return raw(std::uint64_t{text.size()}) + text;
}

// A pair with a value that is already in the file's form.
inline std::string gguf_pair(const std::string& key, std::uint32_t type, const std::string& value) {
  return gguf_string(key) + raw(type) + value;
}

inline std::string gguf_text_pair(const std::string& key, const std::string& text) {
  return gguf_pair(key, 8, gguf_string(text));
}

inline std::string gguf_u32_pair(const std::string& key, std::uint32_t value) {
  return gguf_pair(key, 4, raw(value));
}

inline std::string gguf_tensor(
    const std::string& name,
    const std::vector<std::int64_t>& extents,
    std::uint32_t type,
    std::uint64_t offset) {
  std::string text = gguf_string(name) + raw(static_cast<std::uint32_t>(extents.size()));
  for (const std::int64_t extent : extents) {
    text += raw(extent);
  }
  return text + raw(type) + raw(offset);
}

struct ForgedGguf {
  std::string magic = "GGUF";
  std::uint32_t version = 3;
  std::vector<std::string> pairs;
  std::vector<std::string> tensors;
  std::string data;
  std::int64_t more_pairs = 0;  // added to the counts
  std::int64_t more_tensors = 0;
  std::size_t alignment = 32;

  [[nodiscard]] std::string bytes() const {
    std::string text = magic + raw(version) +
                       raw(static_cast<std::int64_t>(tensors.size()) + more_tensors) +
                       raw(static_cast<std::int64_t>(pairs.size()) + more_pairs);
    for (const std::string& pair : pairs) {
      text += pair;
    }
    for (const std::string& tensor : tensors) {
      text += tensor;
    }
    text.resize((text.size() + alignment - 1) / alignment * alignment, '\0');
    return text + data;
  }
};

// A good one: two F32 tensors of 8 values, one Q4_0 of 32.
inline ForgedGguf good_gguf() {
  ForgedGguf file;
  file.pairs = {gguf_text_pair("general.architecture", "qwen3"), gguf_u32_pair("n", 7)};
  file.tensors = {
      gguf_tensor("a.weight", {8}, 0, 0),
      gguf_tensor("b.weight", {4, 2}, 0, 32),
      gguf_tensor("c.weight", {32}, 2, 64)};
  file.data = std::string(96, '\1');
  return file;
}

}  // namespace quern::testing
