// SPDX-License-Identifier: Apache-2.0
#include "tokenizer/regex.h"

#include "base/error.h"

#include <fmt/format.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <utility>

namespace quern {
namespace {

constexpr std::size_t kMaxPattern = 16384;
constexpr std::uint32_t kMatchSteps = 10'000'000;
constexpr std::uint32_t kStepsPerByte = 4;
constexpr std::uint32_t kHeapKibibytes = 256U * 1024U;
constexpr std::uint32_t kParenthesesDepth = 64;

// The White_Space property as ranges of a PCRE2 class.
constexpr std::string_view kWhiteSpace =
    R"(\x09-\x0d\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

// What Unicode 15 to 16 added to these categories. Debian's PCRE2 10.42 knows Unicode 14, the
// Oniguruma of today's `tokenizers` library 16; to a newer PCRE2 the ranges say nothing new.
constexpr std::string_view kNewLetters =
    R"(\x{1c89}-\x{1c8a}\x{a7cb}-\x{a7cd}\x{a7da}-\x{a7dc}\x{105c0}-\x{105f3})"
    R"(\x{10d4a}-\x{10d65}\x{10d6f}-\x{10d85}\x{10ec2}-\x{10ec4}\x{1123f}-\x{11240})"
    R"(\x{11380}-\x{11389}\x{1138b}\x{1138e}\x{11390}-\x{113b5}\x{113b7}\x{113d1}\x{113d3})"
    R"(\x{11bc0}-\x{11be0}\x{11f02}\x{11f04}-\x{11f10}\x{11f12}-\x{11f33}\x{1342f})"
    R"(\x{13441}-\x{13446}\x{13460}-\x{143fa}\x{16100}-\x{1611d}\x{16d40}-\x{16d6c})"
    R"(\x{18cff}\x{1b132}\x{1b155}\x{1df25}-\x{1df2a}\x{1e030}-\x{1e06d}\x{1e4d0}-\x{1e4eb})"
    R"(\x{1e5d0}-\x{1e5ed}\x{1e5f0}\x{2b739}\x{2ebf0}-\x{2ee5d}\x{31350}-\x{323af})";
constexpr std::string_view kNewMarks =
    R"(\x{897}\x{cf3}\x{ece}\x{10d69}-\x{10d6d}\x{10efc}-\x{10eff}\x{11241})"
    R"(\x{113b8}-\x{113c0}\x{113c2}\x{113c5}\x{113c7}-\x{113ca}\x{113cc}-\x{113d0}\x{113d2})"
    R"(\x{113e1}-\x{113e2}\x{11f00}-\x{11f01}\x{11f03}\x{11f34}-\x{11f3a})"
    R"(\x{11f3e}-\x{11f42}\x{11f5a}\x{13440}\x{13447}-\x{13455}\x{1611e}-\x{1612f}\x{1e08f})"
    R"(\x{1e4ec}-\x{1e4ef}\x{1e5ee}-\x{1e5ef})";
constexpr std::string_view kNewNumbers =
    R"(\x{10d40}-\x{10d49}\x{116d0}-\x{116e3}\x{11bf0}-\x{11bf9}\x{11f50}-\x{11f59})"
    R"(\x{16130}-\x{16139}\x{16d70}-\x{16d79}\x{1ccf0}-\x{1ccf9}\x{1d2c0}-\x{1d2d3})"
    R"(\x{1e4f0}-\x{1e4f9}\x{1e5f1}-\x{1e5fa})";

// The category that `text` begins with, \p{X} in either case, and what it grew by.
std::string_view new_members(std::string_view text) noexcept {
  const std::string_view name = text.substr(1, 4);
  return name == "p{L}" || name == "P{L}"   ? kNewLetters
         : name == "p{M}" || name == "P{M}" ? kNewMarks
         : name == "p{N}" || name == "P{N}" ? kNewNumbers
                                            : std::string_view();
}

std::string error_text(int code) {
  std::array<PCRE2_UCHAR8, 256> buffer{};
  pcre2_get_error_message_8(code, buffer.data(), buffer.size());
  std::string text;
  for (const PCRE2_UCHAR8 unit : buffer) {
    if (unit == 0) {
      break;
    }
    text.push_back(static_cast<char>(unit));
  }
  return text;
}

[[noreturn]] void refuse(std::string_view what, const std::string& where) {
  throw UnsupportedError(
      "a pre-tokenizer pattern uses a construct that quern does not translate",
      where,
      fmt::format("found {}", what),
      "use a tokenizer with a Qwen, Llama 3 or GPT-2 split pattern");
}

class Translator {
 public:
  Translator(std::string_view pattern, const std::string& where)
      : pattern_(pattern), where_(where) {}

