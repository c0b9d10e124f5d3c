// SPDX-License-Identifier: Apache-2.0
#include "format/output_format.h"

#include "base/error.h"
#include "format/gptq.h"
#include "format/gptq_config.h"

#include <fmt/format.h>

#include <array>
#include <utility>

namespace quern {
namespace {

// Embeddings are looked up along their rows; GPTQ's tables of rows group along the vocabulary, and
// no engine reads them.
void refuse_embedding(const OutputModule& module, const char* format) {
  if (module.is_embedding) {
    throw UnsupportedError(
        "the format has no quantized embeddings",
        module.name,
        fmt::format("expected a linear, found the table of embeddings for {}", format),
        "--format compressed-tensors or quern, or keep the embeddings in 16 bits");
  }
}

// Integer activations are no part of formats for weights alone.
void refuse_activation(const OutputModule& module, const char* format) {
  if (module.activation.active()) {
    throw UnsupportedError(
        "the format holds weights only",
        module.name,
        fmt::format(
            "expected inputs in floats, found {} bits for {}", module.activation.bits, format),
        "--format compressed-tensors or quern");
  }
}

template <GptqVersion kVersion>
StorageRules gptq_storage(DType, const OutputModule&) {
  return {DType::kF16, kVersion == GptqVersion::kV1};
}

template <GptqVersion kVersion>
void gptq_check(const OutputModule& module) {
  refuse_embedding(module, "GPTQ");
  refuse_activation(module, "GPTQ");
  check_gptq_holds(*module.scheme, kVersion, module.out_features, module.in_features, module.name);
}

std::vector<TensorDeclaration> gptq_declare(const OutputModule& module) {
  return gptq_declarations(module.name, *module.scheme, module.out_features, module.in_features);
}

template <GptqVersion kVersion>
std::vector<std::vector<std::byte>> gptq_pack(
    const QuantizedMatrix& matrix, const OutputModule& module) {
  GptqBytes bytes = pack_gptq(as_packed(matrix, module.name), kVersion, module.name);
  std::vector<std::vector<std::byte>> tensors;
  tensors.push_back(std::move(bytes.qweight));
  tensors.push_back(std::move(bytes.qzeros));
  tensors.push_back(std::move(bytes.scales));
  tensors.push_back(std::move(bytes.g_idx));
  return tensors;
}

template <GptqVersion kVersion>
Json gptq_config(
    const QuantScheme& common, std::span<const OutputModule> modules, const Json& meta) {
  std::vector<GptqModule> named;
  for (const OutputModule& module : modules) {
    named.push_back({module.name, module.scheme});
  }
  return gptq_config_json(common, kVersion, named, meta);
}

}  // namespace

std::span<const OutputFormat> output_formats() noexcept {
  // clang-format off
  static constexpr std::array<OutputFormat, 2> kFormats = {{
      {"gptq", "GPTQ v1, what most readers take", "quantize_config.json", gptq_storage<GptqVersion::kV1>,
       gptq_check<GptqVersion::kV1>, gptq_declare, gptq_pack<GptqVersion::kV1>, gptq_config<GptqVersion::kV1>},
      {"gptq_v2", "GPTQ v2, zero points as they are", "quantize_config.json", gptq_storage<GptqVersion::kV2>,
       gptq_check<GptqVersion::kV2>, gptq_declare, gptq_pack<GptqVersion::kV2>, gptq_config<GptqVersion::kV2>},
  }};
  // clang-format on
  return kFormats;
}

const OutputFormat& find_output_format(const std::string& name) {
  std::string known;
  for (const OutputFormat& format : output_formats()) {
    if (format.name == name) {
      return format;
    }
    known += (known.empty() ? "" : ", ") + std::string(format.name);
  }
  throw UnsupportedError(
      "unknown output format", "--format " + name, "expected one of " + known, "--format gptq");
}

}  // namespace quern
