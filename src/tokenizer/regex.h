// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace quern {

// A compiled pre-tokenizer pattern. The published patterns are written for Oniguruma (or Rust's
// fancy-regex); PCRE2 matches them here, in UTF and Unicode-property mode, after a translation of
// what the two engines read differently:
//   \s \S   are the White_Space property (PCRE2 counts U+180E to it);
//   \p{L} \p{M} \p{N} are those of Unicode 16, whatever PCRE2 was built with;
// and a refusal (UnsupportedError) of what cannot be translated safely: \w \W \b \B \h \H \R \X \C
// \K, nested or intersected classes, verbs and callouts.
// Immutable, so one Regex serves many threads, each with matchers of its own.
class Regex {
 public:
  // `where` names file and key for messages.
  Regex(std::string_view pattern, const std::string& where);

  struct Code;
  [[nodiscard]] const Code& code() const noexcept { return *code_; }

 private:
  std::shared_ptr<const Code> code_;
};

// Finds the matches of one text, left to right. `regex` and `text` must outlive it; `text` must be
// valid UTF-8. Steps of one match are limited (10 million and some for each byte), as is memory:
// a pattern that backtracks without end is a ParseError, not a hang.
class RegexMatcher {
 public:
  explicit RegexMatcher(const Regex& regex);
  RegexMatcher(RegexMatcher&&) noexcept;
  RegexMatcher& operator=(RegexMatcher&&) noexcept;
  RegexMatcher(const RegexMatcher&) = delete;
  RegexMatcher& operator=(const RegexMatcher&) = delete;
  ~RegexMatcher();

  // The first match at or after `from`: [begin, end). False when there is none.
  [[nodiscard]] bool find(
      std::string_view text, std::size_t from, std::size_t& begin, std::size_t& end);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace quern