  std::string run() {
    while (at_ < pattern_.size()) {
      const char c = pattern_[at_];
      if (c == '\\') {
        escape();
      } else if (in_class_) {
        class_character(c);
      } else {
        plain_character(c);
      }
    }
    return std::move(out_);
  }

 private:
  void take(std::size_t count) {
    out_ += pattern_.substr(at_, count);
    at_ += count;
  }
  [[nodiscard]] bool next_is(std::string_view text) const {
    return pattern_.substr(at_, text.size()) == text;
  }

  void escape() {
    if (at_ + 1 == pattern_.size()) {
      take(1);  // PCRE2 says what is wrong with it
      return;
    }
    const char name = pattern_[at_ + 1];
    if (const std::string_view added = new_members(pattern_.substr(at_)); !added.empty()) {
      category(name == 'P', added);
      return;
    }
    constexpr std::string_view kRefused = "wWbBhHRXCKQEgGkNvV";
    if (name == 's') {
      out_ += in_class_ ? std::string(kWhiteSpace) : fmt::format("[{}]", kWhiteSpace);
    } else if (name == 'S' && !in_class_) {
      out_ += fmt::format("[^{}]", kWhiteSpace);
    } else if (name == 'S' || kRefused.find(name) != std::string_view::npos) {
      refuse(fmt::format("\\{}{}", name, in_class_ ? " in a class" : ""), where_);
    } else {
      take(2);
      return;
    }
    at_ += 2;
  }

  void category(bool negated, std::string_view added) {
    const std::string_view text = pattern_.substr(at_, 5);
    if (in_class_ && negated) {
      refuse(fmt::format("{} in a class", text), where_);
    }
    const std::string positive = fmt::format("\\p{}{}", text.substr(2), added);
    out_ += in_class_ ? positive : fmt::format("[{}{}]", negated ? "^" : "", positive);
    at_ += text.size();
  }

  void class_character(char c) {
    if (c == '[' || next_is("&&")) {
      refuse(c == '[' ? "a class inside of a class" : "an intersection of classes", where_);
    }
    in_class_ = c != ']';
    take(1);
  }

  void plain_character(char c) {
    if (next_is("(*") || next_is("(?C")) {
      refuse(next_is("(*") ? "a verb (*...)" : "a callout (?C...)", where_);
    }
    if (c == '[') {
      in_class_ = true;
      take(next_is("[^") ? 2 : 1);
      // A bracket that comes first is a member in PCRE2 and in Oniguruma.
      if (next_is("]")) {
        out_ += "\\]";
        ++at_;
      }
      return;
    }
    take(1);
  }

  std::string_view pattern_;
  const std::string& where_;
  std::size_t at_ = 0;
  bool in_class_ = false;
  std::string out_;
};

}  // namespace

struct Regex::Code {
  pcre2_code_8* compiled = nullptr;
  std::string where;

