// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/decoder.h"
#include "tokenizer/normalizer.h"
#include "tokenizer/pre_tokenizer.h"

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

struct EncodeOptions {
  // Special tokens written in the text become their ids. Set it to false for text that a stranger
  // wrote: then `<|im_end|>` is ten characters. Added tokens that are not special (`<think>`) are
  // found either way, as in the `tokenizers` library.
  bool parse_special = true;
  // Put the tokens around the text that the tokenizer's post-processor names (BOS of Llama).
  bool add_special_tokens = false;
};

struct DecodeOptions {
  bool skip_special = false;
  // Bytes that are no UTF-8 become U+FFFD; otherwise they are handed out as they are.
  bool replace_invalid = false;
};

// Everything that makes a tokenizer, whatever file it came from. Other formats (a GGUF's metadata)
// fill this and call the constructor of Tokenizer; known_split() has the usual settings.
struct TokenizerParts {
  BpeModel model;
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  DecoderSteps decoder;
  std::vector<AddedToken> added;
  std::vector<std::int32_t> prefix;  // add_special_tokens puts these before and after the text
  std::vector<std::int32_t> suffix;
  std::optional<std::int32_t> bos;
  std::optional<std::int32_t> eos;
  std::vector<std::int32_t> stop;  // further ids that end generation
};

// Text to token ids and back. Immutable and cheap to copy (copies share their tables); every
// method may be called from any thread.
class Tokenizer {
 public:
  // Throws ParseError, naming `where`, for ids out of range, taken twice or without a token.
  Tokenizer(TokenizerParts parts, const std::string& where);

  // Bytes that are not UTF-8 become U+FFFD first, one for each maximal invalid subpart: what the
  // reference does when it makes a string of a file.
  [[nodiscard]] std::vector<std::int32_t> encode(
      std::string_view text, const EncodeOptions& options = {}) const;

  // Ids without a token (padding rows of the embedding) stand for nothing.
  [[nodiscard]] std::string decode(
      std::span<const std::int32_t> ids, const DecodeOptions& options = {}) const;

  // The bytes that decode() writes for one token, but for what it strips off the front of a text.
  [[nodiscard]] std::string_view token_bytes(std::int32_t id) const noexcept;
  // The token as the vocabulary writes it (in the byte alphabet for byte-level models).
  [[nodiscard]] std::string_view token_text(std::int32_t id) const noexcept;
  // The id of an added token by its content, of any other by its text in the vocabulary.
  [[nodiscard]] std::optional<std::int32_t> find(std::string_view text) const;

  // One more than the largest id. The embedding may have more rows.
  [[nodiscard]] std::int32_t vocab_size() const noexcept;
  [[nodiscard]] bool is_special(std::int32_t id) const noexcept;
  [[nodiscard]] bool is_added(std::int32_t id) const noexcept;

  [[nodiscard]] std::optional<std::int32_t> bos_id() const noexcept;
  // The tokenizer's own end token (`<|im_end|>` in chat configurations of Qwen).
  [[nodiscard]] std::optional<std::int32_t> eos_id() const noexcept;
  // All ids that end generation: eos_id() first, then generation_config.json's (or config.json's).
  [[nodiscard]] const std::vector<std::int32_t>& eos_ids() const noexcept;
  [[nodiscard]] bool adds_bos() const noexcept;  // add_special_tokens would put BOS first
  // What it was made of, for formats that carry their tokenizer with them.
  [[nodiscard]] const TokenizerParts& parts() const noexcept;

 private:
  friend class StreamDecoder;
  struct State;
  std::shared_ptr<const State> state_;
};

// Decodes a growing sequence for display: each push() returns the text that is certain by now.
// Incomplete UTF-8 is held back, bytes that can no longer become UTF-8 are U+FFFD. The pieces put
// together are decode() with replace_invalid.
class StreamDecoder {
 public:
  explicit StreamDecoder(Tokenizer tokenizer, bool skip_special = false);
  [[nodiscard]] std::string push(std::int32_t id);
  // What was held back.
  [[nodiscard]] std::string finish();

 private:
  Tokenizer tokenizer_;
  bool skip_special_;
  std::string held_;
  std::size_t strip_left_;
};

// File name -> content, of one directory.
using TokenizerFiles = std::map<std::string, std::string>;

// The tokenizer of a directory: tokenizer.json, else vocab.json + merges.txt, else a tiktoken rank
// file (tokenizer.model of Llama 3, *.tiktoken of Qwen 1). One of these files may be named itself.
// tokenizer_config.json, added_tokens.json, generation_config.json and config.json beside it are
// read for special tokens. Throws IoError, ParseError or UnsupportedError.
[[nodiscard]] Tokenizer load_tokenizer(const std::filesystem::path& directory_or_file);

// The same from memory; `where` is put before file names in messages.
[[nodiscard]] Tokenizer make_tokenizer(const TokenizerFiles& files, const std::string& where);

}  // namespace quern
