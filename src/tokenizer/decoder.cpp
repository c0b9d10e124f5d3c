// SPDX-License-Identifier: Apache-2.0
#include "tokenizer/decoder.h"

#include "tokenizer/byte_alphabet.h"
#include "tokenizer/normalizer.h"

#include <algorithm>

namespace quern {
namespace {

int hex_digit(char c) noexcept {
  return c >= '0' && c <= '9'   ? c - '0'
         : c >= 'A' && c <= 'F' ? c - 'A' + 10
         : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                : -1;
}

// <0x0A> is the byte 10; anything else is no byte token.
int fallback_byte(std::string_view text) noexcept {
  if (text.size() != 6 || text.substr(0, 3) != "<0x" || text[5] != '>' || hex_digit(text[3]) < 0 ||
      hex_digit(text[4]) < 0) {
    return -1;
  }
  return hex_digit(text[3]) * 16 + hex_digit(text[4]);
}

std::string decode_token(const DecoderSteps& steps, std::string_view text) {
  std::string out(text);
  for (const DecoderSteps::Step& step : steps.each_token) {
    switch (step.kind) {
      case DecoderSteps::Kind::kByteLevel:
        // A token outside of the alphabet, as an added one may be, is taken as it is.
        (void)from_byte_alphabet(std::string(out), out);
        break;
      case DecoderSteps::Kind::kReplace: out = replace_all(out, step.from, step.to); break;
      case DecoderSteps::Kind::kByteFallback:
        if (const int byte = fallback_byte(out); byte >= 0) {
          // A byte is no text, and nothing that follows may take it for text.
          return {static_cast<char>(byte)};
        }
        break;
    }
  }
  return out;
}

}  // namespace

TokenBytes::TokenBytes(
    const DecoderSteps& steps, const Vocabulary& vocabulary, std::span<const AddedToken> added)
    : strip_(steps.strip), strip_count_(steps.strip_count) {
  std::vector<const AddedToken*> by_id;
  for (const AddedToken& token : added) {
    by_id.push_back(&token);
  }
  std::sort(by_id.begin(), by_id.end(), [](const AddedToken* a, const AddedToken* b) {
    return a->id < b->id;
  });
  const std::int32_t size = std::max(vocabulary.size(), by_id.empty() ? 0 : by_id.back()->id + 1);
  auto next_added = by_id.begin();
  for (std::int32_t id = 0; id < size; ++id) {
    if (next_added != by_id.end() && (*next_added)->id == id) {
      bytes_ += (*next_added)->content;
      ++next_added;
    } else {
      bytes_ += decode_token(steps, vocabulary.text(id));
    }
    ends_.push_back(bytes_.size());
  }
}

std::string_view TokenBytes::of(std::int64_t id) const noexcept {
  if (id < 0 || static_cast<std::size_t>(id) >= ends_.size()) {
    return {};
  }
  const auto at = static_cast<std::size_t>(id);
  const std::uint64_t begin = at == 0 ? 0 : ends_[at - 1];
  return std::string_view(bytes_).substr(begin, ends_[at] - begin);
}

void TokenBytes::strip_front(std::string& text, std::size_t& left) const {
  std::size_t at = 0;
  while (left > 0 && at < text.size()) {
    if (text.compare(at, strip_.size(), strip_) != 0) {
      left = 0;
      break;
    }
    at += strip_.size();
    --left;
  }
  text.erase(0, at);
}

}  // namespace quern
