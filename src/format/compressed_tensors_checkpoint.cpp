// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/compressed_tensors.h"
#include "format/compressed_tensors_config.h"
#include "format/formats.h"
#include "format/packed_checkpoint.h"
#include "format/packing.h"

#include <fmt/format.h>

#include <cmath>
#include <utility>

namespace quern {
namespace {

constexpr const char* kPacked = ".weight_packed";
constexpr const char* kWeight = ".weight";

class CompressedCheckpoint : public PackedCheckpoint {
 public:
  CompressedCheckpoint(CheckpointSource source, CompressedConfig config)
      : PackedCheckpoint(std::move(source)), compressed_(std::move(config)) {
    for (const std::string& module : modules_with(kPacked)) {
      check_packed(module, kPacked);
    }
    for (const char* suffix : {kPacked, kWeight}) {
      for (const std::string& module : modules_with(suffix)) {
        if (is_quantized(module)) {
          (void)part(module, ".weight_scale");
          (void)form_of(module);
        }
      }
    }
  }

  [[nodiscard]] std::string format() const override { return "compressed-tensors"; }
  [[nodiscard]] bool is_quantized(const std::string& module) const override {
    if (tensors().find(module + kPacked) != nullptr) {
      return true;
    }
    const TensorView* weight = tensors().find(module + kWeight);
    return weight != nullptr && weight->dtype == DType::kI8;
  }
  [[nodiscard]] StoredLinear load_linear(
      const std::string& module,
      std::int64_t out_features,
      std::int64_t in_features) const override {
    if (!is_quantized(module)) {
      refuse_unquantized(module);
    }
    return PackedCheckpoint::load_linear(module, out_features, in_features);
  }

 private:
  [[nodiscard]] StoredLinear load_quantized(
      const std::string& module,
      std::int64_t out_features,
      std::int64_t in_features) const override {
    CompressedForm form = form_of(module);
    const bool packed = form.layout == CompressedLayout::kPacked;
    CompressedParts parts{
        part(module, packed ? kPacked : kWeight), part(module, ".weight_scale"), {}, {}, {}};
    parts.zero_point = optional_part(module, ".weight_zero_point");
    parts.shape = optional_part(module, ".weight_shape");
    parts.group_index = optional_part(module, ".weight_g_idx");
    StoredLinear linear;
    linear.quantized = std::make_shared<const PackedLinear>(
        unpack_compressed(parts, form, out_features, in_features, place(module)));
    if (form.activation.active()) {
      if (!form.activation.dynamic) {
        form.activation.scale = input_scale(module);
      }
      linear.activation = std::make_shared<const ActivationScheme>(form.activation);
    }
    return linear;
  }

  [[nodiscard]] std::optional<TensorView> optional_part(
      const std::string& module, const char* suffix) const {
    const TensorView* view = tensors().find(module + suffix);
    return view == nullptr ? std::nullopt : std::optional(*view);
  }

  [[nodiscard]] float input_scale(const std::string& module) const {
    const std::string where = place(module + ".input_scale");
    const TensorView& view = part(module, ".input_scale");
    const float scale = read_scales(view, view.shape.empty() ? Shape{} : Shape{1}, where).front();
    if (!(scale > 0)) {
      throw ParseError(
          "a scale of inputs is not positive",
          where,
          fmt::format("expected a positive number, found {}", scale),
          "quantize the model again");
    }
    if (const auto zero = optional_part(module, ".input_zero_point")) {
      for (const std::byte byte : zero->bytes) {
        if (byte != std::byte{0}) {
          throw ParseError(
              "symmetric inputs have a zero point",
              place(module + ".input_zero_point"),
              "expected none, or zero, found another value",
              "check that the quantization configuration belongs to these weights");
        }
      }
    }
    return scale;
  }

  // The form that the configuration gives a module whose weights are stored as integers.
  [[nodiscard]] const CompressedForm& form_of(const std::string& module) const {
    const CompressedForm* form = compressed_.form_for(module);
    const bool packed = tensors().find(module + kPacked) != nullptr;
    if (form == nullptr || (form->layout == CompressedLayout::kPacked) != packed) {
      throw ParseError(
          "the configuration does not fit a quantized module",
          place(module),
          fmt::format(
              "expected {} by {}, found {}",
              form == nullptr ? "a plain weight"
              : packed        ? "a weight of one integer a value"
                              : "a packed weight",
              source().quantization_where,
              packed ? "weight_packed" : "a weight of I8"),
          "correct `config_groups` and `ignore` in the configuration");
    }
    return *form;
  }

  // Engines would look for packed weights where the configuration says so. A head of the class
  // Linear is one in transformers only.
  void refuse_unquantized(const std::string& module) const {
    if (module != "lm_head" && compressed_.form_for(module) != nullptr) {
      throw ParseError(
          "the configuration does not fit a module in floats",
          place(module),
          fmt::format("expected a quantized one by {}", source().quantization_where),
          "put the module into `ignore` of the configuration");
    }
  }

  CompressedConfig compressed_;
};

}  // namespace

bool is_compressed_tensors(const CheckpointSource& source) {
  return source.method == "compressed-tensors";
}

std::unique_ptr<Checkpoint> open_compressed_tensors(CheckpointSource source) {
  CompressedConfig config = read_compressed_config(source.quantization, source.quantization_where);
  return std::make_unique<CompressedCheckpoint>(std::move(source), std::move(config));
}

}  // namespace quern
