// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

namespace quern {

// The GPT-2 byte alphabet: a bijection of the 256 bytes to printable code points, in which
// byte-level vocabularies write their tokens. Printable Latin-1 stands for itself, the other 68
// bytes for U+0100 to U+0143 in order (space is U+0120).
[[nodiscard]] std::string to_byte_alphabet(std::string_view bytes);

// The inverse. False when `text` has a character outside of the alphabet; `out` is then unchanged.
[[nodiscard]] bool from_byte_alphabet(std::string_view text, std::string& out);

}  // namespace quern
