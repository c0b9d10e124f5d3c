// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tokenizer/tokenizer.h"

#include <functional>
#include <string>
#include <string_view>

namespace quern {

// {"text": ...} lines in, {"ids": [...]} lines out, in order; blank lines are passed over, other
// keys ignored. `write` gets each line with its line end. Throws ParseError naming `where` and the
// line number.
void encode_jsonl(
    const Tokenizer& tokenizer,
    std::string_view input,
    const std::string& where,
    const EncodeOptions& options,
    const std::function<void(std::string_view)>& write);

}  // namespace quern
