// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/formats.h"
#include "format/fused_experts.h"
#include "format/safetensors.h"

#include <fmt/format.h>

#include <utility>

namespace quern {
namespace {

class DenseCheckpoint : public Checkpoint {
 public:
  explicit DenseCheckpoint(CheckpointSource source)
      : source_(std::move(source)),
        tensors_(split_fused_experts(SafetensorsStore::open(source_.weights))) {
    for (const auto& [name, view] : tensors_->tensors()) {
      constexpr std::string_view kSuffix = ".qweight";
      if (name.size() > kSuffix.size() && name.ends_with(kSuffix)) {
        throw ParseError(
            "quantized tensors without a quantization configuration",
            name,
            "expected quantization_config in config.json or quantize_config.json, found neither",
            "download config.json and quantize_config.json again");
      }
    }
  }

  [[nodiscard]] const std::filesystem::path& directory() const override {
    return source_.directory;
  }
  [[nodiscard]] const Json& config() const override { return source_.config; }
  [[nodiscard]] const TensorStore& tensors() const override { return *tensors_; }
  [[nodiscard]] std::string format() const override { return "dense"; }
  [[nodiscard]] StoredLinear load_linear(
      const std::string& module,
      std::int64_t out_features,
      std::int64_t in_features) const override {
    return load_dense_linear(*tensors_, module, out_features, in_features);
  }
  [[nodiscard]] bool is_quantized(const std::string& module) const override {
    (void)module;
    return false;
  }

 private:
  CheckpointSource source_;
  std::unique_ptr<TensorStore> tensors_;
};

}  // namespace

bool is_dense(const CheckpointSource& source) {
  return source.quantization.is_null();
}

std::unique_ptr<Checkpoint> open_dense(CheckpointSource source) {
  return std::make_unique<DenseCheckpoint>(std::move(source));
}

StoredLinear load_dense_linear(
    const TensorStore& tensors,
    const std::string& module,
    std::int64_t out_features,
    std::int64_t in_features) {
  StoredLinear linear;
  linear.dense = tensors.require_float(module + ".weight", {out_features, in_features});
  return linear;
}

}  // namespace quern
