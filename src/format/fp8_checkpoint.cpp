// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/derived_checkpoint.h"
#include "format/formats.h"
#include "format/packed_checkpoint.h"
#include "quant/fp8_matrix.h"

#include <fmt/format.h>

#include <cmath>
#include <utility>

// Block-scaled FP8 as released by Qwen ("-FP8"; quant_method "fp8" of transformers):
//
//   M.weight            F8_E4M3 [out, in]
//   M.weight_scale_inv  BF16 or F32 [ceil(out/128), ceil(in/128)]  W = value * scale
//
// with weight_block_size [128, 128] in the configuration. Modules that it excepts
// (modules_to_not_convert) keep their floats; the tensors say which they are.
namespace quern {
namespace {

constexpr const char* kWeight = ".weight";
constexpr const char* kScale = ".weight_scale_inv";
constexpr const char* kDownloadAgain = "download the model again";

struct Fp8Config {
  std::int64_t block_rows = 0;
  std::int64_t block_columns = 0;
};

Fp8Config read_fp8_config(const Json& json, const std::string& where) {
  constexpr std::int64_t kMaxBlock = 65536;
  const JsonReader reader(json, where);
  const std::string format = reader.get_string_or("fmt", "e4m3");
  if (format != "e4m3") {
    throw UnsupportedError(
        "an 8-bit float that quern does not read",
        reader.place("fmt"),
        "expected e4m3, found " + printable(format, 40),
        "use the BF16 release of the model");
  }
  if (reader.has("scale_fmt")) {
    const std::string scale = reader.get_string("scale_fmt");
    if (scale != "float") {
      throw UnsupportedError(
          "scales that quern does not read",
          reader.place("scale_fmt"),
          "expected float, found " + printable(scale, 40),
          "use the BF16 release of the model");
    }
  }
  if (!reader.has("weight_block_size")) {
    throw UnsupportedError(
        "FP8 weights without scales by block",
        where,
        "expected weight_block_size, found none",
        "use the BF16 release of the model");
  }
  const Json& sizes = reader.get_array("weight_block_size");
  const auto is_size = [](const Json& size) {
    return size.is_number_integer() && size.get<std::int64_t>() > 0 &&
           size.get<std::int64_t>() <= kMaxBlock;
  };
  if (sizes.size() != 2 || !is_size(sizes[0]) || !is_size(sizes[1])) {
    throw ParseError(
        "a key is out of range",
        reader.place("weight_block_size"),
        "expected two positive numbers, rows and columns",
        "check the file");
  }
  return {sizes[0].get<std::int64_t>(), sizes[1].get<std::int64_t>()};
}

class Fp8Checkpoint : public PackedCheckpoint {
 public:
  Fp8Checkpoint(CheckpointSource source, const Fp8Config& config)
      : PackedCheckpoint(std::move(source)), config_(config) {
    for (const std::string& module : modules_with(kScale)) {
      if (!is_quantized(module)) {
        throw ParseError(
            "a scale without its weight",
            place(module + kScale),
            "expected F8_E4M3 values in .weight beside it, found none",
            kDownloadAgain);
      }
    }
    for (const std::string& module : modules_with(kWeight)) {
      if (is_quantized(module)) {
        const TensorView& weight = part(module, kWeight);
        if (weight.shape.size() != 2) {
          throw UnsupportedError(
              "FP8 weights that are no matrix",
              place(module + kWeight),
              "expected two extents, found " + shape_text(weight.shape),
              "use the BF16 release of the model");
        }
        (void)scales_of(module, weight.shape[0], weight.shape[1]);
      }
    }
  }

  [[nodiscard]] std::string format() const override { return "fp8"; }
  [[nodiscard]] bool is_quantized(const std::string& module) const override {
    const TensorView* weight = tensors().find(module + kWeight);
    return weight != nullptr && weight->dtype == DType::kF8E4M3;
  }

 private:
  [[nodiscard]] StoredLinear load_quantized(
      const std::string& module,
      std::int64_t out_features,
      std::int64_t in_features) const override {
    auto matrix = std::make_shared<Fp8Matrix>();
    matrix->out_features = out_features;
    matrix->in_features = in_features;
    matrix->block_rows = config_.block_rows;
    matrix->block_columns = config_.block_columns;
    matrix->values = tensors().require(module + kWeight, {out_features, in_features}).bytes;
    matrix->scales = to_float(scales_of(module, out_features, in_features));
    for (const float scale : matrix->scales) {
      if (!std::isfinite(scale)) {
        throw ParseError(
            "a scale is not finite",
            place(module + kScale),
            fmt::format("expected numbers, found {}", scale),
            kDownloadAgain);
      }
    }
    StoredLinear linear;
    linear.quantized = std::move(matrix);
    return linear;
  }

  [[nodiscard]] const TensorView& scales_of(
      const std::string& module, std::int64_t rows, std::int64_t columns) const {
    const TensorView& scales = part(module, kScale);
    Fp8Matrix shape;
    shape.out_features = rows;
    shape.in_features = columns;
    shape.block_rows = config_.block_rows;
    shape.block_columns = config_.block_columns;
    if (scales.shape != shape.scale_shape() || !is_16_or_32_bit_float(scales.dtype)) {
      throw ParseError(
          "scales that do not fit their weight",
          place(module + kScale),
          fmt::format(
              "expected BF16, F16 or F32 {} for {} in blocks of {} x {}, found {} {}",
              shape_text(shape.scale_shape()),
              shape_text({rows, columns}),
              config_.block_rows,
              config_.block_columns,
              dtype_name(scales.dtype),
              shape_text(scales.shape)),
          "check that the quantization configuration belongs to these weights");
    }
    return scales;
  }

  Fp8Config config_;
};

std::vector<std::byte> as_bf16(const StoredLinear& stored) {
  const auto& matrix = dynamic_cast<const Fp8Matrix&>(*stored.quantized);
  std::vector<float> row(static_cast<std::size_t>(matrix.in_features));
  std::vector<std::byte> values;
  for (std::int64_t r = 0; r < matrix.out_features; ++r) {
    matrix.decode_row(r, row);
    const std::vector<std::byte> bytes = from_float(row, DType::kBF16);
    values.insert(values.end(), bytes.begin(), bytes.end());
  }
  return values;
}

}  // namespace

bool is_fp8(const CheckpointSource& source) {
  return source.method == "fp8";
}

std::unique_ptr<Checkpoint> open_fp8(CheckpointSource source) {
  const Fp8Config config = read_fp8_config(source.quantization, source.quantization_where);
  return std::make_unique<Fp8Checkpoint>(std::move(source), config);
}

std::unique_ptr<Checkpoint> with_plain_weights(std::unique_ptr<Checkpoint> source) {
  if (source->format() != "fp8") {
    return source;
  }
  std::map<std::string, DerivedTensor> derived;
  std::set<std::string> dropped;
  for (const auto& [name, view] : source->tensors().tensors()) {
    if (name.ends_with(kScale)) {
      dropped.insert(name);
    } else if (view.dtype == DType::kF8E4M3) {
      const std::string module = name.substr(0, name.size() - std::string_view(kWeight).size());
      derived[name] = {
          DType::kBF16, view.shape, [checkpoint = source.get(), module, shape = view.shape] {
            return as_bf16(checkpoint->load_linear(module, shape[0], shape[1]));
          }};
    }
  }
  Json config = source->config();
  config.erase("quantization_config");
  return derive_checkpoint(std::move(source), std::move(config), std::move(derived), dropped);
}

}  // namespace quern
