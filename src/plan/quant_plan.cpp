// SPDX-License-Identifier: Apache-2.0
#include "plan/quant_plan.h"

#include "base/error.h"

#include <fmt/format.h>

#include <map>
#include <utility>

namespace quern {
namespace {

PlannedLinear planned(const Block& block, const Linear& linear) {
  PlannedLinear entry;
  entry.name = linear.module;
  entry.layer = block.index;
  entry.role = linear.role;
  entry.out_features = linear.out_features;
  entry.in_features = linear.in_features;
  return entry;
}

void read_entry(const JsonReader& reader, PlannedLinear& entry) {
  entry.method = reader.get_string("method");
  entry.reason = reader.get_string_or("reason", "");
  if (entry.keep()) {
    return;
  }
  entry.scheme.bits = static_cast<int>(reader.get_int_in("bits", 1, 8));
  entry.scheme.group_size = reader.get_int_in("group_size", -1, 1 << 20);
  if (entry.scheme.group_size < 0) {
    entry.scheme.group_size = 0;
  }
  entry.scheme.symmetric = reader.get_bool_or("symmetric", true);
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
    const ModelGraph& graph, const std::string& method, const QuantScheme& scheme) {
  QuantPlan plan;
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      PlannedLinear entry = planned(block, linear);
      entry.method = method;
      entry.scheme = scheme;
      entry.reason = "uniform";
      plan.linears.push_back(std::move(entry));
    }
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
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      const auto found = entries.find(linear.module);
      if (found == entries.end()) {
        throw ParseError(
            "the plan lacks a linear",
            where,
            linear.module + " is in the model",
            "make the plan again with quern plan");
      }
      PlannedLinear entry = planned(block, linear);
      read_entry(JsonReader(*found->second, where + ": " + linear.module), entry);
      plan.linears.push_back(std::move(entry));
      entries.erase(found);
    }
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
    if (!linear.keep()) {
      row["bits"] = linear.scheme.bits;
      row["group_size"] = linear.scheme.group_size == 0 ? -1 : linear.scheme.group_size;
      row["symmetric"] = linear.scheme.symmetric;
    }
    row["sensitivity"] = nullptr;
    row["reason"] = linear.reason;
    rows.push_back(std::move(row));
  }
  return rows;
}

}  // namespace quern
