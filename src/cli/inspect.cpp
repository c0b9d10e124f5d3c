// SPDX-License-Identifier: Apache-2.0
#include "base/units.h"
#include "cli/verb.h"
#include "format/checkpoint.h"
#include "model/graph.h"
#include "pipeline/hazards.h"
#include "pipeline/manifest.h"

#include <fmt/format.h>

#include <memory>

namespace quern {
namespace {

int run_inspect(Session& session, const std::string& model_text) {
  const auto checkpoint = open_checkpoint(resolve_model(model_text));
  const ModelGraph graph = build_graph(*checkpoint);
  check_tensors(graph, *checkpoint);
  const ModelConfig& config = graph.config;
  const std::uint64_t bytes = tensor_bytes(*checkpoint);
  const std::int64_t parameters = parameters_of(graph);
  Json layers = Json::array();
  for (const Block& block : graph.blocks) {
    layers.push_back(
        {{"index", block.index},
         {"mixer", block.delta_net ? "delta_net" : "attention"},
         {"feed_forward", block.mixture ? "mixture" : "mlp"},
         {"experts", block.mixture ? block.mixture->experts : 0},
         {"sliding_window", block.sliding_window}});
  }
  Json risks = model_hazards(*checkpoint, graph);
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
