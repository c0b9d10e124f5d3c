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

// A way to store a linear that a plan was chosen from.
struct PlanOption {
  std::string method;  // "keep": the floats, and no scheme
  QuantScheme scheme;
  std::uint64_t bytes = 0;  // of the tensors that replace the weight
  double loss = 0;  // predicted increase of the mean KL divergence, nats per token

  [[nodiscard]] bool keep() const { return method == "keep"; }
};

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
  // Of a plan that was made for a budget: nats per token that this linear alone would lose at
  // kSensitivityBits, and all that it could have become.
  std::optional<double> sensitivity;
  std::vector<PlanOption> options;

  [[nodiscard]] bool is_table() const { return role == Role::kEmbedding || role == Role::kHead; }
  [[nodiscard]] bool keep() const { return method == "keep"; }
};

inline constexpr int kSensitivityBits = 4;

// Linear -> scheme, method, reason: what `plan` writes, `quantize` obeys, a person can edit. In the
// order of the graph, the tables over the vocabulary last.
struct QuantPlan {
  std::string transform;  // of quant/scaling.h, at every site; empty: none
  std::vector<PlannedLinear> linears;

  [[nodiscard]] const PlannedLinear* find(const std::string& name) const;
};

// The option that `linear` has become; null when it is none of them.
[[nodiscard]] const PlanOption* chosen_option(const PlannedLinear& linear);

// The sum of the losses of what the linears have become; nothing when the plan does not know it of
// all that are not kept.
[[nodiscard]] std::optional<double> predicted_loss(const QuantPlan& plan);

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

// Keeps the floats of everything but the routed experts. Throws UsageError when there are none.
void keep_all_but_experts(const ModelGraph& graph, QuantPlan& plan);

inline constexpr const char* kPlanSchema = "quern.plan/1";

// The `linears` of a plan document; throws ParseError, naming the entry, for values out of range,
// for names that the graph does not have or that stand twice, and for linears of the graph that are
// missing.
[[nodiscard]] QuantPlan read_plan(
    const Json& document, const std::string& where, const ModelGraph& graph);
[[nodiscard]] Json plan_linears_json(const QuantPlan& plan);

[[nodiscard]] std::string scheme_text(const QuantScheme& scheme);  // "4 bits, group 128, symmetric"

// Why a linear became what it is: its reason, and a table of its options. For people.
[[nodiscard]] std::string explain(const PlannedLinear& linear);

}  // namespace quern
