// SPDX-License-Identifier: Apache-2.0
#include "pipeline/verify.h"

#include "base/error.h"
#include "base/file.h"
#include "format/gguf_names.h"
#include "model/graph.h"
#include "pipeline/difference.h"
#include "pipeline/export.h"
#include "pipeline/gguf_plan.h"
#include "pipeline/manifest.h"
#include "pipeline/output.h"
#include "quant/packed_linear.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

namespace quern {
namespace {

struct Comparison {
  std::int64_t unchanged = 0;
  std::int64_t quantized = 0;
  double worst_error = 0;  // |W - Q| / |W| of the worst linear
  std::string worst_linear;
};

// Hashes of the manifest against the files.
std::int64_t check_hashes(const Checkpoint& checkpoint, Json& problems) {
  const std::filesystem::path path = checkpoint.directory() / kManifestName;
  if (!std::filesystem::exists(path)) {
    return 0;
  }
  const Json manifest = read_json(path);
  std::int64_t checked = 0;
  for (const Json& entry : JsonReader(manifest, path.string()).get_array("files")) {
    const JsonReader file(entry, path.string());
    const std::filesystem::path name = std::filesystem::path(file.get_string("name")).filename();
    std::error_code code;
    const auto size = std::filesystem::file_size(checkpoint.directory() / name, code);
    if (code || size != static_cast<std::uint64_t>(file.get_int("size"))) {
      problems.push_back(fmt::format(
          "{}: {} bytes expected, found {}",
          name.string(),
          file.get_int("size"),
          code ? "none" : std::to_string(size)));
    } else if (sha256_of_file(checkpoint.directory() / name) != file.get_string("sha256")) {
      problems.push_back(
          fmt::format("{}: its SHA-256 is not the one of the manifest", name.string()));
    } else {
      ++checked;
    }
  }
  return checked;
}

void compare_linear(
    const Context& ctx,
    const Checkpoint& checkpoint,
    const std::string& module,
    const TensorView& original,
    Comparison& comparison,
    Json& problems) {
  const StoredLinear stored =
      checkpoint.load_linear(module, original.shape.at(0), original.shape.at(1));
  StoredLinear dense;
  dense.dense = original;
  const Linear linear{module, Role::kQuery, original.shape[0], original.shape[1], false};
  const MatrixDifference difference = matrix_difference(ctx, dense, stored, linear);
  ++comparison.quantized;
  if (!difference.finite) {
    problems.push_back(module + ": dequantizes to values that are not finite");
    return;
  }
  if (difference.relative > comparison.worst_error) {
    comparison.worst_error = difference.relative;
    comparison.worst_linear = module;
  }
  // Even 2-bit rounding stays below the norm of the weights; more is another matrix.
  if (difference.relative > 1) {
    problems.push_back(fmt::format(
        "{}: differs from the original by {:.2f} times its norm", module, difference.relative));
  }
}

// The same values; GGUF keeps norms and biases in F32.
bool same_tensor(const TensorView& copy, const TensorView& original) {
  if (copy.shape != original.shape) {
    return false;
  }
  if (copy.dtype == original.dtype) {
    return std::equal(
        copy.bytes.begin(), copy.bytes.end(), original.bytes.begin(), original.bytes.end());
  }
  return is_16_or_32_bit_float(copy.dtype) && is_16_or_32_bit_float(original.dtype) &&
         to_float(copy) == to_float(original);
}

// Whether a checkpoint in floats holds the values of a quantized one (`quern export --format
// dense`).
bool is_dense_export(const Checkpoint& checkpoint) {
  try {
    const Json manifest = read_json(checkpoint.directory() / kManifestName);
    return manifest.value("schema", "") == kExportSchema && checkpoint.format() == "dense";
  } catch (const Error&) {
    return false;
  } catch (const Json::exception&) {
    return false;  // not an object
  }
}

Comparison compare(
    const Context& ctx,
    const ModelGraph& graph,
    const Checkpoint& checkpoint,
    const Checkpoint& source,
    Json& problems) {
  Comparison comparison;
  const bool dense_export = is_dense_export(checkpoint);
  const TensorStore& written = checkpoint.tensors();
  const bool is_gguf = checkpoint.format() == "gguf";
  for (const auto& entry : source.tensors().tensors()) {
    if (is_gguf && left_out_of_gguf(entry.first) != nullptr) {
      continue;
    }
    const std::string name = is_gguf ? without_multimodal_prefix(entry.first) : entry.first;
    const TensorView view = *source.tensors().find(entry.first);
    const TensorView* copy = written.find(name);
    const std::string module = name.substr(0, name.rfind('.'));
    if (copy != nullptr) {
      if (same_tensor(*copy, view) || (is_gguf && copy->shape == view.shape &&
                                       same_but_for_gguf(
                                           gguf_values(name, graph.config.delta_net.has_value()),
                                           to_float(*copy),
                                           to_float(view)))) {
        ++comparison.unchanged;
      } else if (dense_export && view.shape.size() == 2 && copy->shape == view.shape) {
        compare_linear(ctx, checkpoint, module, view, comparison, problems);
      } else {
        problems.push_back(name + ": differs from the original");
      }
      written.release(*copy);
    } else if (
        name.ends_with(".weight") && view.shape.size() == 2 && checkpoint.is_quantized(module)) {
      compare_linear(ctx, checkpoint, module, view, comparison, problems);
    } else if (
        name == "lm_head.weight" && graph.head_tied &&
        checkpoint.is_quantized(graph.embedding.module)) {
      // The copy of a tied table that some originals hold: the quantized one stands for both.
      compare_linear(ctx, checkpoint, graph.embedding.module, view, comparison, problems);
    } else {
      problems.push_back(name + ": is in the original and not here");
    }
    source.tensors().release(view);
  }
  return comparison;
}

EngineSplit split_of(Role role) {
  switch (role) {
    case Role::kKey:
    case Role::kValue: return EngineSplit::kKeyValueHeads;
    case Role::kOutput:
    case Role::kDown: return EngineSplit::kInputs;
    case Role::kEmbedding:
    case Role::kHead: return EngineSplit::kNone;  // engines pad the vocabulary
    case Role::kRouter:
    case Role::kSharedGate: return EngineSplit::kNone;  // every device has them
    default: return EngineSplit::kOutputs;
  }
}

EngineKind kind_of(const Linear& linear) {
  switch (linear.role) {
    case Role::kEmbedding: return EngineKind::kEmbedding;
    case Role::kHead: return EngineKind::kHead;
    case Role::kRouter:
    case Role::kSharedGate: return EngineKind::kGate;
    default: return EngineKind::kLinear;
  }
}

// What configurations must not claim although it is no part of the graph.
std::vector<EngineModule> engine_modules_beside(
    const Checkpoint& checkpoint, const ModelGraph& graph) {
  std::vector<EngineModule> modules;
  for (const std::string& name : modules_beside(graph, checkpoint.tensors())) {
    EngineModule module;
    module.name = name;
    module.kind = EngineKind::kBeside;
    module.split = EngineSplit::kNone;
    modules.push_back(std::move(module));
  }
  return modules;
}

EngineModule engine_module(const Checkpoint& checkpoint, const Linear& linear) {
  EngineModule module;
  module.name = linear.module;
  module.out_features = linear.out_features;
  module.in_features = linear.in_features;
  module.kind = kind_of(linear);
  module.split = split_of(linear.role);
  if (checkpoint.is_quantized(linear.module)) {
    const StoredLinear stored =
        checkpoint.load_linear(linear.module, linear.out_features, linear.in_features);
    if (const auto* packed = dynamic_cast<const PackedLinear*>(stored.quantized.get())) {
      module.scheme = packed->scheme;
      module.scale_dtype = packed->scale_dtype;
      module.act_order = !packed->group_index.empty();
    }
    if (stored.activation) {
      module.activation = *stored.activation;
    }
  }
  return module;
}

// Every engine's verdict; those against `named` become problems.
Json engines_json(const EngineModel& model, const std::string& named, Json& problems) {
  Json list = Json::array();
  for (const Engine& engine : engines()) {
    const EngineVerdict verdict = judge(engine, model);
    if (!named.empty() && named != engine.name) {
      continue;
    }
    list.push_back(
        {{"engine", verdict.engine},
         {"version", verdict.version},
         {"loads", verdict.problems.empty()},
         {"problems", verdict.problems},
         {"notes", verdict.notes}});
    if (named == engine.name) {
      for (const std::string& problem : verdict.problems) {
        problems.push_back(fmt::format("{} does not load it: {}", engine.name, problem));
      }
    }
  }
  return list;
}

}  // namespace

EngineModel engine_model(const Checkpoint& checkpoint, const ModelGraph& graph) {
  EngineModel model;
  model.format = checkpoint.format();
  model.family = graph.config.family;
  model.dtype = graph.config.dtype;
  model.tied = graph.head_tied;
  model.heads = graph.config.heads;
  model.kv_heads = graph.config.kv_heads;
  model.multimodal = graph.config.architecture.ends_with("ForConditionalGeneration");
  if (graph.config.mixture) {
    model.experts = graph.config.mixture->experts;
  }
  if (graph.config.delta_net) {
    model.delta_net = {graph.config.delta_net->key_heads, graph.config.delta_net->value_heads};
  }
  if (checkpoint.config().contains("quantization_config")) {
    model.quantization = checkpoint.config()["quantization_config"];
    model.says_desc_act = model.quantization.value("desc_act", Json(false)) == true;
  }
  model.modules.push_back(engine_module(checkpoint, graph.embedding));
  for (const Block& block : graph.blocks) {
    for (int i = 0; i < static_cast<int>(block.linears.size()); ++i) {
      model.modules.push_back(
          engine_module(checkpoint, block.linears[static_cast<std::size_t>(i)]));
      if (block.mixture && i >= block.mixture->first_expert) {
        model.modules.back().kind = EngineKind::kExpert;
      }
    }
  }
  if (!graph.head_tied) {
    model.modules.push_back(engine_module(checkpoint, graph.head));
  }
  for (EngineModule& module : engine_modules_beside(checkpoint, graph)) {
    model.modules.push_back(std::move(module));
  }
  return model;
}

Json verify_checkpoint(
    const Context& ctx,
    const Checkpoint& checkpoint,
    const Checkpoint* source,
    const std::string& engine) {
  if (!engine.empty()) {
    (void)find_engine(engine);
  }
  Json problems = Json::array();
  const ModelGraph graph = build_graph(checkpoint);
  check_tensors(graph, checkpoint);
  const EngineModel seen = engine_model(checkpoint, graph);
  std::int64_t quantized = 0;
  for (const EngineModule& module : seen.modules) {
    quantized += checkpoint.is_quantized(module.name) ? 1 : 0;
  }
  for (const auto& [name, view] : checkpoint.tensors().tensors()) {
    if (is_16_or_32_bit_float(view.dtype)) {
      const std::vector<float> values = to_float(view);
      if (!std::all_of(
              values.begin(), values.end(), [](float value) { return std::isfinite(value); })) {
        problems.push_back(name + ": holds values that are not finite");
      }
      checkpoint.tensors().release(view);
    }
  }
  const std::int64_t hashes = check_hashes(checkpoint, problems);
  Json document = {
      {"schema", "quern.verify/1"},
      {"model", checkpoint.directory().string()},
      {"format", checkpoint.format()},
      {"tensors", checkpoint.tensors().tensors().size()},
      {"quantized_linears", quantized},
      {"hashes_checked", hashes}};
  if (source != nullptr) {
    const Comparison comparison = compare(ctx, graph, checkpoint, *source, problems);
    document["against"] = {
        {"model", source->directory().string()},
        {"unchanged_tensors", comparison.unchanged},
        {"quantized_linears", comparison.quantized},
        {"largest_relative_difference", comparison.worst_error},
        {"largest_in", comparison.worst_linear}};
  }
  document["engines"] = engines_json(seen, engine, problems);
  document["largest_tensor_parallel"] = largest_tensor_parallel(seen);
  document["problems"] = std::move(problems);
  return document;
}

}  // namespace quern
