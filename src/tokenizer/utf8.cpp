// SPDX-License-Identifier: Apache-2.0
#include "tokenizer/utf8.h"

namespace quern {
namespace {

// The allowed range of the second byte after `lead` (Unicode table 3-7): it keeps out overlong
// forms, surrogates and what lies above U+10FFFF.
struct SecondByte {
  unsigned char low = 0x80;
  unsigned char high = 0xbf;
};

SecondByte second_byte_range(unsigned char lead) noexcept {
  switch (lead) {
    case 0xe0: return {0xa0, 0xbf};
    case 0xed: return {0x80, 0x9f};
    case 0xf0: return {0x90, 0xbf};
    case 0xf4: return {0x80, 0x8f};
    default: return {};
  }
}

}  // namespace

CodePoint code_point_at(std::string_view text, std::size_t at) noexcept {
  const auto lead = static_cast<unsigned char>(text[at]);
  if (lead < 0x80) {
    return {lead, 1, true, false};
  }
  if (lead < 0xc2 || lead > 0xf4) {
    return {0, 1, false, false};
  }
  const std::size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
  char32_t value = lead & (0x7fU >> length);
  for (std::size_t i = 1; i < length; ++i) {
    if (at + i == text.size()) {
      return {0, i, false, true};
    }
    const auto byte = static_cast<unsigned char>(text[at + i]);
    const SecondByte range = i == 1 ? second_byte_range(lead) : SecondByte{};
    if (byte < range.low || byte > range.high) {
      return {0, i, false, false};
    }
    value = (value << 6U) | (byte & 0x3fU);
  }
  return {value, length, true, false};
}

bool is_utf8(std::string_view text) noexcept {
  for (std::size_t at = 0; at < text.size();) {
    const CodePoint point = code_point_at(text, at);
    if (!point.valid) {
      return false;
    }
    at += point.length;
  }
  return true;
}

std::string to_utf8_lossy(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const CodePoint point = code_point_at(text, at);
    out += point.valid ? text.substr(at, point.length) : kReplacementCharacter;
    at += point.length;
  }
  return out;
}

void append_utf8(std::string& out, char32_t code_point) {
  const auto put = [&out](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xc0U | (code_point >> 6U));
    put(0x80U | (code_point & 0x3fU));
  } else if (code_point < 0x10000) {
    put(0xe0U | (code_point >> 12U));
    put(0x80U | ((code_point >> 6U) & 0x3fU));
    put(0x80U | (code_point & 0x3fU));
  } else {
    put(0xf0U | (code_point >> 18U));
    put(0x80U | ((code_point >> 12U) & 0x3fU));
    put(0x80U | ((code_point >> 6U) & 0x3fU));
    put(0x80U | (code_point & 0x3fU));
  }
}

}  // namespace quern
