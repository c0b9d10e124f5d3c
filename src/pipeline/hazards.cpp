// SPDX-License-Identifier: Apache-2.0
#include "pipeline/hazards.h"

#include "pipeline/difference.h"
#include "pipeline/manifest.h"
#include "quant/mixed_rows.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

namespace quern {
namespace {

// Rows of a down_proj that are looked at: a model of 200 GB is inspected in seconds.
constexpr std::int64_t kInspectedRows = 64;

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

std::string form_of(const Checkpoint& checkpoint, const Linear& linear) {
  return describe_form(
      checkpoint.load_linear(linear.module, linear.out_features, linear.in_features));
}

Json vocabulary(const Checkpoint& checkpoint, const ModelGraph& graph) {
  const std::uint64_t bytes = module_bytes(checkpoint.tensors(), graph.embedding.module);
  const double share = static_cast<double>(bytes) / static_cast<double>(tensor_bytes(checkpoint));
  return hazard(
      "vocabulary",
      share > 0.15 ? "high" : "low",
      {{"vocab_size", graph.config.vocab_size},
       {"embedding_bytes", bytes},
       {"share_of_file", share},
       {"embedding", form_of(checkpoint, graph.embedding)},
       {"head", graph.head_tied ? "the same table" : form_of(checkpoint, graph.head)}},
      "frequent tokens need 8 bits, the tail 4: --embedding-bits mixed in quern's container, 8 in "
      "GGUF and compressed-tensors; GPTQ and AWQ keep 16");
}

Json biases(const Checkpoint& checkpoint, const ModelGraph& graph) {
  std::int64_t count = 0;
  double largest = 0;
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      if (linear.has_bias) {
        largest = std::max(
            largest,
            largest_of(
                checkpoint.tensors().require(linear.module + ".bias", {linear.out_features})));
        ++count;
      }
    }
  }
  return count == 0 ? Json()
                    : hazard(
                          "qkv_bias",
                          largest > 10 ? "high" : "medium",
                          {{"linears", count}, {"largest", largest}},
                          "kept in the source's type in every format; a file without them is "
                          "refused");
}

// Largest |w| over the RMS of evenly spaced rows.
double crest_of(const Linear& linear, const TensorView& weights) {
  const std::int64_t step = std::max<std::int64_t>(
      1, linear.out_features / std::min(linear.out_features, kInspectedRows));
  double largest = 0;
  double squares = 0;
  double count = 0;
  for (std::int64_t row = 0; row < linear.out_features; row += step) {
    for (const float value : to_float(weights.rows(row, row + 1))) {
      largest = std::max(largest, std::fabs(static_cast<double>(value)));
      squares += static_cast<double>(value) * value;
      ++count;
    }
  }
  return squares > 0 ? largest / std::sqrt(squares / count) : 0.0;
}

Json swiglu_outliers(const Checkpoint& checkpoint, const ModelGraph& graph) {
  double worst = 0;
  std::int64_t layer = 0;
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      if (linear.role == Role::kDown && !checkpoint.is_quantized(linear.module)) {
        const StoredLinear stored =
            checkpoint.load_linear(linear.module, linear.out_features, linear.in_features);
        const double crest = crest_of(linear, *stored.dense);
        checkpoint.tensors().release(*stored.dense);
        if (crest > worst) {
          worst = crest;
          layer = block.index;
        }
      }
    }
  }
  return worst == 0 ? Json()
                    : hazard(
                          "swiglu_outliers",
                          worst > 30   ? "high"
                          : worst > 12 ? "medium"
                                       : "low",
                          {{"largest_weight_over_rms", worst}, {"layer", layer}},
                          "ranges of down_proj are searched by what they do to the output; the "
                          "report lists thresholds and gains by layer");
}

Json tied_embeddings(const Checkpoint& checkpoint, const ModelGraph& graph) {
  if (!graph.head_tied) {
    return {};
  }
  return hazard(
      "tied_embeddings",
      "medium",
      {{"tensor", graph.embedding.weight()},
       {"duplicate_head_in_file", checkpoint.tensors().find("lm_head.weight") != nullptr}},
      "one table serves two purposes: the stricter of two demands decides its width");
}

