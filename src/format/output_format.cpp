// SPDX-License-Identifier: Apache-2.0
#include "format/output_format.h"

#include "base/error.h"
#include "format/awq.h"
#include "format/compressed_tensors.h"
#include "format/compressed_tensors_config.h"
#include "format/gptq.h"
#include "format/gptq_config.h"
#include "format/merged_modules.h"
#include "format/packing.h"
#include "format/quern_container.h"

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

StorageRules awq_storage(DType, const OutputModule&) {
  return {DType::kF16, false};
}

void awq_check(const OutputModule& module) {
  refuse_embedding(module, "AWQ");
  refuse_activation(module, "AWQ");
  check_awq_holds(*module.scheme, module.out_features, module.in_features, module.name);
}

std::vector<TensorDeclaration> awq_declare(const OutputModule& module) {
  return awq_declarations(module.name, *module.scheme, module.out_features, module.in_features);
}

std::vector<std::vector<std::byte>> awq_pack(
    const QuantizedMatrix& matrix, const OutputModule& module) {
  AwqBytes bytes = pack_awq(as_packed(matrix, module.name), module.name);
  std::vector<std::vector<std::byte>> tensors;
  tensors.push_back(std::move(bytes.qweight));
  tensors.push_back(std::move(bytes.qzeros));
  tensors.push_back(std::move(bytes.scales));
  return tensors;
}

Json awq_config(
    const QuantScheme& common, std::span<const OutputModule> modules, const Json& meta) {
  std::vector<SchemedModule> named;
  for (const OutputModule& module : modules) {
    named.push_back({module.name, {}});
    if (module.scheme) {
      named.back().scheme = ModuleScheme{*module.scheme};
    }
  }
  return awq_config_json(common, named, meta);
}

CompressedForm compressed_form(const OutputModule& module) {
  CompressedForm form;
  form.layout = module.activation.active() ? CompressedLayout::kInteger : CompressedLayout::kPacked;
  form.scheme = *module.scheme;
  form.scale_dtype = module.scale_dtype;
  form.activation = module.activation;
  return form;
}

// vLLM holds the scales of W8A8 in F32 and all others in the dtype of the model.
StorageRules compressed_storage(DType source, const OutputModule& module) {
  const bool wide = module.activation.active() && module.scheme && module.scheme->bits == 8;
  return {wide ? DType::kF32 : source, false};
}

// vLLM's look-up kernel for packed embeddings (compressed_tensors_embedding.py) takes codes that
// fill words and no zero points.
void check_compressed_embedding(const OutputModule& module) {
  const QuantScheme& scheme = *module.scheme;
  if (!scheme.symmetric || !fills_words(scheme.bits) || module.activation.active()) {
    throw UnsupportedError(
        "no engine looks up such embeddings",
        module.name,
        fmt::format(
            "expected 2, 4 or 8 bits, symmetric, found {} bits, {}",
            scheme.bits,
            scheme.symmetric ? "symmetric" : "asymmetric"),
        "choose 2, 4 or 8 bits, symmetric, or --format quern");
  }
}

void compressed_check(const OutputModule& module) {
  if (module.is_embedding) {
    check_compressed_embedding(module);
  }
  check_compressed_holds(
      compressed_form(module), module.out_features, module.in_features, module.name);
}

// A packed table cannot be tied to the head (vLLM's tie_weights takes floats): it is written twice.
bool is_written_twice(const OutputModule& module) {
  return module.is_embedding && module.is_head;
}

std::vector<TensorDeclaration> compressed_declare(const OutputModule& module) {
  const CompressedForm form = compressed_form(module);
  std::vector<TensorDeclaration> tensors =
      compressed_declarations(module.name, form, module.out_features, module.in_features);
  if (is_written_twice(module)) {
    for (TensorDeclaration& tensor :
         compressed_declarations(kUntiedHead, form, module.out_features, module.in_features)) {
      tensors.push_back(std::move(tensor));
    }
  }
  return tensors;
}

