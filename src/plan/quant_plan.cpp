// SPDX-License-Identifier: Apache-2.0
#include "plan/quant_plan.h"

#include "base/error.h"
#include "quant/activation.h"
#include "quant/method.h"
#include "quant/scaling.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <utility>

namespace quern {
namespace {

constexpr int kLeastTiedBits = 6;  // every row is also an output: its error is in each softmax

PlannedLinear planned(const Linear& linear, std::int64_t layer) {
  PlannedLinear entry;
  entry.name = linear.module;
  entry.layer = static_cast<int>(layer);
  entry.role = linear.role;
  entry.out_features = linear.out_features;
  entry.in_features = linear.in_features;
  return entry;
}

// Routers and the gates of DeltaNet: engines keep them in floats.
bool is_gate(Role role) {
  return role == Role::kRouter || role == Role::kSharedGate || role == Role::kDeltaGates;
}

// A table is symmetric, which is what engines with quantized embeddings take.
QuantScheme table_scheme(const QuantScheme& scheme, int bits, const Linear& table) {
  QuantScheme own = scheme;
  own.bits = bits;
  own.symmetric = true;
  own.group_size =
      scheme.group_size != 0 && table.in_features % scheme.group_size == 0 ? scheme.group_size : 0;
  return own;
}

PlannedLinear planned_embedding(
    const ModelGraph& graph, const QuantScheme& scheme, const TableChoice& tables) {
  PlannedLinear entry = planned(graph.embedding, -1);
  int bits = tables.embedding_bits;
  entry.reason = "asked for";
  if (graph.head_tied && bits < 16) {
    const int stricter = std::max(bits, tables.head_bits < 16 ? tables.head_bits : kLeastTiedBits);
    if (stricter > bits) {
      entry.reason =
          fmt::format("tied: the head needs {} bits, the embedding alone {}", stricter, bits);
    }
    bits = stricter;
  }
  entry.method = bits < 16 ? "rtn" : "keep";
  entry.scheme = table_scheme(scheme, bits, graph.embedding);
  entry.hot_rows = bits < 8 ? tables.frequent_tokens : 0;
  if (bits >= 16) {
    entry.reason = graph.head_tied ? "embedding, tied with the head" : "embedding";
  }
  return entry;
}

QuantScheme read_scheme(const JsonReader& reader) {
  if (reader.has("type")) {
    const std::string name = reader.get_string("type");
    const std::optional<GgmlType> type = ggml_type_from_name(name);
    if (!type || ggml_layout(*type) == nullptr) {
      throw ParseError(
          "a type that quern does not round to",
          reader.place("type"),
          "expected Q4_K or the like, found " + printable(name, 20),
          "see quern quantize --help");
    }
    return ggml_scheme(*type);
  }
  QuantScheme scheme;
  scheme.bits = static_cast<int>(reader.get_int_in("bits", 1, 8));
  scheme.group_size = std::max<std::int64_t>(0, reader.get_int_in("group_size", -1, 1 << 20));
  scheme.symmetric = reader.get_bool_or("symmetric", true);
  return scheme;
}

void put_scheme(const QuantScheme& scheme, Json& row) {
  row["bits"] = scheme.bits;
  row["group_size"] = scheme.group_size == 0 ? -1 : scheme.group_size;
  row["symmetric"] = scheme.symmetric;
  if (scheme.ggml) {
    row["type"] = ggml_type_info(*scheme.ggml).name;
  }
}

void read_options(const JsonReader& reader, PlannedLinear& entry) {
  if (reader.has("sensitivity")) {
    entry.sensitivity = reader.get_number("sensitivity");
  }
  if (!reader.has("options")) {
    return;
  }
  for (const Json& row : reader.get_array("options")) {
    const JsonReader item(row, reader.place("options"));
    PlanOption& option = entry.options.emplace_back();
    option.method = item.get_string("method");
    if (!option.keep()) {
      option.scheme = read_scheme(item);
    }
    option.bytes = static_cast<std::uint64_t>(item.get_int_in("bytes", 0, INT64_MAX));
    option.loss = item.get_number("loss");
  }
}

void read_entry(const JsonReader& reader, PlannedLinear& entry) {
  entry.method = reader.get_string("method");
  entry.reason = reader.get_string_or("reason", "");
  read_options(reader, entry);
  if (entry.keep()) {
    return;
  }
  const Method* method = find_method(entry.method);
  if (method == nullptr) {
    throw ParseError(
        "unknown method",
        reader.place("method"),
        "found \"" + printable(entry.method, 60) + "\"",
        "keep, or a method of quern info");
  }
  entry.scheme = read_scheme(reader);
  if (entry.scheme.ggml) {
    return;
  }
  if (entry.scheme.bits < method->min_bits || entry.scheme.bits > method->max_bits) {
    throw ParseError(
        "a width that the method does not define",
        reader.place("bits"),
        fmt::format(
            "{} takes {} to {} bits, found {}",
            method->name,
            method->min_bits,
            method->max_bits,
            entry.scheme.bits),
        "change the plan, or make it again with quern plan");
  }
  entry.hot_rows = reader.get_int_in_or("hot_rows", 0, entry.out_features, 0);
  if (reader.has("range")) {
    const std::string name = reader.get_string("range");
    entry.range = range_from_name(name);
    if (!entry.range) {
      throw ParseError(
          "an unknown way to find ranges",
          reader.place("range"),
          "found " + printable(name, 20),
          "\"weighted\", or no range at all");
    }
  }
  if (reader.has("activation")) {
    entry.activation = read_activation(reader.get_object("activation"));
  }
}

Json options_json(const PlannedLinear& linear) {
  Json rows = Json::array();
  for (const PlanOption& option : linear.options) {
    Json row = {{"method", option.method}};
    if (!option.keep()) {
      put_scheme(option.scheme, row);
    }
    row["bytes"] = option.bytes;
    row["loss"] = option.loss;
    rows.push_back(std::move(row));
  }
  return rows;
}

}  // namespace

const PlannedLinear* QuantPlan::find(const std::string& name) const {
  for (const PlannedLinear& linear : linears) {
    if (linear.name == name) {
      return &linear;
    }
  }
  return nullptr;
}

const PlanOption* chosen_option(const PlannedLinear& linear) {
  const auto found =
      std::find_if(linear.options.begin(), linear.options.end(), [&](const PlanOption& option) {
        return option.method == linear.method && (option.keep() || option.scheme == linear.scheme);
      });
  return found == linear.options.end() ? nullptr : &*found;
}

std::optional<double> predicted_loss(const QuantPlan& plan) {
  double sum = 0;
  for (const PlannedLinear& linear : plan.linears) {
    if (linear.keep()) {
      continue;
    }
    const PlanOption* chosen = chosen_option(linear);
    if (chosen == nullptr) {
      return std::nullopt;
    }
    sum += chosen->loss;
  }
  return sum;
}

QuantPlan uniform_plan(
    const ModelGraph& graph,
    const std::string& method,
    const QuantScheme& scheme,
    const TableChoice& tables) {
  QuantPlan plan;
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      PlannedLinear entry = planned(linear, block.index);
      entry.method = is_gate(linear.role) ? "keep" : method;
      entry.scheme = scheme;
      entry.reason = is_gate(linear.role) ? "small, and decides where tokens go" : "uniform";
      plan.linears.push_back(std::move(entry));
    }
  }
  plan.linears.push_back(planned_embedding(graph, scheme, tables));
  if (!graph.head_tied) {
    PlannedLinear entry = planned(graph.head, graph.config.layers);
    entry.method = tables.head_bits < 16 ? method : "keep";
    entry.scheme = table_scheme(scheme, tables.head_bits, graph.head);
    entry.reason = tables.head_bits < 16 ? "asked for" : "head: every logit depends on it";
    plan.linears.push_back(std::move(entry));
  }
  return plan;
}