  Code() = default;
  Code(const Code&) = delete;
  Code& operator=(const Code&) = delete;
  ~Code() { pcre2_code_free_8(compiled); }
};

Regex::Regex(std::string_view pattern, const std::string& where) {
  if (pattern.size() > kMaxPattern) {
    throw ParseError(
        "a pre-tokenizer pattern is too long",
        where,
        fmt::format("expected at most {} bytes, found {}", kMaxPattern, pattern.size()),
        "get the file again");
  }
  const std::string translated = Translator(pattern, where).run();
  const std::unique_ptr<pcre2_compile_context_8, decltype(&pcre2_compile_context_free_8)> context(
      pcre2_compile_context_create_8(nullptr), &pcre2_compile_context_free_8);
  if (context) {
    pcre2_set_parens_nest_limit_8(context.get(), kParenthesesDepth);
  }
  auto code = std::make_shared<Code>();
  code->where = where;
  int error = 0;
  PCRE2_SIZE offset = 0;
  code->compiled = pcre2_compile_8(
      // PCRE2's code unit is unsigned char; the bytes are the same.
      reinterpret_cast<PCRE2_SPTR8>(translated.data()),
      translated.size(),
      PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C,
      &error,
      &offset,
      context.get());
  if (code->compiled == nullptr) {
    throw ParseError(
        "a pre-tokenizer pattern does not compile",
        where,
        fmt::format("{} at byte {} of {}", error_text(error), offset, translated),
        "get the file again");
  }
  // Where the JIT is not to be had the interpreter gives the same matches, slower.
  pcre2_jit_compile_8(code->compiled, PCRE2_JIT_COMPLETE);
  code_ = std::move(code);
}

struct RegexMatcher::State {
  const Regex::Code* code = nullptr;
  pcre2_match_data_8* data = nullptr;
  pcre2_match_context_8* context = nullptr;

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    pcre2_match_data_free_8(data);
    pcre2_match_context_free_8(context);
  }
};

RegexMatcher::RegexMatcher(const Regex& regex) : state_(std::make_unique<State>()) {
  state_->code = &regex.code();
  state_->data = pcre2_match_data_create_8(1, nullptr);
  state_->context = pcre2_match_context_create_8(nullptr);
  if (state_->data == nullptr || state_->context == nullptr) {
    throw ResourceError(
        "no memory to split text", regex.code().where, "allocation failed", "free memory");
  }
  pcre2_set_heap_limit_8(state_->context, kHeapKibibytes);
}

RegexMatcher::RegexMatcher(RegexMatcher&&) noexcept = default;
RegexMatcher& RegexMatcher::operator=(RegexMatcher&&) noexcept = default;
RegexMatcher::~RegexMatcher() = default;

bool RegexMatcher::find(
    std::string_view text, std::size_t from, std::size_t& begin, std::size_t& end) {
  const std::size_t for_bytes = std::min<std::size_t>(text.size(), 500'000'000U) * kStepsPerByte;
  pcre2_set_match_limit_8(state_->context, kMatchSteps + static_cast<std::uint32_t>(for_bytes));
  const auto match = [&](std::uint32_t options) {
    return pcre2_match_8(
        state_->code->compiled,
        reinterpret_cast<PCRE2_SPTR8>(text.data()),
        text.size(),
        from,
        options | PCRE2_NO_UTF_CHECK,
        state_->data,
        state_->context);
  };
  int found = match(0);
  if (found == PCRE2_ERROR_JIT_STACKLIMIT) {
    // The interpreter keeps its backtracking points on the heap, within the limit set above.
    found = match(PCRE2_NO_JIT);
  }
  if (found == PCRE2_ERROR_NOMATCH) {
    return false;
  }
  if (found < 0) {
    throw ParseError(
        "a pre-tokenizer pattern could not be matched",
        state_->code->where,
        error_text(found),
        "the pattern backtracks without end; use another tokenizer");
  }
  const PCRE2_SIZE* span = pcre2_get_ovector_pointer_8(state_->data);
  begin = span[0];
  end = span[1];
  return true;
}

}  // namespace quern
