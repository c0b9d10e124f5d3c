// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "calib/calibration_set.h"
#include "pipeline/quantize.h"

#include <cstdint>

namespace quern {

// The sequences that the options ask for: a .safetensors file with `input_ids` [n, length] as it
// is (the first --samples rows), or text files, or the bundled mix, tokenized by the model's own
// tokenizer. Throws for ids outside the vocabulary.
[[nodiscard]] CalibrationSet load_calibration(
    const CalibrationOptions& options, const PreparedRun& run, std::uint64_t seed);

// How many sequences the options ask for, and how long they are; read from the header of a
// .safetensors file. Throws ParseError when it holds no token ids.
struct CalibrationExtent {
  std::int64_t samples = 0;
  std::int64_t length = 0;
};
[[nodiscard]] CalibrationExtent calibration_extent(const CalibrationOptions& options);

// Rows `input_ids` [n, length] (I32 or I64) of a safetensors file.
[[nodiscard]] std::vector<std::vector<std::int32_t>> read_input_ids(
    const std::filesystem::path& path);

}  // namespace quern