void keep_all_but_experts(const ModelGraph& graph, QuantPlan& plan) {
  std::set<std::string> experts;
  for (const Block& block : graph.blocks) {
    for (std::size_t i = 0; i < block.linears.size(); ++i) {
      if (block.is_expert(static_cast<int>(i))) {
        experts.insert(block.linears[i].module);
      }
    }
  }
  if (experts.empty()) {
    throw UsageError(
        "there are no experts to quantize",
        "family " + graph.config.family,
        "the model is no mixture of experts",
        "--recipe best, or gptq");
  }
  for (PlannedLinear& linear : plan.linears) {
    if (!experts.contains(linear.name)) {
      linear.method = "keep";
      linear.reason = "only the experts are asked for";
    }
  }
}

QuantPlan read_plan(const Json& document, const std::string& where, const ModelGraph& graph) {
  const JsonReader reader(document, where);
  std::map<std::string, const Json*> entries;
  for (const Json& entry : reader.get_array("linears")) {
    const JsonReader item(entry, reader.place("linears"));
    if (!entries.emplace(item.get_string("name"), &entry).second) {
      throw ParseError(
          "a linear stands twice in the plan",
          item.place("name"),
          item.get_string("name"),
          "keep one of the two");
    }
  }
  if (reader.get_string_or("schema", kPlanSchema) != kPlanSchema) {
    throw ParseError(
        "not a plan",
        reader.place("schema"),
        fmt::format("expected {}", kPlanSchema),
        "make one with quern plan");
  }
  QuantPlan plan;
  plan.transform = reader.get_string_or("transform", "");
  plan.transform = plan.transform == "none" ? "" : plan.transform;
  if (!plan.transform.empty() && find_transform(plan.transform) == nullptr) {
    throw ParseError(
        "unknown channel factors",
        reader.place("transform"),
        "found " + printable(plan.transform, 60),
        "none, awq, scale or smoothquant");
  }
  const auto take = [&](const Linear& linear, std::int64_t layer, bool required) {
    PlannedLinear entry = planned(linear, layer);
    const auto found = entries.find(linear.module);
    if (found != entries.end()) {
      const JsonReader item(*found->second, where + ": " + linear.module);
      const Json shape = {linear.out_features, linear.in_features};
      if (item.has("shape") && *item.json().find("shape") != shape) {
        throw ParseError(
            "a plan of another model",
            item.place("shape"),
            "expected " + shape.dump(),
            "make the plan again with quern plan");
      }
      read_entry(item, entry);
      entries.erase(found);
    } else if (required) {
      throw ParseError(
          "the plan lacks a linear",
          where,
          linear.module + " is in the model",
          "make the plan again with quern plan");
    } else {
      entry.method = "keep";
      entry.reason = "not in the plan";
    }
    plan.linears.push_back(std::move(entry));
  };
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      take(linear, block.index, true);
    }
  }
  take(graph.embedding, -1, false);
  if (!graph.head_tied) {
    take(graph.head, graph.config.layers, false);
  }
  if (!entries.empty()) {
    throw ParseError(
        "the plan names an unknown linear",
        where,
        entries.begin()->first + " is not in the model",
        "make the plan again with quern plan");
  }
  return plan;
}

