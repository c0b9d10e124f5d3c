// SPDX-License-Identifier: Apache-2.0
#include "pipeline/output.h"

#include "base/error.h"
#include "base/file.h"
#include "format/checkpoint.h"
#include "format/gguf_names.h"
#include "quant/ggml_matrix.h"
#include "quant/mixed_rows.h"
#include "tensor/divided.h"

#include <fmt/format.h>

#include <atomic>
#include <cstring>
#include <map>
#include <set>
#include <utility>

namespace quern {
namespace {

constexpr const char* kWeight = ".weight";

// "M" of "M.weight".
std::string module_of(const std::string& tensor) {
  return tensor.substr(0, tensor.size() - std::string_view(kWeight).size());
}

// Tensor name -> the planned linear that replaces it.
std::map<std::string, const PlannedLinear*> replaced_tensors(const QuantPlan& plan) {
  std::map<std::string, const PlannedLinear*> replaced;
  for (const PlannedLinear& linear : plan.linears) {
    if (!linear.keep()) {
      replaced.emplace(linear.name + kWeight, &linear);
    }
  }
  return replaced;
}

[[noreturn]] void throw_mismatch(const std::string& name, const std::string& found) {
  throw Error(
      ErrorKind::kFailed,
      "the written checkpoint does not read back as it was made",
      name,
      found,
      "check disk and memory, then run the same command again");
}

// The same values in the same dtype; with `widened`, also in a wider one.
bool same_floats(const TensorView& a, const TensorView& b, bool widened) {
  if (a.dtype == b.dtype) {
    return a.bytes.size() == b.bytes.size() &&
           std::memcmp(a.bytes.data(), b.bytes.data(), a.bytes.size()) == 0;
  }
  return widened && to_float(a) == to_float(b);
}

}  // namespace

bool same_values(const Context& ctx, const QuantizedMatrix& a, const QuantizedMatrix& b) {
  std::atomic<bool> same = a.out_features == b.out_features && a.in_features == b.in_features;
  const auto width = static_cast<std::size_t>(a.in_features);
  ctx.pool.for_chunks(
      same ? a.out_features : 0, 16, [&](std::int64_t begin, std::int64_t end, int) {
        std::vector<std::uint8_t> scratch(width);
        std::vector<float> left(width);
        std::vector<float> right(width);
        for (std::int64_t row = begin; row < end && same; ++row) {
          a.dequantize_row(ctx.kernels, row, scratch, left);
          b.dequantize_row(ctx.kernels, row, scratch, right);
          if (left != right) {
            same = false;
          }
        }
      });
  return same;
}

OutputModule output_module(
    const PlannedLinear& linear, const OutputFormat& format, const ModelGraph& graph) {
  OutputModule module;
  module.name = linear.name;
  module.out_features = linear.out_features;
  module.in_features = linear.in_features;
  module.is_embedding = linear.role == Role::kEmbedding;
  module.is_head = linear.name == graph.head.module;
  module.kind = linear.scheme.ggml    ? GgmlMatrix::kKind
                : linear.hot_rows > 0 ? MixedRows::kKind
                : linear.keep()       ? PackedLinear::kKind
                                      : find_method(linear.method)->kind;
  module.hot_rows = linear.hot_rows;
  if (!linear.keep()) {
    module.activation = linear.activation;
    module.scheme = linear.scheme;
    module.scale_dtype = format.storage(graph.config.dtype, module).scale_dtype;
  }
  return module;
}

std::vector<TensorDeclaration> declare_output(const PreparedRun& run) {
  const auto replaced = replaced_tensors(run.plan);
  std::vector<TensorDeclaration> declarations;
  for (const auto& [name, view] : run.source->tensors().tensors()) {
    const auto found = replaced.find(name);
    if (is_dropped(run, name)) {
      continue;
    }
    if (found == replaced.end()) {
      declarations.push_back({name, view.dtype, view.shape});
      continue;
    }
    for (TensorDeclaration& part :
         run.format->declare(output_module(*found->second, *run.format, run.graph))) {
      declarations.push_back(std::move(part));
    }
  }
  return declarations;
}

std::vector<std::string> modules_beside(const ModelGraph& graph, const TensorStore& store) {
  constexpr std::string_view kFinalNorm = "norm.weight";
  const std::string& last = graph.final_norm.tensor;
  const std::string prefix = last.substr(0, last.size() - kFinalNorm.size());
  const auto is_decoder = [&](std::string_view name) {
    if (!name.starts_with(prefix)) {
      return name.starts_with("lm_head.");
    }
    name.remove_prefix(prefix.size());
    return name.starts_with("layers.") || name.starts_with("embed_tokens.") ||
           name.starts_with(kFinalNorm);
  };
  std::vector<std::string> modules;
  for (const auto& [name, view] : store.tensors()) {
    if (view.shape.size() == 2 && is_16_or_32_bit_float(view.dtype) && name.ends_with(kWeight) &&
        !is_decoder(name)) {
      modules.push_back(module_of(name));
    }
  }
  return modules;
}

std::vector<OutputModule> modules_in_floats(const ModelGraph& graph, const TensorStore& store) {
  std::vector<std::string> names = modules_beside(graph, store);
  for (const Block& block : graph.blocks) {
    if (block.delta_net) {
      names.push_back(module_of(block.delta_net->convolution));
    }
  }
  std::vector<OutputModule> modules(names.size());
  for (std::size_t i = 0; i < names.size(); ++i) {
    modules[i].name = names[i];
  }
  return modules;
}

Json output_config(const PreparedRun& run, const Json& meta) {
  std::vector<OutputModule> modules;
  const QuantScheme* common = nullptr;
  for (const PlannedLinear& linear : run.plan.linears) {
    if (linear.is_table() && linear.keep()) {
      continue;  // formats do not count an unquantized table as an exception
    }
    modules.push_back(output_module(linear, *run.format, run.graph));
    if (!linear.keep() && !linear.is_table() && common == nullptr) {
      common = &linear.scheme;
    }
  }
  for (OutputModule& module : modules_in_floats(run.graph, run.source->tensors())) {
    modules.push_back(std::move(module));
  }
  return run.format->config(common != nullptr ? *common : QuantScheme{}, modules, meta);
}

bool unties_table(const PreparedRun& run) {
  const PlannedLinear* table = run.plan.find(run.graph.embedding.module);
  return run.format->unties_tables && run.graph.head_tied && table != nullptr && !table->keep();
}

bool is_dropped(const PreparedRun& run, const std::string& name) {
  const PlannedLinear* table = run.plan.find(run.graph.embedding.module);
  return run.head_is_copy && name == std::string(kUntiedHead) + kWeight && table != nullptr &&
         !table->keep();
}

std::string untied_text(const std::string& table, std::string_view format) {
  return fmt::format(
      "{} is untied from the head: {} cannot tie a packed table, so it is written twice",
      table,
      format);
}

Json untied_config(Json config) {
  constexpr const char* kTied = "tie_word_embeddings";
  config[kTied] = false;
  if (config.contains("text_config") && config["text_config"].contains(kTied)) {
    config["text_config"][kTied] = false;
  }
  return config;
}

std::int64_t tensors_in_files(const TensorStore& store) {
  auto count = static_cast<std::int64_t>(store.tensors().size());
  for (const auto& [name, parts] : divided_tensors(store)) {
    count += 1 - parts;
  }
  return count;
}

void write_configs(
    const Json& source,
    const Json& quantization,
    std::string_view config_file,
    const std::filesystem::path& directory) {
  Json config = source;
  config.erase("quantization_config");
  if (config.contains("text_config") && config["text_config"].is_object()) {
    config["text_config"].erase("quantization_config");  // some multimodal models keep it there
  }
  if (!quantization.is_null()) {
    config["quantization_config"] = quantization;
  }
  if (!config_file.empty()) {
    write_file(directory / config_file, quantization.dump(2) + "\n");
  }
  write_file(directory / "config.json", config.dump(2) + "\n");
}

void write_output(
    const PreparedRun& run,
    const PartSource& parts,
    const Json& meta,
    const std::filesystem::path& directory) {
  SafetensorsWriter writer(directory, run.layout);
  const auto replaced = replaced_tensors(run.plan);
  const TensorStore& store = run.source->tensors();
  std::set<std::string> changed;
  for (const std::string& part : all_parts(run.graph)) {
    const QuantizedBlock done = parts(part);
    for (const ReplacedTensor& tensor : done.tensors) {
      writer.write(tensor.name, tensor.bytes);
      changed.insert(tensor.name);
    }
    for (const QuantizedLinear& linear : done.linears) {
      const OutputModule module = output_module(*linear.plan, *run.format, run.graph);
      const auto declarations = run.format->declare(module);
      const auto tensors = run.format->pack(*linear.matrix, module);
      for (std::size_t i = 0; i < declarations.size(); ++i) {
        writer.write(declarations[i].name, tensors[i]);
      }
    }
  }
  for (const auto& [name, view] : store.tensors()) {
    if (!replaced.contains(name) && !changed.contains(name) && !is_dropped(run, name)) {
      const TensorView made = *store.find(name);
      writer.write(name, made.bytes);
      store.release(made);
    }
  }
  writer.finish();
  const Json& config = run.source->config();
  write_configs(
      unties_table(run) ? untied_config(config) : config,
      output_config(run, meta),
      run.format->config_file,
      directory);
}

namespace {

// Why the output does not hold a tensor; null when it does.
const std::string* reason_left_out(const PreparedRun& run, const std::string& name) {
  if (run.gguf) {
    for (const GgufSkipped& skipped : run.gguf->skipped) {
      if (skipped.source == name) {
        return &skipped.reason;
      }
    }
  }
  return nullptr;
}

// Whether the output holds these floats under this name.
bool is_written(
    const Context& ctx,
    const Checkpoint& written,
    const std::string& name,
    const TensorView& wanted,
    const PreparedRun& run) {
  const TensorStore& store = written.tensors();
  if (const TensorView* copy = store.find(name)) {
    const GgufValues change =
        run.gguf ? gguf_values(name, run.graph.config.delta_net.has_value()) : GgufValues::kSame;
    const bool same = copy->shape == wanted.shape &&
                      (change == GgufValues::kSame
                           ? same_floats(*copy, wanted, run.gguf.has_value())
                           : same_but_for_gguf(change, to_float(*copy), to_float(wanted)));
    store.release(*copy);
    return same;
  }
  // Floats that stand in another form: rows of two tensors of a GGUF file.
  if (!name.ends_with(kWeight) || !written.is_quantized(module_of(name)) ||
      wanted.shape.size() != 2) {
    return false;
  }
  const StoredLinear stored =
      written.load_linear(module_of(name), wanted.shape[0], wanted.shape[1]);
  return stored.quantized->dequantize(ctx.kernels) == to_float(wanted);
}

}  // namespace

Census verify_output(
    const Context& ctx,
    const PreparedRun& run,
    const PartSource& parts,
    const std::filesystem::path& result) {
  const auto written = open_checkpoint(result);
  const auto replaced = replaced_tensors(run.plan);
  Census census;
  const TensorStore& store = run.source->tensors();
  std::map<std::string, std::vector<std::byte>> changed;
  for (const std::string& part : all_parts(run.graph)) {
    QuantizedBlock done = parts(part);
    for (ReplacedTensor& tensor : done.tensors) {
      changed.emplace(tensor.name, std::move(tensor.bytes));
    }
  }
  census.in = tensors_in_files(store);
  census.divided = divided_tensors(store);
  for (const auto& [name, view] : store.tensors()) {
    if (replaced.contains(name) || is_dropped(run, name)) {
      continue;
    }
    if (run.gguf && run.graph.head_tied && name == "lm_head.weight") {
      continue;  // a copy of the embedding, which GGUF readers use for both
    }
    if (const std::string* reason = reason_left_out(run, name)) {
      census.skipped.push_back({name, *reason});
      continue;
    }
    const TensorView original = *store.find(name);
    const auto other = changed.find(name);
    const std::span<const std::byte> wanted =
        other == changed.end() ? original.bytes : std::span<const std::byte>(other->second);
    const std::string stored = run.gguf ? without_multimodal_prefix(name) : name;
    if (!is_written(ctx, *written, stored, {view.dtype, view.shape, wanted}, run)) {
      throw_mismatch(name, "differs from what was to be written");
    }
    store.release(original);
  }
  census.out = tensors_in_files(written->tensors());
  census.merged = divided_tensors(written->tensors());
  if (!run.gguf && census.out != static_cast<std::int64_t>(run.declarations.size())) {
    throw_mismatch(
        "tensor census",
        fmt::format("expected {} tensors, found {}", run.declarations.size(), census.out));
  }
  std::size_t seen = 0;
  for (const std::string& part : all_parts(run.graph)) {
    const QuantizedBlock done = parts(part);
    for (const QuantizedLinear& linear : done.linears) {
      ++seen;
      const PlannedLinear& plan = *linear.plan;
      const StoredLinear stored = written->load_linear(
          run.gguf ? without_multimodal_prefix(plan.name) : plan.name,
          plan.out_features,
          plan.in_features);
      if (!stored.quantized || !same_values(ctx, *stored.quantized, *linear.matrix)) {
        throw_mismatch(plan.name, "its values differ from what was rounded");
      }
      if (plan.role == Role::kEmbedding && unties_table(run)) {
        const StoredLinear head =
            written->load_linear(kUntiedHead, plan.out_features, plan.in_features);
        if (!head.quantized || !same_values(ctx, *head.quantized, *linear.matrix)) {
          throw_mismatch(kUntiedHead, "its values differ from what was rounded");
        }
      }
      if ((stored.activation ? *stored.activation : ActivationScheme()) != linear.activation) {
        throw_mismatch(plan.name, "its inputs are rounded in another way than they were");
      }
    }
  }
  if (seen != replaced.size()) {
    throw_mismatch(
        "tensor census", fmt::format("{} linears planned, {} written", replaced.size(), seen));
  }
  return census;
}

}  // namespace quern
