// SPDX-License-Identifier: Apache-2.0
#include "tokenizer/normalizer.h"

#include "base/error.h"
#include "tokenizer/unicode.h"

#include <fmt/format.h>

namespace quern {
namespace {

// A chain of replacements may double its input at each step; published ones triple it at most.
constexpr std::size_t kMaxGrowth = 64;
constexpr std::size_t kFreeBytes = 65536;

}  // namespace

std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  out.reserve(text.size());
  std::size_t at = 0;
  for (std::size_t hit = text.find(from); hit != std::string_view::npos;
       hit = text.find(from, at)) {
    out += text.substr(at, hit - at);
    out += to;
    at = hit + from.size();
  }
  out += text.substr(at);
  return out;
}

std::string Normalizer::apply_step(const Step& step, std::string_view text) {
  switch (step.kind) {
    case Kind::kNfc: return to_nfc(text);
    case Kind::kPrepend: return text.empty() ? std::string() : step.to + std::string(text);
    case Kind::kReplace: return replace_all(text, step.from, step.to);
  }
  return std::string(text);
}

std::string_view Normalizer::apply(std::string_view text, std::string& storage) const {
  std::string_view current = text;
  for (const Step& step : steps_) {
    std::string next = apply_step(step, current);
    if (next.size() > kFreeBytes && next.size() / kMaxGrowth > text.size()) {
      throw ParseError(
          "the tokenizer's normalizer makes text too long",
          "normalizer",
          fmt::format("{} bytes became more than {}", text.size(), next.size()),
          "use a tokenizer whose replacements are short");
    }
    storage = std::move(next);
    current = storage;
  }
  return current;
}

}  // namespace quern
