// SPDX-License-Identifier: Apache-2.0
//
// Tokenizers that come without tokenizer.json: what their files leave out is chosen by family.
#include "base/error.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/sources.h"
#include "tokenizer/vocab_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <utility>

namespace quern {
namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& where, std::string reason) {
  throw ParseError(what, where, std::move(reason), "get the tokenizer files again");
}

bool begins_with(const std::string& text, std::string_view prefix) {
  return std::string_view(text).substr(0, prefix.size()) == prefix;
}

void add_special(TokenizerParts& parts, std::int32_t id, std::string content) {
  parts.added.push_back({id, std::move(content), true, false, false, false, false});
}

// A tokenizer class that says nothing of the family leaves it to config.json.
SplitFamily family_of_vocab(const TokenizerHints& hints, const std::string& where) {
  std::string name = hints.tokenizer_class;
  if (name.empty() || begins_with(name, "PreTrainedTokenizer") ||
      begins_with(name, "TokenizersBackend")) {
    name = hints.model_type;
  }
  if (begins_with(name, "Qwen3_5") || begins_with(name, "Qwen3.5") ||
      begins_with(name, "qwen3_5") || begins_with(name, "qwen3_6") ||
      begins_with(name, "qwen3_8") || begins_with(name, "qwen4")) {
    return SplitFamily::kQwen35;
  }
  if (name.empty() || begins_with(name, "Qwen") || begins_with(name, "qwen")) {
    return SplitFamily::kQwen2;
  }
  if (begins_with(name, "GPT2") || name == "gpt2") {
    return SplitFamily::kGpt2;
  }
  if (begins_with(name, "llama")) {
    return SplitFamily::kLlama3;
  }
  throw UnsupportedError(
      "the split pattern of this vocabulary is not known",
      where,
      fmt::format("the directory says \"{}\"", printable(name, 60)),
      "add the model's tokenizer.json, which has the pattern");
}

// One line at a time, without its line end.
bool next_line(std::string_view& text, std::string_view& line) {
  if (text.empty()) {
    return false;
  }
  const std::size_t end = std::min(text.find('\n'), text.size());
  line = text.substr(0, end);
  text.remove_prefix(std::min(end + 1, text.size()));
  if (!line.empty() && line.back() == '\r') {
    line.remove_suffix(1);
  }
  return true;
}

MergeList read_merges_txt(std::string_view text, const std::string& where) {
  MergeList merges;
  std::string_view line;
  for (bool first = true; next_line(text, line); first = false) {
    if (line.empty() || (first && line.substr(0, 8) == "#version")) {
      continue;
    }
    merges.add_line(line, where);
  }
  return merges;
}

constexpr std::array<std::int8_t, 256> make_base64_values() {
  std::array<std::int8_t, 256> values{};
  for (std::int8_t& value : values) {
    value = -1;
  }
  constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (std::size_t i = 0; i < kDigits.size(); ++i) {
    values[static_cast<unsigned char>(kDigits[i])] = static_cast<std::int8_t>(i);
  }
  return values;
}

constexpr std::array<std::int8_t, 256> kBase64 = make_base64_values();

// Standard base64 with padding. False when `text` is anything else.
bool decode_base64(std::string_view text, std::string& out) {
  out.clear();
  if (text.empty() || text.size() % 4 != 0) {
    return false;
  }
  const std::size_t padding = text.size() - std::min(text.find('='), text.size());
  if (padding > 2) {
    return false;
  }
  std::uint32_t bits = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const bool is_padding = i >= text.size() - padding;
    const std::int8_t value =
        is_padding ? std::int8_t{0} : kBase64[static_cast<unsigned char>(text[i])];
    if (value < 0 || (is_padding && text[i] != '=')) {
      return false;
    }
    bits = (bits << 6U) | static_cast<std::uint32_t>(value);
    if (i % 4 == 3) {
      out.push_back(static_cast<char>(bits >> 16U));
      out.push_back(static_cast<char>(bits >> 8U));
      out.push_back(static_cast<char>(bits));
      bits = 0;
    }
  }
  out.resize(out.size() - padding);
  return !out.empty();
}

// "base64 rank" lines. Tokens enter the vocabulary in the byte alphabet, rank as id.
void read_ranks(std::string_view text, Vocabulary& vocabulary, const std::string& where) {
  std::string_view line;
  std::string bytes;
  for (std::size_t number = 1; next_line(text, line); ++number) {
    if (line.empty()) {
      continue;
    }
    const std::size_t space = std::min(line.find(' '), line.size());
    std::int64_t rank = -1;
    const std::string_view digits = line.substr(std::min(space + 1, line.size()));
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), rank);
    if (error != std::errc() || end != digits.data() + digits.size() ||
        !decode_base64(line.substr(0, space), bytes)) {
      if (number == 1) {
        throw UnsupportedError(
            "not a tiktoken rank file",
            where,
            fmt::format(
                "expected \"base64 rank\" lines, found \"{}\"", printable(std::string(line), 40)),
            "SentencePiece models are not read; add the model's tokenizer.json");
      }
      refuse(
          "a line of the rank file is not \"base64 rank\"",
          where,
          fmt::format("line {} is \"{}\"", number, printable(std::string(line), 60)));
    }
    vocabulary.add(to_byte_alphabet(bytes), rank, where);
  }
}

