// SPDX-License-Identifier: Apache-2.0
#include "plan/quant_plan.h"

#include "base/error.h"
#include "quant/activation.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>
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

void read_entry(const JsonReader& reader, PlannedLinear& entry) {
  entry.method = reader.get_string("method");
  entry.reason = reader.get_string_or("reason", "");
  if (entry.keep()) {
    return;
  }
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
    entry.scheme = ggml_scheme(*type);
    return;
  }
  entry.scheme.bits = static_cast<int>(reader.get_int_in("bits", 1, 8));
  entry.scheme.group_size = reader.get_int_in("group_size", -1, 1 << 20);
  if (entry.scheme.group_size < 0) {
    entry.scheme.group_size = 0;
  }
  entry.scheme.symmetric = reader.get_bool_or("symmetric", true);
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

}  // namespace

const PlannedLinear* QuantPlan::find(const std::string& name) const {
  for (const PlannedLinear& linear : linears) {
    if (linear.name == name) {
      return &linear;
    }
  }
  return nullptr;
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
      entry.method = method;
      entry.scheme = scheme;
      entry.reason = "uniform";
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
  QuantPlan plan;
  plan.transform = reader.get_string_or("transform", "");
  const auto take = [&](const Linear& linear, std::int64_t layer, bool required) {
    PlannedLinear entry = planned(linear, layer);
    const auto found = entries.find(linear.module);
    if (found != entries.end()) {
      read_entry(JsonReader(*found->second, where + ": " + linear.module), entry);
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
      row["bits"] = linear.scheme.bits;
      row["group_size"] = linear.scheme.group_size == 0 ? -1 : linear.scheme.group_size;
      row["symmetric"] = linear.scheme.symmetric;
      if (linear.scheme.ggml) {
        row["type"] = ggml_type_info(*linear.scheme.ggml).name;
      }
    }
    if (linear.hot_rows > 0) {
      row["hot_rows"] = linear.hot_rows;
    }
    row["sensitivity"] = nullptr;
    row["reason"] = linear.reason;
    rows.push_back(std::move(row));
  }
  return rows;
}

}  // namespace quern
