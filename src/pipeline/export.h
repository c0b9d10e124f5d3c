// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "base/json.h"

#include <cstdint>
#include <filesystem>
#include <string>

namespace quern {

inline constexpr const char* kExportSchema = "quern.export/1";

struct ExportOptions {
  std::filesystem::path model;
  std::filesystem::path output;
  std::string format;  // a name of output_formats(), or "dense"
  std::string dtype;  // of dense weights: float32, float16, bfloat16; empty: that of the model
  bool force = false;  // moves what stands at `output` aside
  std::uint64_t shard_bytes = 5'000'000'000;
  std::string command;  // as the person typed it, for the manifest
};

// Writes a quantized checkpoint in another format, without rounding anything again: codes, scales
// and zero points stay what they are, so that both stand for the same floats; "dense" holds those
// floats, rounded to the dtype. Returns the manifest (schema quern.export/1). The output appears by
// one rename when everything in it was read back and compared.
//
// Throws UnsupportedError, naming the formats that would do, when the format cannot hold a module
// exactly. What is asked to be written in its own format although quern only reads that variant
// (act-order groups, GPTQ v1 with a zero point of 0, gptq_p) goes to the nearest format that holds
// it; the manifest says which. Throws UsageError for a model without quantized linears.
[[nodiscard]] Json export_checkpoint(const Context& ctx, const ExportOptions& options);

}  // namespace quern
