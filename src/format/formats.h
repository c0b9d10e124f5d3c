// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "tensor/checkpoint.h"

#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

namespace quern {

// What every format is recognised and opened from.
struct CheckpointSource {
  std::filesystem::path directory;
  std::filesystem::path weights;  // the directory again, or the one file that was named
  Json config;  // config.json
  // The configuration of the quantization: `quantization_config` of config.json, else
  // quantize_config.json; null for dense checkpoints. `second` is the latter when both are there.
  Json quantization;
  std::string quantization_where;
  Json second;
  std::string second_where;
  std::string method;  // quant_method in lower case; empty for dense checkpoints
};

// A format of checkpoints: one line of the list in formats.cpp.
struct CheckpointFormat {
  std::string_view name;
  bool (*probe)(const CheckpointSource& source);  // looks at the configuration only
  std::unique_ptr<Checkpoint> (*open)(CheckpointSource source);
};

// In the order in which they are asked.
[[nodiscard]] std::span<const CheckpointFormat> checkpoint_formats() noexcept;

// dense_checkpoint.cpp: F16, BF16 and F32 weights as released.
[[nodiscard]] bool is_dense(const CheckpointSource& source);
[[nodiscard]] std::unique_ptr<Checkpoint> open_dense(CheckpointSource source);

// gptq_checkpoint.cpp: gptq, gptq_v2, gptq_p.
[[nodiscard]] bool is_gptq(const CheckpointSource& source);
[[nodiscard]] std::unique_ptr<Checkpoint> open_gptq(CheckpointSource source);

// awq_checkpoint.cpp: the gemm version.
[[nodiscard]] bool is_awq(const CheckpointSource& source);
[[nodiscard]] std::unique_ptr<Checkpoint> open_awq(CheckpointSource source);

// compressed_tensors_checkpoint.cpp: the integer forms.
[[nodiscard]] bool is_compressed_tensors(const CheckpointSource& source);
[[nodiscard]] std::unique_ptr<Checkpoint> open_compressed_tensors(CheckpointSource source);

// fp8_checkpoint.cpp: Qwen's releases with 8-bit floats, scaled by block.
[[nodiscard]] bool is_fp8(const CheckpointSource& source);
[[nodiscard]] std::unique_ptr<Checkpoint> open_fp8(CheckpointSource source);

// quern_checkpoint.cpp: quern's own container.
[[nodiscard]] bool is_quern(const CheckpointSource& source);
[[nodiscard]] std::unique_ptr<Checkpoint> open_quern(CheckpointSource source);

// gguf_checkpoint.cpp: a .gguf file (or its parts), which has everything in it.
[[nodiscard]] std::unique_ptr<Checkpoint> open_gguf(const std::filesystem::path& path);

// The weight of a linear that is stored as it was trained: MODULE.weight [out, in] in F16, BF16 or
// F32. Throws ParseError when it is missing or has other sizes, UnsupportedError for other types.
[[nodiscard]] StoredLinear load_dense_linear(
    const TensorStore& tensors,
    const std::string& module,
    std::int64_t out_features,
    std::int64_t in_features);

}  // namespace quern
