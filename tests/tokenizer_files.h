// SPDX-License-Identifier: Apache-2.0
#pragma once

// Released tokenizer files for tests, rebuilt from the small forms in testdata/tokenizers.

#include "base/file.h"
#include "base/json.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/tokenizer.h"

#include <gtest/gtest.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace quern::testing_files {

inline std::filesystem::path testdata() {
  return QUERN_TESTDATA;
}

inline std::string read_gz(const std::filesystem::path& path) {
  gzFile file = gzopen(path.c_str(), "rb");
  if (file == nullptr) {
    throw std::runtime_error("cannot open " + path.string());
  }
  std::string out;
  std::array<char, 65536> buffer{};
  int got = 0;
  while ((got = gzread(file, buffer.data(), buffer.size())) > 0) {
    out.append(buffer.data(), static_cast<std::size_t>(got));
  }
  gzclose(file);
  if (got < 0) {
    throw std::runtime_error("not gzip: " + path.string());
  }
  return out;
}

inline std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    lines.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return lines;
}

inline std::string sha256(const std::string& text) {
  Sha256 hash;
  hash.update(text);
  return hash.hex();
}

inline std::string json_string(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
    }
    out += c;
  }
  return out + "\"";
}

inline std::string base64(const std::string& bytes) {
  constexpr const char* kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (std::size_t at = 0; at < bytes.size(); at += 3) {
    unsigned value = 0;
    for (std::size_t i = 0; i < 3; ++i) {
      value =
          value << 8U | (at + i < bytes.size() ? static_cast<unsigned char>(bytes[at + i]) : 0U);
    }
    for (unsigned i = 0; i < 4; ++i) {
      out += at + i > bytes.size() ? '=' : kDigits[value >> (18U - 6U * i) & 63U];
    }
  }
  return out;
}

// The vocabulary that Qwen 1, 2, 2.5 and 3 share.
struct QwenBase {
  std::string merges_txt;
  std::vector<std::pair<std::string, std::string>> merges;
  std::vector<std::string> tokens;  // by id, in the byte alphabet
};

inline const QwenBase& qwen_base() {
  static const QwenBase kBase = [] {
    QwenBase base;
    base.merges_txt = read_gz(testdata() / "tokenizers/qwen/merges.txt.gz");
    for (unsigned byte = 0; byte < 256; ++byte) {
      base.tokens.push_back(to_byte_alphabet(std::string(1, static_cast<char>(byte))));
    }
    // UTF-8 sorts as its code points do.
    std::sort(base.tokens.begin(), base.tokens.end());
    for (const std::string& line : lines_of(base.merges_txt)) {
      const std::size_t space = line.find(' ');
      if (line.rfind("#version", 0) == 0) {
        continue;
      }
      base.merges.emplace_back(line.substr(0, space), line.substr(space + 1));
      base.tokens.push_back(base.merges.back().first + base.merges.back().second);
    }
    return base;
  }();
  return kBase;
}

inline std::string qwen_vocab_json() {
  std::string out = "{";
  const QwenBase& base = qwen_base();
  for (std::size_t id = 0; id < base.tokens.size(); ++id) {
    out += id == 0 ? "" : ",";
    out += json_string(base.tokens[id]);
    out += ':';
    out += std::to_string(id);
  }
  return out + "}";
}

inline std::string qwen_tiktoken() {
  std::string out;
  std::string bytes;
  const QwenBase& base = qwen_base();
  for (std::size_t id = 0; id < base.tokens.size(); ++id) {
    EXPECT_TRUE(from_byte_alphabet(base.tokens[id], bytes));
    out += base64(bytes) + " " + std::to_string(id) + "\n";
  }
  return out;
}

// `name` is qwen2.5 (merges as strings) or qwen3 (merges as pairs).
inline std::string qwen_tokenizer_json(const std::string& name) {
  const QwenBase& base = qwen_base();
  std::string out = read_file(testdata() / "tokenizers/qwen" / (name + ".head.json"));
  for (std::size_t id = 0; id < base.tokens.size(); ++id) {
    out += std::string(id == 0 ? "\n      " : ",\n      ") + json_string(base.tokens[id]) + ": " +
           std::to_string(id);
  }
  out += "\n    },\n    \"merges\": [";
  bool first = true;
  for (const auto& [left, right] : base.merges) {
    out += first ? "\n      " : ",\n      ";
    first = false;
    if (name == "qwen3") {
      out.append("[\n        ").append(json_string(left));
      out.append(",\n        ").append(json_string(right)).append("\n      ]");
    } else {
      std::string line = left;
      line.append(" ").append(right);
      out += json_string(line);
    }
  }
  return out + "\n    ]\n  }\n}";
}

inline std::string llama3_model() {
  return read_gz(testdata() / "tokenizers/llama3/tokenizer.model.gz");
}

}  // namespace quern::testing_files
