// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "tensor/tensor.h"

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace quern {

struct ActivationScheme;  // quant/scheme.h
struct QuantizedMatrix;  // quant/quantized_matrix.h

// The weights of one linear as a checkpoint holds them: dense or quantized.
struct StoredLinear {
  std::optional<TensorView> dense;  // [out, in], F16, BF16 or F32; points into the file
  std::shared_ptr<const QuantizedMatrix> quantized;
  std::shared_ptr<const ActivationScheme> activation;  // null: inputs stay floats
};

// A model on disk, whatever its format: configuration, tensors, and linears in the form that they
// are stored in. Everything was checked when it was opened.
class Checkpoint {
 public:
  virtual ~Checkpoint() = default;

  [[nodiscard]] virtual const std::filesystem::path& directory() const = 0;
  [[nodiscard]] virtual const Json& config() const = 0;  // config.json as it stands
  // Where config() was read from, for messages.
  [[nodiscard]] virtual std::string config_place() const {
    return (directory() / "config.json").string();
  }
  // The files of a model that has everything in them, tokenizer and configuration included (GGUF);
  // empty for a directory of files.
  [[nodiscard]] virtual std::vector<std::filesystem::path> self_contained_files() const {
    return {};
  }
  [[nodiscard]] virtual const TensorStore& tensors() const = 0;
  // "dense", "gptq", "gptq_v2", "gguf": what the linears are stored as.
  [[nodiscard]] virtual std::string format() const = 0;
  // `module` without ".weight", e.g. "model.layers.0.mlp.up_proj". Throws ParseError when the file
  // does not hold it with these sizes.
  [[nodiscard]] virtual StoredLinear load_linear(
      const std::string& module, std::int64_t out_features, std::int64_t in_features) const = 0;
  [[nodiscard]] virtual bool is_quantized(const std::string& module) const = 0;
};

}  // namespace quern
