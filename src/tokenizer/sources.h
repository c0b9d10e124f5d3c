// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tokenizer/tokenizer.h"

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// What the small files beside a tokenizer say. Absent files say nothing.
struct TokenizerHints {
  std::string tokenizer_class;  // tokenizer_config.json
  std::string model_type;  // config.json
  std::optional<bool> add_bos;
  std::optional<bool> add_eos;
  std::vector<AddedToken> added;  // added_tokens_decoder, else added_tokens.json
  bool has_tokenizer_config = false;
};

[[nodiscard]] TokenizerHints read_hints(const TokenizerFiles& files, const std::string& where);

// Sets bos, eos and stop of `parts` from the configurations, and puts BOS and EOS around the text
// as add_bos_token and add_eos_token say.
void set_special_ids(
    TokenizerParts& parts,
    const TokenizerFiles& files,
    const TokenizerHints& hints,
    const std::string& where);

// The three forms of a tokenizer. Each takes the bytes of its files and names `where` in messages.
[[nodiscard]] TokenizerParts parse_tokenizer_json(std::string_view text, const std::string& where);
[[nodiscard]] TokenizerParts parse_vocab_and_merges(
    std::string_view vocab,
    std::string_view merges,
    const TokenizerHints& hints,
    const std::string& where);
[[nodiscard]] TokenizerParts parse_tiktoken(
    std::string_view ranks,
    const std::string& file_name,
    const TokenizerHints& hints,
    const std::string& where);

// Fills in all but vocabulary, merges and added tokens for a byte-level family.
enum class SplitFamily { kGpt2, kQwen2, kQwen35, kLlama3 };
void set_byte_level(TokenizerParts& parts, SplitFamily family);

}  // namespace quern
