// SPDX-License-Identifier: Apache-2.0
#include "pipeline/gguf_plan.h"

#include "base/error.h"
#include "format/gguf_config.h"
#include "format/gguf_tokenizer.h"

#include <fmt/format.h>

#include <array>
#include <map>
#include <optional>
#include <string_view>
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

constexpr std::string_view kWeight = ".weight";

std::string name_in(const std::string& architecture, const std::string& tensor) {
  const std::optional<std::string> name = gguf_tensor_name(tensor, architecture);
  if (!name) {
    throw UnsupportedError(
        "a tensor that GGUF files of this architecture do not hold",
        tensor,
        "expected a tensor of the decoder",
        "write safetensors: --format compressed-tensors or gptq");
  }
  return *name;
}

// A convolution of one channel each is a matrix; the gate of a shared expert a vector.
Shape shape_in_gguf(const std::string& tensor, const Shape& shape) {
  if (shape.size() == 3 && shape[1] == 1) {
    return {shape[0], shape[2]};
  }
  return tensor.ends_with(".shared_expert_gate.weight") ? Shape{shape.back()} : shape;
}

GgmlType type_of(const GgufDeclaration& declaration, const PlannedLinear* linear, DType dtype) {
  if (linear != nullptr) {
    return *linear->scheme.ggml;
  }
  const bool is_small = declaration.name.ends_with("ffn_gate_inp.weight") ||
                        declaration.name.ends_with("ssm_conv1d.weight");
  return declaration.shape.size() == 1 || is_small ? GgmlType::kF32 : float_type(dtype);
}

// The one piece of a tensor that becomes one.
GgufPiece plan_piece(
    const std::string& architecture,
    const ModelGraph& graph,
    const std::string& tensor,
    const PlannedLinear* linear,
    std::int64_t rows) {
  GgufPiece piece{tensor, linear, {}, {}};
  piece.rows = gguf_row_order(architecture, tensor, rows, graph.config.head_dim);
  if (!graph.config.delta_net) {
    return piece;
  }
  const DeltaNetConfig& shape = *graph.config.delta_net;
  if (piece.rows.empty()) {
    piece.rows = gguf_delta_row_order(architecture, tensor, shape);
  }
  if (tensor.ends_with(kDeltaOutput)) {
    piece.column_heads = gguf_value_heads(architecture, shape);
  }
  if (linear != nullptr && !piece.column_heads.empty() &&
      shape.value_dim % ggml_type_info(*linear->scheme.ggml).block != 0) {
    throw UnsupportedError(
        "blocks that would reach over heads",
        tensor,
        fmt::format(
            "expected a type whose blocks divide {} columns, as GGUF orders heads, found {}",
            shape.value_dim,
            ggml_type_info(*linear->scheme.ggml).name),
        "set its type to Q4_0, Q5_0 or Q8_0 in the plan, or its method to keep");
  }
  return piece;
}

// in_proj_qkvz of Qwen3-Next becomes two tensors.
void add_fused_delta(
    const std::string& tensor,
    const TensorView& view,
    const PlannedLinear* linear,
    const DeltaNetConfig& shape,
    std::vector<GgufEntry>& entries) {
  const std::string base = tensor.substr(0, tensor.size() - kFusedDeltaInput.size());
  GgufDeltaRows rows = gguf_delta_rows(shape);
  const auto add = [&](const char* part, std::vector<std::int64_t>& taken) {
    GgufEntry entry;
    entry.declaration.name = gguf_tensor_name(base + part).value();
    entry.declaration.shape = {static_cast<std::int64_t>(taken.size()), view.shape.at(1)};
    entry.declaration.type = type_of(entry.declaration, linear, view.dtype);
    entry.pieces = {{tensor, linear, std::move(taken), {}}};
    entries.push_back(std::move(entry));
  };
  add(".linear_attn.in_proj_qkv.weight", rows.qkv);
  add(".linear_attn.in_proj_z.weight", rows.gate);
}

