// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tokenizer/added_tokens.h"
#include "tokenizer/vocabulary.h"

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// How a token's text in the vocabulary becomes bytes: the steps of tokenizer.json's `decoder` that
// look at one token at a time, then what is done to the joined text.
struct DecoderSteps {
  enum class Kind { kByteLevel, kByteFallback, kReplace };
  struct Step {
    Kind kind;
    std::string from;
    std::string to;
  };
  std::vector<Step> each_token;
  // `Strip` of the joined text: at most `strip_count` of this character at its very beginning.
  std::string strip;
  std::size_t strip_count = 0;
};

// The bytes of every token, worked out once.
class TokenBytes {
 public:
  TokenBytes() = default;
  TokenBytes(
      const DecoderSteps& steps, const Vocabulary& vocabulary, std::span<const AddedToken> added);

  // Empty for an id without a token. An added token stands for its content.
  [[nodiscard]] std::string_view of(std::int64_t id) const noexcept;
  [[nodiscard]] std::int32_t size() const noexcept {
    return static_cast<std::int32_t>(ends_.size());
  }
  // Takes the stripped characters off `text`, the beginning of a decoded sequence. `left` is how
  // many may still be taken; it becomes 0 at the first other character.
  void strip_front(std::string& text, std::size_t& left) const;
  [[nodiscard]] std::size_t strip_count() const noexcept { return strip_count_; }

 private:
  std::string bytes_;
  std::vector<std::uint64_t> ends_;  // of each id's bytes; they begin where the last id's end
  std::string strip_;
  std::size_t strip_count_ = 0;
};

}  // namespace quern
