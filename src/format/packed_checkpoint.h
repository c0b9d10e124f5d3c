// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "format/formats.h"
#include "format/safetensors.h"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

namespace quern {

// What the readers of quantized safetensors checkpoints have in common: modules that are stored in
// several tensors MODULE.part, beside others that keep MODULE.weight in floats.
class PackedCheckpoint : public Checkpoint {
 public:
  explicit PackedCheckpoint(CheckpointSource source);

  [[nodiscard]] const std::filesystem::path& directory() const override {
    return source_.directory;
  }
  [[nodiscard]] const Json& config() const override { return source_.config; }
  [[nodiscard]] const TensorStore& tensors() const override { return *tensors_; }
  [[nodiscard]] StoredLinear load_linear(
      const std::string& module,
      std::int64_t out_features,
      std::int64_t in_features) const override;

 protected:
  [[nodiscard]] virtual StoredLinear load_quantized(
      const std::string& module, std::int64_t out_features, std::int64_t in_features) const = 0;

  [[nodiscard]] const CheckpointSource& source() const noexcept { return source_; }
  // For messages: where a tensor or module was looked for.
  [[nodiscard]] std::string place(const std::string& name) const;
  // The tensor `module` + `suffix`; throws ParseError when it is missing.
  [[nodiscard]] const TensorView& part(const std::string& module, const char* suffix) const;
  // The modules that own a tensor with this suffix.
  [[nodiscard]] std::vector<std::string> modules_with(std::string_view suffix) const;
  // Checks of a module whose packed weights are `module` + `suffix`: two extents, and no second
  // form of the same weights.
  void check_packed(const std::string& module, const char* suffix) const;

 private:
  CheckpointSource source_;
  std::unique_ptr<TensorStore> tensors_;
};

}  // namespace quern
