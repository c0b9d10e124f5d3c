// SPDX-License-Identifier: Apache-2.0
//
// The input is taken three ways: as a tokenizer.json (which is then used on a text), as the files
// of the other two forms, and as text for fixed tokenizers, where decode(encode(x)) must be NFC(x).
#include "base/error.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/unicode.h"
#include "tokenizer/utf8.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

namespace {

using quern::Tokenizer;
using quern::TokenizerFiles;

std::string json_string(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out += '\\';
    }
    out += c;
  }
  return out + "\"";
}

// 256 bytes and a few merges, with the components of the Qwen tokenizers.
std::string byte_level_json() {
  std::string vocab;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    vocab += json_string(quern::to_byte_alphabet({&c, 1})) + ": " + std::to_string(byte) + ", ";
  }
  return R"({"added_tokens": [
      {"id": 300, "content": "<|im_end|>", "special": true, "normalized": false},
      {"id": 301, "content": "<think>", "special": false, "normalized": false},
      {"id": 302, "content": "e\u0301", "special": false, "normalized": true}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
      {"type": "Split", "pattern": {"Regex":
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
        "behavior": "Isolated"},
      {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {)" +
         vocab + R"("aa": 256, "aaaa": 257, "ab": 258, "Ġa": 259, "Ã©": 260},
      "merges": [["a", "a"], "aa aa", "a b", "Ġ a", "Ã ©"]}})";
}

void require(bool condition) {
  if (!condition) {
    std::abort();
  }
}

void round_trip(const Tokenizer& tokenizer, std::string_view text) {
  const std::vector<std::int32_t> ids = tokenizer.encode(text);
  const std::string decoded = tokenizer.decode(ids);
  if (quern::is_utf8(text)) {
    require(decoded == quern::to_nfc(text));
  }
  quern::StreamDecoder stream(tokenizer);
  std::string streamed;
  for (const std::int32_t id : ids) {
    streamed += stream.push(id);
  }
  require(streamed + stream.finish() == tokenizer.decode(ids, {false, true}));
  (void)tokenizer.encode(text, {false, true});
}

void load_and_use(const TokenizerFiles& files) {
  try {
    const Tokenizer tokenizer = quern::make_tokenizer(files, "fuzz");
    const std::vector<std::int32_t> ids =
        tokenizer.encode("Hello  w\u00f6rld\u0301 123\n<s>\xff", {true, true});
    for (const std::int32_t id : ids) {
      require(id >= 0 && id < tokenizer.vocab_size());
    }
    (void)tokenizer.decode(ids, {true, true});
  } catch (const quern::Error& error) {
    require(quern::exit_code(error.kind()) == 3 || quern::exit_code(error.kind()) == 4);
    const std::string lines = error.three_lines();
    require(std::count(lines.begin(), lines.end(), '\n') == 3);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Tokenizer kFixed =
      quern::make_tokenizer({{"tokenizer.json", byte_level_json()}}, "fixed");
  const std::string input(reinterpret_cast<const char*>(data), size);
  round_trip(kFixed, input);
  load_and_use({{"tokenizer.json", input}});
  load_and_use({{"tokenizer.model", input}});
  const std::size_t half = input.find('\0');
  if (half != std::string::npos) {
    load_and_use({{"vocab.json", input.substr(0, half)}, {"merges.txt", input.substr(half + 1)}});
  }
  load_and_use(
      {{"vocab.json", R"({"a": 0, "b": 1, "ab": 2})"},
       {"merges.txt", "a b\n"},
       {"tokenizer_config.json", input}});
  return 0;
}
