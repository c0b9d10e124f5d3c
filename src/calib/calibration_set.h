// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "tokenizer/tokenizer.h"

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// The token sequences that calibration runs through the model, and where they came from.
struct CalibrationSet {
  std::vector<std::vector<std::int32_t>> sequences;
  std::vector<std::string> sources;  // file names without directories, or "default mix"
  std::string sha256;  // of lengths and ids, little-endian

  [[nodiscard]] std::int64_t tokens() const;
};

// One source of text: its documents, and its share of the sequences.
struct CalibrationText {
  std::string name;
  double weight = 1;
  std::vector<std::string> documents;
};

// The text that is bundled in the program (data/calibration/README.md: contents and licences).
[[nodiscard]] std::string_view default_calibration_jsonl();

// Documents of JSON lines: {"text": …}, {"messages": [{role, content}…]} or {"instruction",
// "input"?, "output"}; dialogues are put in the ChatML form of Qwen. Throws ParseError naming the
// line.
[[nodiscard]] std::vector<std::string> parse_calibration_jsonl(
    std::string_view text, const std::string& where);

// A .txt, .jsonl, or either with .gz or .zst, as documents. A .txt file is one document.
[[nodiscard]] CalibrationText read_calibration_text(
    const std::filesystem::path& path, double weight);

// Tokenizes each source (documents joined by the end-of-text token where there is one), cuts it in
// windows of `length` tokens and draws without replacement, by weight and seed, `samples` windows
// in all; fewer when the text does not hold so many. Throws UsageError when it holds none.
[[nodiscard]] CalibrationSet make_calibration_set(
    const std::vector<CalibrationText>& texts,
    const Tokenizer& tokenizer,
    std::int64_t samples,
    std::int64_t length,
    std::uint64_t seed);

// Fills in the hash.
[[nodiscard]] CalibrationSet calibration_set_of(
    std::vector<std::vector<std::int32_t>> sequences, std::vector<std::string> sources);

// Whether sequence `index` of `count` is held out of H, to check on: every tenth.
[[nodiscard]] bool is_holdout(std::int64_t index, std::int64_t count);

}  // namespace quern
