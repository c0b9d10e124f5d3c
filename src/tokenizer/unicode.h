// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

namespace quern {

// Canonical composition (NFC) of valid UTF-8. Linear but for a sort of each run of combining marks,
// however long it is. utf8proc's tables; the Unicode version is unicode_version().
[[nodiscard]] std::string to_nfc(std::string_view text);

// The White_Space property, and what a regular expression calls a word character: letters, marks,
// decimal digits, letter numbers and connectors.
[[nodiscard]] bool is_white_space(char32_t code_point) noexcept;
[[nodiscard]] bool is_word_character(char32_t code_point) noexcept;

[[nodiscard]] const char* unicode_version() noexcept;

}  // namespace quern
