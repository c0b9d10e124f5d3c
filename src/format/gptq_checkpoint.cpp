// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/formats.h"
#include "format/gptq.h"
#include "format/gptq_config.h"
#include "format/packed_checkpoint.h"

#include <fmt/format.h>

#include <utility>

namespace quern {
namespace {

constexpr const char* kQweight = ".qweight";

class GptqCheckpoint : public PackedCheckpoint {
 public:
  GptqCheckpoint(CheckpointSource source, GptqConfig config)
      : PackedCheckpoint(std::move(source)), gptq_(std::move(config)) {
    for (const std::string& module : modules_with(kQweight)) {
      check_module(module);
    }
  }

  [[nodiscard]] std::string format() const override {
    return std::string(gptq_version_name(gptq_.version));
  }
  [[nodiscard]] bool is_quantized(const std::string& module) const override {
    return tensors().find(module + kQweight) != nullptr;
  }

 private:
  [[nodiscard]] StoredLinear load_quantized(
      const std::string& module,
      std::int64_t out_features,
      std::int64_t in_features) const override {
    GptqTensors stored;
    stored.qweight = part(module, kQweight);
    stored.qzeros = part(module, ".qzeros");
    stored.scales = part(module, ".scales");
    if (const TensorView* g_idx = tensors().find(module + ".g_idx")) {
      stored.g_idx = *g_idx;
    }
    StoredLinear linear;
    linear.quantized = std::make_shared<const PackedLinear>(unpack_gptq(
        stored, scheme_of(module), gptq_.version, out_features, in_features, place(module)));
    return linear;
  }

  // What can be said of a module before its sizes are known from the model.
  void check_module(const std::string& module) const {
    check_packed(module, kQweight);
    for (const char* tensor : {".qzeros", ".scales"}) {
      (void)part(module, tensor);
    }
    if (gptq_.desc_act && tensors().find(module + ".g_idx") == nullptr) {
      throw ParseError(
          "a tensor of a quantized module is missing",
          place(module + ".g_idx"),
          "expected it because desc_act is true, found nothing",
          "download the model again");
    }
  }

  [[nodiscard]] QuantScheme scheme_of(const std::string& module) const {
    const std::optional<QuantScheme> scheme = gptq_.scheme_for(module);
    if (!scheme) {
      throw ParseError(
          "a rule excludes a module that is quantized",
          place(module),
          fmt::format("expected a plain weight by {}, found qweight", source().quantization_where),
          "correct `dynamic` in the configuration");
    }
    return *scheme;
  }

  GptqConfig gptq_;
};

}  // namespace

bool is_gptq(const CheckpointSource& source) {
  return source.method == "gptq";
}

std::unique_ptr<Checkpoint> open_gptq(CheckpointSource source) {
  GptqConfig config = read_gptq_config(
      source.quantization,
      source.quantization_where,
      source.second.is_null() ? nullptr : &source.second,
      source.second_where);
  return std::make_unique<GptqCheckpoint>(std::move(source), std::move(config));
}

}  // namespace quern
