// SPDX-License-Identifier: Apache-2.0
#include "tokenizer/added_tokens.h"

#include "tokenizer/unicode.h"
#include "tokenizer/utf8.h"

#include <algorithm>

namespace quern {
namespace {

// The character that ends at `end`, which lies on a character boundary of valid UTF-8.
CodePoint code_point_before(std::string_view text, std::size_t end) noexcept {
  std::size_t at = end - 1;
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xc0U) == 0x80U) {
    --at;
  }
  return code_point_at(text, at);
}

bool touches_word(std::string_view text, std::size_t begin, std::size_t end) noexcept {
  return (begin > 0 && is_word_character(code_point_before(text, begin).value)) ||
         (end < text.size() && is_word_character(code_point_at(text, end).value));
}

std::size_t white_space_before(std::string_view text, std::size_t at, std::size_t least) noexcept {
  while (at > least) {
    const CodePoint point = code_point_before(text, at);
    if (!is_white_space(point.value)) {
      break;
    }
    at -= point.length;
  }
  return at;
}

std::size_t white_space_after(std::string_view text, std::size_t at) noexcept {
  while (at < text.size()) {
    const CodePoint point = code_point_at(text, at);
    if (!is_white_space(point.value)) {
      break;
    }
    at += point.length;
  }
  return at;
}

}  // namespace

void AddedTokenMatcher::add(std::string_view content, const AddedToken& token) {
  std::uint32_t node = 0;
  for (const char c : content) {
    const auto byte = static_cast<unsigned char>(c);
    std::uint32_t next = child(node, byte);
    if (next == 0) {
      next = static_cast<std::uint32_t>(nodes_.size());
      nodes_[node].children.emplace_back(byte, next);
      nodes_.emplace_back();
    }
    node = next;
  }
  if (node == 0) {
    return;
  }
  starts_[static_cast<unsigned char>(content[0])] = true;
  nodes_[node].entry = static_cast<std::int32_t>(entries_.size());
  entries_.push_back(
      {token.id, token.special, token.left_strip, token.right_strip, token.single_word});
}

std::uint32_t AddedTokenMatcher::child(std::uint32_t node, unsigned char byte) const noexcept {
  for (const auto& [label, next] : nodes_[node].children) {
    if (label == byte) {
      return next;
    }
  }
  return 0;
}

std::int32_t AddedTokenMatcher::longest(
    std::string_view text, std::size_t at, std::size_t& length) const noexcept {
  std::int32_t entry = -1;
  std::uint32_t node = 0;
  for (std::size_t i = at; i < text.size(); ++i) {
    node = child(node, static_cast<unsigned char>(text[i]));
    if (node == 0) {
      break;
    }
    if (nodes_[node].entry >= 0) {
      entry = nodes_[node].entry;
      length = i + 1 - at;
    }
  }
  return entry;
}

void AddedTokenMatcher::split(std::string_view text, bool parse_special, const Sink& sink) const {
  std::size_t done = 0;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t length = 0;
    const std::int32_t found =
        starts_[static_cast<unsigned char>(text[at])] ? longest(text, at, length) : -1;
    if (found < 0) {
      ++at;
      continue;
    }
    const Entry& entry = entries_[static_cast<std::size_t>(found)];
    const std::size_t end = at + length;
    // A match that does not count is passed over whole, as the `tokenizers` library does it.
    if ((entry.special && !parse_special) || (entry.single_word && touches_word(text, at, end))) {
      at = end;
      continue;
    }
    const std::size_t begin = entry.left_strip ? white_space_before(text, at, done) : at;
    if (done < begin) {
      sink(text.substr(done, begin - done), -1);
    }
    sink({}, entry.id);
    done = entry.right_strip ? white_space_after(text, end) : end;
    at = done;
  }
  if (done < text.size()) {
    sink(text.substr(done), -1);
  }
}

}  // namespace quern
