// SPDX-License-Identifier: Apache-2.0
#include "tokenizer/jsonl.h"

#include "base/json.h"

#include <fmt/format.h>

#include <algorithm>

namespace quern {

void encode_jsonl(
    const Tokenizer& tokenizer,
    std::string_view input,
    const std::string& where,
    const EncodeOptions& options,
    const std::function<void(std::string_view)>& write) {
  std::size_t number = 0;
  while (!input.empty()) {
    const std::size_t end = std::min(input.find('\n'), input.size());
    const std::string_view line = input.substr(0, end);
    input.remove_prefix(std::min(end + 1, input.size()));
    const std::string place = fmt::format("{}: line {}", where, ++number);
    if (line.find_first_not_of(" \t\r") == std::string_view::npos) {
      continue;
    }
    const Json json = parse_json(line, place);
    const std::string text = JsonReader(json, place).get_string("text");
    write(fmt::format("{{\"ids\": [{}]}}\n", fmt::join(tokenizer.encode(text, options), ", ")));
  }
}

}  // namespace quern
