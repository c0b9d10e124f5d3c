// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "model/graph.h"
#include "quant/method.h"
#include "quant/scheme.h"

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace quern {

// What is to happen to one linear.
struct PlannedLinear {
  std::string name;
  int layer = 0;
  Role role = Role::kQuery;
  std::int64_t out_features = 0;
  std::int64_t in_features = 0;
  std::string method;  // of quant/method.h, or "keep" to leave it in 16 bits
  QuantScheme scheme;
  // Of an embedding: this many rows at 8 bits, the others as the scheme says; 0: all alike.
  std::int64_t hot_rows = 0;
  std::optional<RangeSearch> range;  // nothing: as the run's options say
  ActivationScheme activation;  // a static scale is found by calibration
  std::string reason;  // why, for people

  [[nodiscard]] bool is_table() const { return role == Role::kEmbedding || role == Role::kHead; }
  [[nodiscard]] bool keep() const { return method == "keep"; }
};

// Linear -> scheme, method, reason: what `plan` writes, `quantize` obeys, a person can edit. In the
// order of the graph, the tables over the vocabulary last.
struct QuantPlan {
  std::string transform;  // of quant/scaling.h, at every site; empty: none
  std::vector<PlannedLinear> linears;

  [[nodiscard]] const PlannedLinear* find(const std::string& name) const;
};

// What becomes of the tables over the vocabulary. 16 bits: they stay as they are.
struct TableChoice {
  int embedding_bits = 16;
  std::int64_t frequent_tokens = 0;  // rows of the embedding at 8 bits, beside the forced ones
  int head_bits = 16;
};

// Every linear of every block alike. A table that embedding and head share has the bits of the
// stricter of the two, and 6 at least.
[[nodiscard]] QuantPlan uniform_plan(
    const ModelGraph& graph,
    const std::string& method,
    const QuantScheme& scheme,
    const TableChoice& tables);

// The `linears` of a plan document; throws ParseError, naming the entry, for values out of range,
// for names that the graph does not have or that stand twice, and for linears of the graph that are
// missing.
[[nodiscard]] QuantPlan read_plan(
    const Json& document, const std::string& where, const ModelGraph& graph);
[[nodiscard]] Json plan_linears_json(const QuantPlan& plan);

}  // namespace quern