Json draft_layer(const Checkpoint& checkpoint, const ModelGraph& graph) {
  const std::uint64_t bytes = module_bytes(checkpoint.tensors(), "mtp");
  return bytes == 0
             ? Json()
             : hazard(
                   "mtp",
                   "low",
                   {{"bytes", bytes}, {"quern_runs_it", graph.mtp.has_value()}},
                   "it guesses and the model decides, so that an error in it costs speed and "
                   "no quality: quern generate --speculative mtp");
}

Json vision_tower(const Checkpoint& checkpoint) {
  std::uint64_t bytes = 0;
  for (const char* module : {"model.visual", "visual"}) {
    bytes += module_bytes(checkpoint.tensors(), module);
  }
  return bytes == 0 ? Json()
                    : hazard(
                          "vision",
                          "low",
                          {{"bytes", bytes}},
                          "small, and every image goes through it: kept as it is");
}

Json experts(const ModelGraph& graph) {
  std::int64_t layers = 0;
  int count = 0;
  int taken = 0;
  for (const Block& block : graph.blocks) {
    if (block.mixture) {
      ++layers;
      count = block.mixture->experts;
      taken = block.mixture->experts_per_token;
    }
  }
  return layers == 0
             ? Json()
             : hazard(
                   "fused_experts",
                   count >= 64 * taken ? "high" : "medium",
                   {{"layers", layers}, {"experts", count}, {"experts_per_token", taken}},
                   "an expert sees a part of the calibration only: give it many tokens; rare "
                   "experts borrow the rows nearest to their own, and the report counts them");
}

std::string handled_table(const PlannedLinear& table) {
  if (table.keep()) {
    return "keeps its floats";
  }
  if (table.scheme.ggml) {
    return std::string(ggml_type_info(*table.scheme.ggml).name);
  }
  return table.hot_rows > 0 ? fmt::format(
                                  "{} frequent, special and single-byte tokens at {} bits, the "
                                  "others at {}",
                                  table.hot_rows,
                                  MixedRows::kHotBits,
                                  table.scheme.bits)
                            : fmt::format("{} bits", table.scheme.bits);
}

std::string handled(const std::string& id, const ModelGraph& graph, const QuantPlan& plan) {
  const PlannedLinear* table = plan.find(graph.embedding.module);
  const PlannedLinear* head = plan.find(graph.head.module);
  if (id == "vocabulary" || id == "tied_embeddings") {
    const std::string text = table == nullptr ? "keeps its floats" : handled_table(*table);
    if (id == "tied_embeddings") {
      return "one decision for both ends: " + text;
    }
    return graph.head_tied ? text
                           : fmt::format(
                                 "embedding: {}; head: {}",
                                 text,
                                 head == nullptr ? "keeps its floats" : handled_table(*head));
  }
  if (id == "qkv_bias") {
    return "written as they are, in the tensor census, and part of every forward pass and error";
  }
  if (id == "mtp" || id == "vision") {
    return "its tensors are written as they are";
  }
  if (id == "fused_experts") {
    return "each expert rounded on the tokens sent to it; written as matrices of their own";
  }
  return "ranges by the weighted search, beside min-max and MSE below";
}

}  // namespace

Json model_hazards(const Checkpoint& checkpoint, const ModelGraph& graph) {
  Json found = Json::array();
  for (const Json& each :
       {vocabulary(checkpoint, graph),
        biases(checkpoint, graph),
        swiglu_outliers(checkpoint, graph),
        tied_embeddings(checkpoint, graph),
        experts(graph),
        vision_tower(checkpoint),
        draft_layer(checkpoint, graph)}) {
    if (!each.is_null()) {
      found.push_back(each);
    }
  }
  return found;
}

Json run_hazards(const Checkpoint& source, const ModelGraph& graph, const QuantPlan& plan) {
  Json found = model_hazards(source, graph);
  for (Json& each : found) {
    each["handled"] = handled(each["id"].get<std::string>(), graph, plan);
  }
  return found;
}

}  // namespace quern
