// SPDX-License-Identifier: Apache-2.0
#include "base/units.h"
#include "cli/verb.h"
#include "format/checkpoint.h"
#include "model/graph.h"
#include "nn/weights.h"
#include "pipeline/manifest.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>

namespace quern {
namespace {

Json hazard(const char* id, const char* severity, Json facts, const std::string& advice) {
  return {{"id", id}, {"severity", severity}, {"facts", std::move(facts)}, {"advice", advice}};
}

double largest_of(const TensorView& view) {
  double largest = 0;
  for (const float value : to_float(view)) {
    largest = std::max(largest, std::fabs(static_cast<double>(value)));
  }
  return largest;
}

// Bytes of the tensors MODULE.*, quantized or not.
std::uint64_t module_bytes(const TensorStore& store, const std::string& module) {
  std::uint64_t total = 0;
  for (const auto& [name, view] : store.tensors()) {
    if (name.starts_with(module + ".")) {
      total += view.bytes.size();
    }
  }
  return total;
}

// What makes this model hard to quantize, from configuration and tensors alone.
Json hazards(const ModelGraph& graph, const Checkpoint& checkpoint, std::uint64_t total_bytes) {
  const TensorStore& store = checkpoint.tensors();
  const ModelConfig& config = graph.config;
  Json found = Json::array();
  const std::uint64_t embedding_bytes = module_bytes(store, graph.embedding.module);
  const double share = static_cast<double>(embedding_bytes) / static_cast<double>(total_bytes);
  found.push_back(hazard(
      "vocabulary",
      share > 0.15 ? "high" : "low",
      {{"vocab_size", config.vocab_size},
       {"embedding_bytes", embedding_bytes},
       {"share_of_file", share}},
      "embedding and head stay in 16 bits; compare sizes by the whole file"));
  Json biases = Json::array();
  double largest_bias = 0;
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      if (linear.has_bias) {
        largest_bias = std::max(
            largest_bias,
            largest_of(store.require(linear.module + ".bias", {linear.out_features})));
        biases.push_back(linear.module);
      }
    }
  }
  if (!biases.empty()) {
    found.push_back(hazard(
        "qkv_bias",
        largest_bias > 10 ? "high" : "medium",
        {{"linears", biases.size()}, {"largest", largest_bias}},
        "biases are kept in the source's type and are part of every layer output"));
  }
  if (graph.head_tied) {
    const bool duplicate = store.find("lm_head.weight") != nullptr;
    found.push_back(hazard(
        "tied_embeddings",
        "medium",
        {{"tensor", graph.embedding.weight()}, {"duplicate_head_in_file", duplicate}},
        "one table serves two purposes: the stricter of two demands decides its width"));
  }
  return found;
}

int run_inspect(Session& session, const std::string& model_text) {
  const auto checkpoint = open_checkpoint(resolve_model(model_text));
  const ModelGraph graph = build_graph(checkpoint->config(), checkpoint->config_place());
  check_tensors(graph, *checkpoint);
  const ModelConfig& config = graph.config;
  const std::uint64_t bytes = tensor_bytes(*checkpoint);
  const std::int64_t parameters = parameters_of(graph);
  Json layers = Json::array();
  for (const Block& block : graph.blocks) {
    layers.push_back(
        {{"index", block.index},
         {"mixer", "attention"},
         {"feed_forward", "mlp"},
         {"experts", 0},
         {"sliding_window", block.sliding_window}});
  }
  Json risks = hazards(graph, *checkpoint, bytes);
  std::string text = fmt::format(
      "architecture  {} ({})\nparameters    {:.2f} M in {} tensors, {}\nlayers        {}: hidden "
      "{}, {} heads of {} on {} kv heads, mlp {}\nvocabulary    {}{}\nstored as     {}\n\n",
      config.architecture,
      config.family,
      static_cast<double>(parameters) / 1e6,
      checkpoint->tensors().tensors().size(),
      human_bytes(static_cast<double>(bytes)),
      config.layers,
      config.hidden_size,
      config.heads,
      config.head_dim,
      config.kv_heads,
      config.intermediate_size,
      config.vocab_size,
      graph.head_tied ? ", tied" : "",
      checkpoint->format());
  for (const Json& risk : risks) {
    text += fmt::format(
        "{:<16} {:<7} {}\n{:<24} {}\n",
        risk["id"].get<std::string>(),
        risk["severity"].get<std::string>(),
        risk["facts"].dump(),
        "",
        risk["advice"].get<std::string>());
  }
  session.print_json(
      {{"schema", "quern.inspect/1"},
       {"model", model_text},
       {"architecture", config.architecture},
       {"family", config.family},
       {"format", checkpoint->format()},
       {"parameters", parameters},
       {"tensors", checkpoint->tensors().tensors().size()},
       {"bytes", bytes},
       {"layers", std::move(layers)},
       {"hazards", std::move(risks)}});
  session.print_text(text);
  return 0;
}

}  // namespace

std::function<int(Session&)> configure_inspect(CLI::App& app) {
  auto model = std::make_shared<std::string>();
  app.add_option("MODEL", *model, "checkpoint directory, or a .gguf file")->required();
  add_footer(app, "  quern inspect ./model\n  quern inspect ./model --json\n");
  return [model](Session& session) { return run_inspect(session, *model); };
}

}  // namespace quern
