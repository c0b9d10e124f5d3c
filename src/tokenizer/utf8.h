// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace quern {

// One step through text: the code point at `at` and its length in bytes. Bytes that are not UTF-8
// give `valid` false; `length` is then the maximal subpart that the Unicode standard (table 3-8)
// and Rust's from_utf8_lossy replace by one U+FFFD. `cut` says that the text ended inside of a
// sequence that more bytes could complete.
struct CodePoint {
  char32_t value = 0;
  std::size_t length = 0;
  bool valid = false;
  bool cut = false;
};

[[nodiscard]] CodePoint code_point_at(std::string_view text, std::size_t at) noexcept;

[[nodiscard]] bool is_utf8(std::string_view text) noexcept;

// Replaces every maximal invalid subpart by U+FFFD; text that is UTF-8 comes back unchanged.
[[nodiscard]] std::string to_utf8_lossy(std::string_view text);

void append_utf8(std::string& out, char32_t code_point);

inline constexpr std::string_view kReplacementCharacter = "\xef\xbf\xbd";

}  // namespace quern
