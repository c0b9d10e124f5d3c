// SPDX-License-Identifier: Apache-2.0
#include "pipeline/gguf_plan.h"

#include "base/error.h"
#include "format/gguf_config.h"
#include "format/gguf_names.h"
#include "format/gguf_tokenizer.h"

#include <fmt/format.h>

#include <array>
#include <map>
#include <utility>

namespace quern {
namespace {

constexpr std::array kRoundedTypes = {
    GgmlType::kQ2K,
    GgmlType::kQ3K,
    GgmlType::kQ4K,
    GgmlType::kQ5K,
    GgmlType::kQ6K,
    GgmlType::kQ40,
    GgmlType::kQ41,
    GgmlType::kQ50,
    GgmlType::kQ51,
    GgmlType::kQ80,
    GgmlType::kIQ4NL,
    GgmlType::kIQ4XS};

GgmlType float_type(DType dtype) {
  switch (dtype) {
    case DType::kBF16: return GgmlType::kBF16;
    case DType::kF16: return GgmlType::kF16;
    default: return GgmlType::kF32;
  }
}

// The label of a file by the type that most weights have: "Q4_K_S", "Q8_0". It is for people; every
// tensor says its own type.
std::uint32_t label_of(const QuantPlan& plan) {
  constexpr std::uint32_t kGuessed = 1024;
  std::map<GgmlType, std::int64_t> weights;
  for (const PlannedLinear& linear : plan.linears) {
    if (!linear.keep()) {
      weights[*linear.scheme.ggml] += linear.out_features * linear.in_features;
    }
  }
  GgmlType most = GgmlType::kQ80;
  std::int64_t highest = 0;
  for (const auto& [type, count] : weights) {
    if (count > highest) {
      highest = count;
      most = type;
    }
  }
  const std::string type(ggml_type_info(most).name);
  for (const std::string& label : {type, type + "_S"}) {
    if (const auto number = gguf_file_type(label)) {
      return *number;
    }
  }
  return kGuessed;
}

}  // namespace

GgmlType rounded_ggml_type(const std::string& text) {
  std::string known;
  for (const GgmlType type : kRoundedTypes) {
    if (ggml_type_info(type).name == text) {
      return type;
    }
    known += (known.empty() ? "" : ", ") + std::string(ggml_type_info(type).name);
  }
  throw UsageError(
      "a GGUF type that quern does not write",
      "--format gguf:" + text,
      "expected one of " + known,
      "--format gguf:Q4_K");
}

GgmlType ggml_type_of_bits(int bits) {
  switch (bits) {
    case 2: return GgmlType::kQ2K;
    case 3: return GgmlType::kQ3K;
    case 4: return GgmlType::kQ4K;
    case 5: return GgmlType::kQ5K;
    case 6: return GgmlType::kQ6K;
    case 8: return GgmlType::kQ80;
    default:
      throw UsageError(
          "GGUF has no type of this width",
          fmt::format("{} bits", bits),
          "expected 2, 3, 4, 5, 6 or 8",
          "--bits 4");
  }
}

GgmlType fitting_ggml_type(GgmlType type, std::int64_t in_features) {
  if (in_features % ggml_type_info(type).block == 0) {
    return type;
  }
  switch (type) {
    case GgmlType::kQ2K:
    case GgmlType::kQ3K: return GgmlType::kQ40;
    case GgmlType::kQ4K: return GgmlType::kQ50;
    case GgmlType::kQ5K: return GgmlType::kQ51;
    case GgmlType::kQ6K: return GgmlType::kQ80;
    case GgmlType::kIQ4XS: return GgmlType::kIQ4NL;
    default: return type;
  }
}

GgufPlan plan_gguf_output(
    const Checkpoint& source,
    const ModelGraph& graph,
    const QuantPlan& plan,
    const std::string& name) {
  const std::string architecture = gguf_architecture(graph);
  GgufPlan made;
  made.metadata = gguf_metadata(source.config(), graph, name, label_of(plan));
  add_gguf_tokenizer(made.metadata, source.directory(), source.config(), graph.config.vocab_size);
  const std::string head = graph.head.weight();
  const std::vector<float> factors = gguf_rope_factors(source.config(), graph);
  if (!factors.empty()) {
    GgufEntry entry;
    entry.declaration = {
        kRopeFactorsName, GgmlType::kF32, {static_cast<std::int64_t>(factors.size())}};
    entry.values = factors;
    made.entries.push_back(std::move(entry));
  }
  for (const auto& [tensor, view] : source.tensors().tensors()) {
    const std::optional<std::string> gguf = gguf_tensor_name(tensor);
    if (!gguf) {
      throw UnsupportedError(
          "a tensor that GGUF files of this architecture do not hold",
          tensor,
          "expected a tensor of a dense decoder",
          "write safetensors: --format compressed-tensors or gptq");
    }
    if (graph.head_tied && tensor == "lm_head.weight" && head != tensor) {
      continue;  // a copy of the embedding, which readers use for both
    }
    GgufEntry entry;
    entry.source = tensor;
    entry.linear = tensor.ends_with(".weight")
                       ? plan.find(tensor.substr(0, tensor.size() - std::string(".weight").size()))
                       : nullptr;
    if (entry.linear != nullptr && entry.linear->keep()) {
      entry.linear = nullptr;
    }
    const GgmlType type = entry.linear != nullptr  ? *entry.linear->scheme.ggml
                          : view.shape.size() == 1 ? GgmlType::kF32
                                                   : float_type(view.dtype);
    entry.declaration = {*gguf, type, view.shape};
    entry.row_order = gguf_row_order(architecture, tensor, view.shape.at(0), graph.config.head_dim);
    made.entries.push_back(std::move(entry));
  }
  std::vector<GgufDeclaration> declarations;
  for (const GgufEntry& entry : made.entries) {
    declarations.push_back(entry.declaration);
  }
  made.layout = plan_gguf(made.metadata, declarations);
  return made;
}

}  // namespace quern
