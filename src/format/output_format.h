// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "format/safetensors_writer.h"
#include "quant/quantized_matrix.h"
#include "quant/scheme.h"

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// A linear, or a table of embeddings, of the model that is written.
struct OutputModule {
  std::string name;
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  std::optional<QuantScheme> scheme;  // none: it keeps its floats
  std::string_view kind = "packed";  // of the matrix, as QuantizedMatrix::kind()
  DType scale_dtype = DType::kF16;
  std::int64_t hot_rows = 0;  // of the kind mixed_rows: rows of the first table, at 8 bits
  bool has_group_index = false;  // act-order files of other tools
  ActivationScheme activation;  // a static scale may be unknown until `pack`
  bool is_embedding = false;  // rows are looked up
  bool is_head = false;  // gives the logits; with is_embedding, one table tied to both ends
};

// A form in which quantized checkpoints are written: one line of the list in output_format.cpp.
struct OutputFormat {
  std::string_view name;
  std::string_view summary;
  std::string_view config_file;  // repeats `quantization_config`; empty: config.json alone has it
  // What it does to scales and zero points; `source` is the dtype of the model.
  StorageRules (*storage)(DType source, const OutputModule& module);
  // Throws UnsupportedError, with what would work, when the format cannot hold such a module.
  void (*check)(const OutputModule& module);
  // The tensors that replace MODULE.weight, and their bytes in the same order. Packing throws
  // UnsupportedError for values that the format does not hold exactly.
  std::vector<TensorDeclaration> (*declare)(const OutputModule& module);
  std::vector<std::vector<std::byte>> (*pack)(
      const QuantizedMatrix& matrix, const OutputModule& module);
  // `quantization_config` of config.json. `modules` are all linears of the model, `common` the
  // scheme of most.
  Json (*config)(
      const QuantScheme& common, std::span<const OutputModule> modules, const Json& meta);
  // A quantized table cannot serve both ends: declare and pack give it a second time as
  // kUntiedHead, and config.json must say that nothing is tied.
  bool unties_tables = false;
  // One .gguf file, which pipeline/gguf_output.h makes; declare, pack and config are null.
  bool is_gguf = false;
};

inline constexpr const char* kUntiedHead = "lm_head";

[[nodiscard]] std::span<const OutputFormat> output_formats() noexcept;
// "gptq, gptq_v2, …"
[[nodiscard]] std::string output_format_names();
// `name` may be followed by ":TYPE". Throws UnsupportedError with the known names.
[[nodiscard]] const OutputFormat& find_output_format(const std::string& name);

}  // namespace quern
