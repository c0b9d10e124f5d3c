// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tokenizer/regex.h"

#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// The split patterns of the published byte-level tokenizers. All leave the last of several spaces
// to the word that follows; they differ in how digits and combining marks stand.
inline constexpr const char* kGpt2Split =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
// Qwen 1, 2, 2.5, 3, Qwen3-Next: digits one by one.
inline constexpr const char* kQwen2Split =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
// Qwen3.5 and later: combining marks belong to words.
inline constexpr const char* kQwen35Split =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
// Llama 3: digits in threes.
inline constexpr const char* kLlama3Split =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

// Cuts text into the pieces that the model encodes one by one: the steps of tokenizer.json's
// `pre_tokenizer`, nested sequences laid flat.
class PreTokenizer {
 public:
  // Matches of `regex` and the text between them become pieces ("Isolated").
  void add_split(Regex regex) { steps_.push_back({std::move(regex), false}); }
  // Puts a space before each piece that has none.
  void add_prefix_space() { steps_.push_back({std::nullopt, true}); }
  [[nodiscard]] std::size_t steps() const noexcept { return steps_.size(); }

  // The working state of one thread: matchers, and pieces that are not part of the text.
  class Run {
   public:
    explicit Run(const PreTokenizer& owner);
    using Sink = std::function<void(std::string_view)>;
    // Calls `sink` with the pieces in order. They live as long as `text` and this object.
    void split(std::string_view text, const Sink& sink);

   private:
    void step(std::size_t index, std::string_view piece, const Sink& sink);
    void cut(std::size_t index, std::string_view piece, const Sink& sink);

    const PreTokenizer* owner_;
    std::vector<std::optional<RegexMatcher>> matchers_;
    std::deque<std::string> prefixed_;
  };

 private:
  struct Step {
    std::optional<Regex> regex;
    bool prefix_space;
  };
  std::vector<Step> steps_;
};

}  // namespace quern
