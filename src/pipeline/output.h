// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "pipeline/quantize.h"
#include "pipeline/run_state.h"

#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// What a format is told of a planned linear; `source` is the dtype of the model.
[[nodiscard]] OutputModule output_module(
    const PlannedLinear& linear, const OutputFormat& format, const ModelGraph& graph);

// The weight tensors of the output: those of the source, MODULE.weight of each quantized linear
// replaced by the tensors of the format.
[[nodiscard]] std::vector<TensorDeclaration> declare_output(const PreparedRun& run);

// The modules of matrices in floats beside the decoder: of a vision tower, of draft layers.
[[nodiscard]] std::vector<std::string> modules_beside(
    const ModelGraph& graph, const TensorStore& store);
// Those and the convolutions of DeltaNet: what configurations must except.
[[nodiscard]] std::vector<OutputModule> modules_in_floats(
    const ModelGraph& graph, const TensorStore& store);

// `quantization_config` of the output; throws UnsupportedError for a plan that the format cannot
// say.
[[nodiscard]] Json output_config(const PreparedRun& run, const Json& meta);

// Whether a table that is tied to both ends is written twice, because the format cannot tie it.
[[nodiscard]] bool unties_table(const PreparedRun& run);
// What people are told of it.
[[nodiscard]] std::string untied_text(const std::string& table, std::string_view format);
// Whether the source tensor `name` goes: the head's copy of a table (PreparedRun::head_is_copy)
// that is quantized and stands for both.
[[nodiscard]] bool is_dropped(const PreparedRun& run, const std::string& name);
// `config` of a model whose embedding and head are two tables.
[[nodiscard]] Json untied_config(Json config);

// A source tensor that the output does not hold under its name.
struct CensusEntry {
  std::string name;
  std::string reason;
};
struct Census {
  std::int64_t in = 0;  // tensors of the source's files
  std::int64_t out = 0;  // tensors of the output's files
  std::map<std::string, std::int64_t> divided;  // of the source, fused: written in so many parts
  std::map<std::string, std::int64_t> merged;  // of the output, stacked from so many
  std::vector<CensusEntry> skipped;  // of the source, neither copied nor quantized
};

// Tensors in the files of a store.
[[nodiscard]] std::int64_t tensors_in_files(const TensorStore& store);

// Any of all_parts(), as it was rounded.
using PartSource = std::function<QuantizedBlock(const std::string& part)>;

// Whether two matrices stand for the same floats, bit by bit but for the sign of zero.
[[nodiscard]] bool same_values(
    const Context& ctx, const QuantizedMatrix& a, const QuantizedMatrix& b);

// config.json with `quantization` (null: a model in floats) in place of what the source says of
// itself, and the format's own file.
void write_configs(
    const Json& source,
    const Json& quantization,
    std::string_view config_file,
    const std::filesystem::path& directory);

// Writes weights and configuration into `directory`.
void write_output(
    const PreparedRun& run,
    const PartSource& parts,
    const Json& meta,
    const std::filesystem::path& directory);

// Reads `result` (a directory, or a .gguf file) back with the reader that evaluation uses and
// compares: every quantized linear with what was rounded, every other tensor with the source, byte
// by byte. Throws Error(kFailed).
[[nodiscard]] Census verify_output(
    const Context& ctx,
    const PreparedRun& run,
    const PartSource& parts,
    const std::filesystem::path& result);

}  // namespace quern