// tiktoken joins the adjacent pair whose bytes are the token of lowest rank. As pairs: every way to
// cut a token into two tokens is a merge with the token's rank.
void add_all_cuts(BpeModel& model) {
  const Vocabulary& vocabulary = model.vocabulary;
  for (std::int32_t id = 0; id < vocabulary.size(); ++id) {
    const std::string_view text = vocabulary.text(id);
    for (std::size_t cut = 1; cut < text.size(); ++cut) {
      if ((static_cast<unsigned char>(text[cut]) & 0xc0U) == 0x80U) {
        continue;  // inside of a character of the byte alphabet
      }
      const std::int32_t left = vocabulary.find(text.substr(0, cut));
      const std::int32_t right = left < 0 ? -1 : vocabulary.find(text.substr(cut));
      if (right >= 0) {
        model.merges.set(left, right, static_cast<std::uint32_t>(id), id);
      }
    }
  }
}

// The names that Meta published with Llama 3; the reserved ones fill 256 places.
void add_llama3_special(TokenizerParts& parts) {
  constexpr std::array<const char*, 10> kFirst = {
      "<|begin_of_text|>",
      "<|end_of_text|>",
      "<|reserved_special_token_0|>",
      "<|reserved_special_token_1|>",
      "<|reserved_special_token_2|>",
      "<|reserved_special_token_3|>",
      "<|start_header_id|>",
      "<|end_header_id|>",
      "<|reserved_special_token_4|>",
      "<|eot_id|>"};
  constexpr std::int32_t kCount = 256;
  std::int32_t id = parts.model.vocabulary.size();
  const std::int32_t end = id + kCount;
  for (const char* name : kFirst) {
    add_special(parts, id++, name);
  }
  for (int reserved = 5; id < end; ++reserved) {
    add_special(parts, id++, fmt::format("<|reserved_special_token_{}|>", reserved));
  }
}

void add_qwen1_special(TokenizerParts& parts) {
  constexpr int kExtras = 205;
  std::int32_t id = parts.model.vocabulary.size();
  for (const char* name : {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}) {
    add_special(parts, id++, name);
  }
  for (int extra = 0; extra < kExtras; ++extra) {
    add_special(parts, id++, fmt::format("<|extra_{}|>", extra));
  }
}

}  // namespace

void set_byte_level(TokenizerParts& parts, SplitFamily family) {
  parts.model.byte_level = true;
  parts.decoder.each_token = {{DecoderSteps::Kind::kByteLevel, {}, {}}};
  if (family == SplitFamily::kQwen2 || family == SplitFamily::kQwen35) {
    parts.normalizer.add_nfc();
  }
  const char* pattern = family == SplitFamily::kGpt2     ? kGpt2Split
                        : family == SplitFamily::kQwen2  ? kQwen2Split
                        : family == SplitFamily::kQwen35 ? kQwen35Split
                                                         : kLlama3Split;
  parts.pre_tokenizer.add_split(Regex(pattern, "split pattern"));
}

TokenizerParts parse_vocab_and_merges(
    std::string_view vocab,
    std::string_view merges,
    const TokenizerHints& hints,
    const std::string& where) {
  TokenizerParts parts;
  const SplitFamily family = family_of_vocab(hints, where);
  set_byte_level(parts, family);
  parts.model.vocabulary = read_vocab_json(vocab, where + "vocab.json");
  read_merges_txt(merges, where + "merges.txt").resolve(parts.model, where + "merges.txt");
  parts.added = hints.added;
  // Qwen2's three control tokens are known even where the configuration was left out.
  if (parts.added.empty() && family == SplitFamily::kQwen2 && !hints.has_tokenizer_config &&
      parts.model.vocabulary.find("<|endoftext|>") < 0) {
    std::int32_t id = parts.model.vocabulary.size();
    for (const char* name : {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}) {
      add_special(parts, id++, name);
    }
    parts.eos = parts.added.front().id;
    parts.stop = {parts.added.back().id};
  }
  return parts;
}

TokenizerParts parse_tiktoken(
    std::string_view ranks,
    const std::string& file_name,
    const TokenizerHints& hints,
    const std::string& where) {
  // Llama's rank file is always called tokenizer.model.
  const bool is_qwen = file_name != "tokenizer.model";
  const std::string& said =
      hints.tokenizer_class.empty() ? hints.model_type : hints.tokenizer_class;
  if (is_qwen && !said.empty() && !begins_with(said, "QWen") && !begins_with(said, "qwen") &&
      !begins_with(said, "Qwen")) {
    throw UnsupportedError(
        "the split pattern of this rank file is not known",
        where + file_name,
        fmt::format("the directory says \"{}\"", printable(said, 60)),
        "add the model's tokenizer.json, which has the pattern");
  }
  TokenizerParts parts;
  set_byte_level(parts, is_qwen ? SplitFamily::kQwen2 : SplitFamily::kLlama3);
  read_ranks(ranks, parts.model.vocabulary, where + file_name);
  parts.model.ignore_merges = true;
  add_all_cuts(parts.model);
  if (!hints.added.empty()) {
    parts.added = hints.added;
  } else if (is_qwen) {
    add_qwen1_special(parts);
  } else {
    add_llama3_special(parts);
  }
  const auto id_of = [&](std::string_view name) -> std::optional<std::int32_t> {
    const auto found =
        std::find_if(parts.added.begin(), parts.added.end(), [&](const AddedToken& token) {
          return token.content == name;
        });
    return found == parts.added.end() ? std::nullopt : std::optional(found->id);
  };
  parts.eos = id_of(is_qwen ? "<|endoftext|>" : "<|end_of_text|>");
  if (const auto turn = id_of(is_qwen ? "<|im_end|>" : "<|eot_id|>")) {
    parts.stop.push_back(*turn);
  }
  if (const auto bos = id_of("<|begin_of_text|>"); bos && !is_qwen) {
    parts.bos = bos;
    parts.prefix = {*bos};
  }
  return parts;
}

}  // namespace quern
