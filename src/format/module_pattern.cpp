// SPDX-License-Identifier: Apache-2.0
#include "format/module_pattern.h"

#include "base/error.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <fmt/format.h>
#include <pcre2.h>

#include <array>
#include <cstdint>
#include <new>
#include <string_view>
#include <utility>

namespace quern {
namespace {

constexpr std::size_t kMaxPatternBytes = 16384;
constexpr std::uint32_t kMaxSteps = 200'000;
constexpr std::uint32_t kMaxHeapKibibytes = 4096;

std::string pcre_message(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

struct MatchContextDeleter {
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};
struct MatchDataDeleter {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};
struct CodeDeleter {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};

}  // namespace

struct ModulePattern::Code {
  std::unique_ptr<pcre2_code, CodeDeleter> code;
  std::unique_ptr<pcre2_match_context, MatchContextDeleter> limits;
};

ModulePattern::ModulePattern(std::string text, std::string where)
    : text_(std::move(text)), where_(std::move(where)) {
  constexpr const char* kHint = "mend the pattern in the configuration";
  if (text_.size() > kMaxPatternBytes) {
    throw ParseError(
        "a module pattern is too long",
        where_,
        fmt::format("expected at most {} bytes, found {}", kMaxPatternBytes, text_.size()),
        kHint);
  }
  int error = 0;
  PCRE2_SIZE position = 0;
  auto compiled = std::make_shared<Code>();
  compiled->code.reset(pcre2_compile(
      reinterpret_cast<PCRE2_SPTR>(text_.data()),
      text_.size(),
      PCRE2_ANCHORED | PCRE2_NEVER_BACKSLASH_C,
      &error,
      &position,
      nullptr));
  if (!compiled->code) {
    throw ParseError(
        "a module pattern is not a regular expression",
        where_,
        fmt::format(
            "expected a valid expression, found at byte {}: {}", position, pcre_message(error)),
        kHint);
  }
  compiled->limits.reset(pcre2_match_context_create(nullptr));
  if (!compiled->limits) {
    throw std::bad_alloc();
  }
  pcre2_set_match_limit(compiled->limits.get(), kMaxSteps);
  pcre2_set_depth_limit(compiled->limits.get(), kMaxSteps);
  pcre2_set_heap_limit(compiled->limits.get(), kMaxHeapKibibytes);
  code_ = std::move(compiled);
}

bool ModulePattern::matches(const std::string& module) const {
  const std::unique_ptr<pcre2_match_data, MatchDataDeleter> data(
      pcre2_match_data_create_from_pattern(code_->code.get(), nullptr));
  if (!data) {
    throw std::bad_alloc();
  }
  const int result = pcre2_match(
      code_->code.get(),
      reinterpret_cast<PCRE2_SPTR>(module.data()),
      module.size(),
      0,
      0,
      data.get(),
      code_->limits.get());
  if (result < 0 && result != PCRE2_ERROR_NOMATCH) {
    throw ParseError(
        "a module pattern cannot be matched",
        where_,
        fmt::format(
            "expected an answer within {} steps, found for {}: {}",
            kMaxSteps,
            printable(module),
            pcre_message(result)),
        "write the pattern without nested repetitions");
  }
  return result >= 0;
}

std::string escape_pattern(const std::string& text) {
  constexpr std::string_view kSpecial = R"(\^$.[]|()?*+{}-#)";
  std::string out;
  for (const char c : text) {
    if (kSpecial.find(c) != std::string_view::npos) {
      out += '\\';
    }
    out += c;
  }
  return out;
}

}  // namespace quern
