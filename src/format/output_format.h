// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "format/safetensors_writer.h"
#include "quant/quantized_matrix.h"
#include "quant/scheme.h"

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// A linear of the model that is written; no scheme when it keeps 16 bits.
struct OutputModule {
  std::string name;
  std::optional<QuantScheme> scheme;
};

// A form in which quantized checkpoints are written: one line of the list in output_format.cpp.
struct OutputFormat {
  std::string_view name;
  std::string_view summary;
  // What it does to scales and zero points; `source` is the dtype of the model.
  StorageRules (*storage)(DType source);
  // Throws UnsupportedError, with what would work, when the format cannot hold such a linear.
  void (*check)(
      const QuantScheme& scheme, std::int64_t out, std::int64_t in, const std::string& module);
  // The tensors that replace MODULE.weight, and their bytes in the same order.
  std::vector<TensorDeclaration> (*declare)(
      const std::string& module, const QuantScheme& scheme, std::int64_t out, std::int64_t in);
  std::vector<std::vector<std::byte>> (*pack)(
      const QuantizedMatrix& matrix, const std::string& module);
  // `quantization_config` of config.json, also written as quantize_config.json.
  Json (*config)(
      const QuantScheme& scheme, std::span<const OutputModule> modules, const Json& meta);
};

[[nodiscard]] std::span<const OutputFormat> output_formats() noexcept;
// Throws UsageError with the known names.
[[nodiscard]] const OutputFormat& find_output_format(const std::string& name);

}  // namespace quern
