// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "pipeline/quantize.h"
#include "pipeline/run_state.h"

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace quern {

// The weight tensors of the output: those of the source, MODULE.weight of each quantized linear
// replaced by the tensors of the format.
[[nodiscard]] std::vector<TensorDeclaration> declare_output(
    const Checkpoint& source, const QuantPlan& plan, const OutputFormat& format);

// `quantization_config` of the output; throws UnsupportedError for a plan that the format cannot
// say.
[[nodiscard]] Json output_config(const PreparedRun& run, const Json& meta);

// A source tensor that the output does not hold under its name.
struct CensusEntry {
  std::string name;
  std::string reason;
};
struct Census {
  std::int64_t in = 0;  // tensors of the source
  std::int64_t out = 0;  // tensors of the output
  std::vector<CensusEntry> skipped;  // of the source, neither copied nor quantized: always empty
};

// Any of all_parts(), as it was rounded.
using PartSource = std::function<QuantizedBlock(const std::string& part)>;

// Writes weights, config.json and quantize_config.json into `directory`.
void write_output(
    const PreparedRun& run,
    const PartSource& parts,
    const Json& meta,
    const std::filesystem::path& directory);

// Reads `directory` back with the reader that evaluation uses and compares: every quantized linear
// with what was rounded, every other tensor with the source, byte by byte. Throws Error(kFailed).
[[nodiscard]] Census verify_output(
    const Context& ctx,
    const PreparedRun& run,
    const PartSource& parts,
    const std::filesystem::path& directory);

}  // namespace quern