Json plan_linears_json(const QuantPlan& plan) {
  Json rows = Json::array();
  for (const PlannedLinear& linear : plan.linears) {
    Json row = {
        {"name", linear.name},
        {"role", role_name(linear.role)},
        {"shape", {linear.out_features, linear.in_features}},
        {"method", linear.method}};
    if (linear.range && !linear.keep()) {
      row["range"] = range_name(*linear.range);
    }
    if (linear.activation.active() && !linear.keep()) {
      row["activation"] = activation_json(linear.activation);
    }
    if (!linear.keep()) {
      put_scheme(linear.scheme, row);
    }
    if (linear.hot_rows > 0) {
      row["hot_rows"] = linear.hot_rows;
    }
    row["sensitivity"] = linear.sensitivity ? Json(*linear.sensitivity) : Json(nullptr);
    row["reason"] = linear.reason;
    if (!linear.options.empty()) {
      row["options"] = options_json(linear);
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

std::string scheme_text(const QuantScheme& scheme) {
  if (scheme.ggml) {
    return std::string(ggml_type_info(*scheme.ggml).name);
  }
  return fmt::format(
      "{} bits, {}, {}",
      scheme.bits,
      scheme.group_size == 0 ? "channel" : fmt::format("group {}", scheme.group_size),
      scheme.symmetric ? "symmetric" : "asymmetric");
}

std::string explain(const PlannedLinear& linear) {
  std::string text = fmt::format(
      "{}: {}\n",
      linear.name,
      linear.keep() ? "kept in 16 bits" : linear.method + ", " + scheme_text(linear.scheme));
  text += linear.reason.empty() ? "" : linear.reason + "\n";
  const PlanOption* chosen = chosen_option(linear);
  for (const PlanOption& option : linear.options) {
    text += fmt::format(
        "{} {:<34} {:>10} bytes  {:.3e} nats per token\n",
        &option == chosen ? "->" : "  ",
        option.keep() ? "kept" : option.method + ", " + scheme_text(option.scheme),
        option.bytes,
        option.loss);
  }
  return text;
}

}  // namespace quern