std::vector<std::vector<std::byte>> compressed_pack(
    const QuantizedMatrix& matrix, const OutputModule& module) {
  const PackedLinear& packed = as_packed(matrix, module.name);
  std::vector<std::vector<std::byte>> tensors =
      pack_compressed(packed, compressed_form(module), module.name);
  if (is_written_twice(module)) {
    const std::size_t count = tensors.size();
    for (std::size_t i = 0; i < count; ++i) {
      tensors.push_back(tensors[i]);
    }
  }
  return tensors;
}

Json compressed_config(const QuantScheme&, std::span<const OutputModule> modules, const Json&) {
  std::vector<CompressedModule> named;
  for (const OutputModule& module : modules) {
    named.push_back({module.name, {}, !module.is_embedding && !module.is_head});
    if (module.scheme) {
      named.back().form = compressed_form(module);
    }
    if (module.scheme && is_written_twice(module)) {
      named.push_back({kUntiedHead, compressed_form(module), false});
    }
  }
  return compressed_config_json(named);
}

StorageRules container_storage(DType, const OutputModule&) {
  return {DType::kF16, false};
}

Json container_config(const QuantScheme&, std::span<const OutputModule> modules, const Json& meta) {
  return container_config_json(modules, meta);
}

StorageRules gguf_storage(DType, const OutputModule&) {
  return {};
}

void gguf_check(const OutputModule& module) {
  refuse_activation(module, "GGUF");
  const std::optional<GgmlType> type = module.scheme->ggml;
  if (!type) {
    throw UnsupportedError(
        "GGUF holds block types only",
        module.name,
        "expected a ggml type, found a grid of integer codes",
        "--format gguf:Q4_K, or leave the plan's bits to the format");
  }
  if (module.in_features % ggml_type_info(*type).block != 0) {
    throw UnsupportedError(
        "a row is not made of whole blocks",
        module.name,
        fmt::format(
            "expected a multiple of {} columns for {}, found {}",
            ggml_type_info(*type).block,
            ggml_type_info(*type).name,
            module.in_features),
        "set its type to Q4_0, Q5_0 or Q8_0 in the plan, or its method to keep");
  }
}

}  // namespace

std::span<const OutputFormat> output_formats() noexcept {
  // clang-format off
  static constexpr std::array<OutputFormat, 6> kFormats = {{
      {"gptq", "GPTQ v1, what most readers take", "quantize_config.json", gptq_storage<GptqVersion::kV1>,
       gptq_check<GptqVersion::kV1>, gptq_declare, gptq_pack<GptqVersion::kV1>, gptq_config<GptqVersion::kV1>},
      {"gptq_v2", "GPTQ v2, zero points as they are", "quantize_config.json", gptq_storage<GptqVersion::kV2>,
       gptq_check<GptqVersion::kV2>, gptq_declare, gptq_pack<GptqVersion::kV2>, gptq_config<GptqVersion::kV2>},
      {"awq", "AWQ gemm, 4 bits, one scheme for all", "", awq_storage, awq_check, awq_declare, awq_pack, awq_config},
      {"compressed-tensors", "2 to 8 bits, mixed schemes, integer inputs, embeddings", "", compressed_storage,
       compressed_check, compressed_declare, compressed_pack, compressed_config, true},
      {"gguf", "one file for llama.cpp; gguf:TYPE chooses the block type", "", gguf_storage, gguf_check,
       nullptr, nullptr, nullptr, false, true},
      {"quern", "quern's own container, every form exactly", "", container_storage,
       check_container_holds, container_declarations, pack_container, container_config},
  }};
  // clang-format on
  return kFormats;
}

std::string output_format_names() {
  std::string names;
  for (const OutputFormat& format : output_formats()) {
    names += (names.empty() ? "" : ", ") + std::string(format.name);
  }
  return names;
}

const OutputFormat& find_output_format(const std::string& name) {
  for (const OutputFormat& format : output_formats()) {
    if (format.name == name.substr(0, name.find(':'))) {
      return format;
    }
  }
  throw UnsupportedError(
      "unknown output format",
      "--format " + name,
      "expected one of " + output_format_names(),
      "--format gptq");
}

}  // namespace quern
