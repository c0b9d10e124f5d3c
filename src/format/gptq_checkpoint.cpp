// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/formats.h"
#include "format/gptq.h"
#include "format/gptq_config.h"
#include "format/safetensors.h"

#include <fmt/format.h>

#include <string_view>
#include <utility>

namespace quern {
namespace {

constexpr std::string_view kQweight = ".qweight";
constexpr const char* kDownloadAgain = "download the model again";

class GptqCheckpoint : public Checkpoint {
 public:
  explicit GptqCheckpoint(CheckpointSource source)
      : source_(std::move(source)),
        gptq_(read_gptq_config(
            source_.quantization,
            source_.quantization_where,
            source_.second.is_null() ? nullptr : &source_.second,
            source_.second_where)),
        tensors_(SafetensorsStore::open(source_.weights)) {
    for (const auto& [name, view] : tensors_->tensors()) {
      if (name.ends_with(kQweight)) {
        check_module(name.substr(0, name.size() - kQweight.size()), view);
      }
    }
  }

  [[nodiscard]] const std::filesystem::path& directory() const override {
    return source_.directory;
  }
  [[nodiscard]] const Json& config() const override { return source_.config; }
  [[nodiscard]] const TensorStore& tensors() const override { return *tensors_; }
  [[nodiscard]] std::string format() const override {
    return std::string(gptq_version_name(gptq_.version));
  }
  [[nodiscard]] bool is_quantized(const std::string& module) const override {
    return tensors_->find(module + std::string(kQweight)) != nullptr;
  }

  [[nodiscard]] StoredLinear load_linear(
      const std::string& module,
      std::int64_t out_features,
      std::int64_t in_features) const override {
    if (!is_quantized(module)) {
      return load_dense_linear(*tensors_, module, out_features, in_features);
    }
    GptqTensors stored;
    stored.qweight = part(module, ".qweight");
    stored.qzeros = part(module, ".qzeros");
    stored.scales = part(module, ".scales");
    if (const TensorView* g_idx = tensors_->find(module + ".g_idx")) {
      stored.g_idx = *g_idx;
    }
    StoredLinear linear;
    linear.quantized = std::make_shared<const PackedLinear>(unpack_gptq(
        stored, scheme_of(module), gptq_.version, out_features, in_features, place(module)));
    return linear;
  }

 private:
  // What can be said of a module before its sizes are known from the model.
  void check_module(const std::string& module, const TensorView& qweight) const {
    if (qweight.shape.size() != 2) {
      throw ParseError(
          "a GPTQ tensor has the wrong shape",
          place(module + ".qweight"),
          fmt::format("expected two extents, found {}", shape_text(qweight.shape)),
          kDownloadAgain);
    }
    for (const char* tensor : {".qzeros", ".scales"}) {
      (void)part(module, tensor);
    }
    if (gptq_.desc_act && tensors_->find(module + ".g_idx") == nullptr) {
      throw ParseError(
          "a tensor of a quantized module is missing",
          place(module + ".g_idx"),
          "expected it because desc_act is true, found nothing",
          kDownloadAgain);
    }
    if (tensors_->find(module + ".weight") != nullptr) {
      throw ParseError(
          "a module is stored twice",
          place(module),
          "expected qweight or weight, found both",
          "remove the one that does not belong to the model");
    }
  }

  // For messages: where a tensor or module was looked for.
  [[nodiscard]] std::string place(const std::string& name) const {
    return source_.weights.string() + ": " + printable(name);
  }

  [[nodiscard]] const TensorView& part(const std::string& module, const char* tensor) const {
    const TensorView* view = tensors_->find(module + tensor);
    if (view == nullptr) {
      throw ParseError(
          "a tensor of a quantized module is missing",
          place(module + tensor),
          "expected it beside qweight, found nothing",
          kDownloadAgain);
    }
    return *view;
  }

  [[nodiscard]] QuantScheme scheme_of(const std::string& module) const {
    const std::optional<QuantScheme> scheme = gptq_.scheme_for(module);
    if (!scheme) {
      throw ParseError(
          "a rule excludes a module that is quantized",
          place(module),
          fmt::format("expected a plain weight by {}, found qweight", source_.quantization_where),
          "correct `dynamic` in the configuration");
    }
    return *scheme;
  }

  CheckpointSource source_;
  GptqConfig gptq_;
  std::unique_ptr<SafetensorsStore> tensors_;
};

}  // namespace

bool is_gptq(const CheckpointSource& source) {
  return source.method == "gptq";
}

std::unique_ptr<Checkpoint> open_gptq(CheckpointSource source) {
  return std::make_unique<GptqCheckpoint>(std::move(source));
}

}  // namespace quern