// Slices of one tensor have one type.
void require_alike(const GgufPiece& first, const GgufPiece& other) {
  const auto type = [](const GgufPiece& piece) {
    return piece.linear == nullptr ? std::string("floats")
                                   : std::string(ggml_type_info(*piece.linear->scheme.ggml).name);
  };
  if (type(first) != type(other)) {
    throw UnsupportedError(
        "GGUF holds the experts of a layer in one tensor",
        other.source,
        fmt::format("expected {} as for {}, found {}", type(first), first.source, type(other)),
        "give all experts of a layer one type in the plan");
  }
}

}  // namespace

std::int64_t gguf_columns_together(const ModelGraph& graph, const PlannedLinear& linear) {
  const std::optional<DeltaNetConfig>& delta = graph.config.delta_net;
  const bool is_moved = delta && (linear.name + ".weight").ends_with(kDeltaOutput) &&
                        !gguf_value_heads(gguf_architecture(graph), *delta).empty();
  return is_moved ? delta->value_dim : linear.in_features;
}

const char* left_out_of_gguf(const std::string& tensor) {
  if (tensor.starts_with("model.visual.") || tensor.starts_with("visual.")) {
    return "llama.cpp reads vision towers from a file of their own, which quern does not write";
  }
  if (tensor.starts_with("mtp.")) {
    return "draft layers, which quern does not write to GGUF";
  }
  return nullptr;
}

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
  const Json& config = source.config();
  add_gguf_tokenizer(
      made.metadata,
      source.directory(),
      config.contains("text_config") ? config["text_config"] : config,
      graph.config.vocab_size);
  const std::string head = graph.head.weight();
  const std::vector<float> factors = gguf_rope_factors(source.config(), graph);
  if (!factors.empty()) {
    GgufEntry entry;
    entry.declaration = {
        kRopeFactorsName, GgmlType::kF32, {static_cast<std::int64_t>(factors.size())}};
    entry.values = factors;
    made.entries.push_back(std::move(entry));
  }
  const auto planned = [&](const std::string& tensor) {
    const PlannedLinear* linear = tensor.ends_with(kWeight)
                                      ? plan.find(tensor.substr(0, tensor.size() - kWeight.size()))
                                      : nullptr;
    return linear != nullptr && linear->keep() ? nullptr : linear;
  };
  std::map<std::string, std::map<std::int64_t, std::string>> stacks;  // by expert
  for (const auto& [tensor, view] : source.tensors().tensors()) {
    if (graph.head_tied && tensor == "lm_head.weight" && head != tensor) {
      continue;  // a copy of the embedding, which readers use for both
    }
    if (const char* reason = left_out_of_gguf(tensor)) {
      made.skipped.push_back({tensor, reason});
    } else if (const std::optional<GgufSlice> slice = gguf_slice(tensor)) {
      stacks[slice->stack][slice->expert] = tensor;
    } else if (tensor.ends_with(kFusedDeltaInput) && graph.config.delta_net) {
      add_fused_delta(tensor, view, planned(tensor), *graph.config.delta_net, made.entries);
    } else {
      GgufEntry entry;
      entry.declaration.name = name_in(architecture, tensor);
      entry.pieces = {plan_piece(architecture, graph, tensor, planned(tensor), view.shape.at(0))};
      entry.declaration.shape = shape_in_gguf(tensor, view.shape);
      entry.declaration.type = type_of(entry.declaration, entry.pieces.front().linear, view.dtype);
      entry.change = gguf_values(tensor, graph.config.delta_net.has_value());
      made.entries.push_back(std::move(entry));
    }
  }
  for (const auto& [stack, experts] : stacks) {
    GgufEntry entry;
    entry.declaration.name = stack;
    const TensorView& first = source.tensors().tensors().at(experts.begin()->second);
    entry.declaration.shape = {
        static_cast<std::int64_t>(experts.size()), first.shape.at(0), first.shape.at(1)};
    for (const auto& [expert, tensor] : experts) {
      entry.pieces.push_back({tensor, planned(tensor), {}, {}});
      require_alike(entry.pieces.front(), entry.pieces.back());
    }
    entry.declaration.type = type_of(entry.declaration, entry.pieces.front().linear, first.dtype);
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
