// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "base/json.h"
#include "calib/calibration_set.h"
#include "format/side_files.h"
#include "model/graph.h"
#include "pipeline/block_quantizer.h"
#include "pipeline/output.h"
#include "tensor/checkpoint.h"

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace quern {

// What every checkpoint of quern carries: how it was made, and the hashes of its weight files.
inline constexpr const char* kManifestName = "quantization_manifest.json";

// How people call the model: org/name for a snapshot in the hub's cache.
[[nodiscard]] std::string model_name(const std::filesystem::path& directory);

// The values in all tensors of a dense checkpoint.
[[nodiscard]] std::int64_t parameters_of(const Checkpoint& source);
// The parameters of a model whatever it is stored as.
[[nodiscard]] std::int64_t parameters_of(const ModelGraph& graph);
[[nodiscard]] std::uint64_t tensor_bytes(const Checkpoint& checkpoint);
[[nodiscard]] double bits_per_weight(std::uint64_t bytes, std::int64_t parameters);

// The .safetensors and .gguf files of a directory, by name.
[[nodiscard]] std::vector<std::filesystem::path> weight_files(
    const std::filesystem::path& directory);

// Parts of a manifest.
[[nodiscard]] Json program_json(const Context& ctx);
[[nodiscard]] Json source_json(const Checkpoint& source, std::int64_t parameters);
[[nodiscard]] Json files_json(const std::filesystem::path& directory);  // of weight_files()
[[nodiscard]] Json side_files_json(const SideFiles& files);
[[nodiscard]] Json census_json(const Census& census);
[[nodiscard]] Json calibration_json(const CalibrationSet& calibration);
[[nodiscard]] Json planning_json(const PlanRecord& planning);  // null without a budget
[[nodiscard]] Json kept_json(const PreparedRun& run);  // what is not quantized, and why
// How the calibration reached the experts, a row for each mixture; `linears` are the reports of the
// quantized linears. Empty without mixtures.
[[nodiscard]] Json coverage_json(const ModelGraph& graph, const Json& linears);
// Rates in multiply-adds a CPU second, beside the best that one core reaches in a plain product.
[[nodiscard]] Json timing_json(const PartTimes& times, double rate_per_core);

// Bytes of the files in a files_json().
[[nodiscard]] std::uint64_t total_size(const Json& files);

}  // namespace quern
