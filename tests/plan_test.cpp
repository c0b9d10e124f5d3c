// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "plan/quant_plan.h"
#include "plan/recipes.h"
#include "quant/method.h"
#include "quant/scaling.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>

namespace quern {
namespace {

ModelGraph small_graph() {
  return build_graph(
      {{"model_type", "qwen3"},
       {"vocab_size", 320},
       {"hidden_size", 64},
       {"num_hidden_layers", 2},
       {"num_attention_heads", 4},
       {"num_key_value_heads", 2},
       {"head_dim", 16},
       {"intermediate_size", 96},
       {"rope_theta", 1e6}},
      "config.json");
}

Json document_of(const QuantPlan& plan) {
  return {{"schema", "quern.plan/1"}, {"linears", plan_linears_json(plan)}};
}

class Plan : public ::testing::Test {
 protected:
  using Edit = std::function<void(Json& linears)>;

  [[nodiscard]] QuantPlan read(const Edit& edit) const {
    Json document = document_of(plan_);
    edit(document["linears"]);
    return read_plan(document, "plan.json", graph_);
  }
  // "" when the edited plan is a ParseError whose text holds `named`.
  [[nodiscard]] std::string fault_of_refusal(const Edit& edit, const std::string& named) const {
    try {
      (void)read(edit);
    } catch (const ParseError& error) {
      const std::string text = error.three_lines();
      return text.find(named) == std::string::npos ? text : "";
    }
    return "accepted";
  }

  ModelGraph graph_ = small_graph();
  QuantPlan plan_ =
      uniform_plan(graph_, "gptq", {.bits = 4, .symmetric = true, .group_size = 32}, {});
};

void expect_equal(const QuantPlan& a, const QuantPlan& b) {
  ASSERT_EQ(a.linears.size(), b.linears.size());
  for (std::size_t i = 0; i < a.linears.size(); ++i) {
    EXPECT_EQ(a.linears[i].name, b.linears[i].name);
    EXPECT_EQ(a.linears[i].layer, b.linears[i].layer);
    EXPECT_EQ(a.linears[i].role, b.linears[i].role);
    EXPECT_EQ(a.linears[i].out_features, b.linears[i].out_features);
    EXPECT_EQ(a.linears[i].in_features, b.linears[i].in_features);
    EXPECT_EQ(a.linears[i].method, b.linears[i].method);
    EXPECT_EQ(a.linears[i].reason, b.linears[i].reason);
    if (!a.linears[i].keep()) {
      EXPECT_EQ(a.linears[i].scheme, b.linears[i].scheme) << a.linears[i].name;
    }
  }
}

TEST_F(Plan, UniformCoversEveryLinearOfEveryBlock) {
  // Seven linears in each of two blocks, then the tables, which stay as they are.
  ASSERT_EQ(plan_.linears.size(), 16U);
  EXPECT_EQ(plan_.linears[0].name, "model.layers.0.self_attn.q_proj");
  EXPECT_EQ(plan_.linears[13].name, "model.layers.1.mlp.down_proj");
  EXPECT_EQ(plan_.linears[13].layer, 1);
  EXPECT_EQ(plan_.linears[13].role, Role::kDown);
  EXPECT_EQ(plan_.linears[13].out_features, 64);
  EXPECT_EQ(plan_.linears[13].in_features, 96);
  for (const PlannedLinear& linear : plan_.linears) {
    EXPECT_EQ(linear.method, linear.is_table() ? "keep" : "gptq");
    EXPECT_EQ(linear.scheme.group_size, 32);
    EXPECT_EQ(plan_.find(linear.name), &linear);
  }
  EXPECT_EQ(plan_.linears[14].role, Role::kEmbedding);
  EXPECT_EQ(plan_.linears[15].name, "lm_head");
  EXPECT_EQ(plan_.find("model.norm"), nullptr);
}

TEST_F(Plan, ATiedTableObeysTheStricterOfItsTwoUses) {
  const QuantScheme scheme = {.bits = 4, .symmetric = false, .group_size = 32};
  ModelGraph tied = graph_;
  tied.head_tied = true;
  tied.head.module = tied.embedding.module;
  const auto embedding = [&](const ModelGraph& graph, const TableChoice& choice) {
    const QuantPlan plan = uniform_plan(graph, "gptq", scheme, choice);
    return *plan.find(graph.embedding.module);
  };
  EXPECT_EQ(embedding(graph_, {4, 1000, 16}).scheme.bits, 4);
  EXPECT_EQ(embedding(graph_, {4, 1000, 16}).hot_rows, 1000);
  EXPECT_TRUE(embedding(graph_, {4, 1000, 16}).scheme.symmetric);
  EXPECT_EQ(embedding(tied, {4, 1000, 16}).scheme.bits, 6);
  EXPECT_EQ(embedding(tied, {4, 1000, 8}).scheme.bits, 8);
  EXPECT_EQ(embedding(tied, {4, 1000, 8}).hot_rows, 0);  // all rows have 8 bits already
  EXPECT_EQ(embedding(tied, {8, 0, 4}).scheme.bits, 8);
  EXPECT_TRUE(embedding(tied, {16, 0, 4}).keep());
}

TEST_F(Plan, JsonRoundTrips) {
  plan_.linears[1].scheme = {.bits = 8, .symmetric = false, .group_size = 0};
  plan_.linears[2].method = "keep";
  plan_.linears[2].reason = "sensitive \"one\"";
  plan_.linears[3].method = "rtn";
  const Json document = document_of(plan_);
  expect_equal(read_plan(document, "plan.json", graph_), plan_);
  // Through text too, and a second time to the same text.
  const Json again = parse_json(document.dump(2), "plan.json");
  EXPECT_EQ(document_of(read_plan(again, "plan.json", graph_)).dump(), document.dump());
  // A whole row is -1 in the file, as in other tools; 0 is read too.
  EXPECT_EQ(document["linears"][1]["group_size"], -1);
  EXPECT_EQ(
      read([](Json& linears) { linears[1]["group_size"] = 0; }).linears[1].scheme.group_size, 0);
  // Kept linears carry no grid.
  EXPECT_FALSE(document["linears"][2].contains("bits"));
}

TEST_F(Plan, EditsAreObeyed) {
  const QuantPlan edited = read([](Json& linears) {
    linears[0]["bits"] = 8;
    linears[4]["method"] = "rtn";
    linears[4]["symmetric"] = false;
    linears[5]["group_size"] = 64;
    linears[6] = {{"name", linears[6]["name"]}, {"method", "keep"}};
    linears[7].erase("reason");
    linears[7].erase("symmetric");
    std::swap(linears[8], linears[13]);  // the order of the file does not matter
  });
  EXPECT_EQ(edited.linears[0].scheme.bits, 8);
  EXPECT_EQ(edited.linears[1].scheme.bits, 4);
  EXPECT_EQ(edited.linears[4].method, "rtn");
  EXPECT_FALSE(edited.linears[4].scheme.symmetric);
  EXPECT_EQ(edited.linears[5].scheme.group_size, 64);
  EXPECT_TRUE(edited.linears[6].keep());
  EXPECT_EQ(edited.linears[7].reason, "");
  EXPECT_TRUE(edited.linears[7].scheme.symmetric);
  EXPECT_EQ(edited.linears[8].name, plan_.linears[8].name);
  EXPECT_EQ(edited.linears[13].name, plan_.linears[13].name);
}

TEST_F(Plan, RangesAndActivationsRoundTrip) {
  plan_.linears[0].range = RangeSearch::kMinMax;
  plan_.linears[1].activation = {.bits = 8};
  plan_.linears[2].activation = {.bits = 4, .dynamic = false};
  const Json document = document_of(plan_);
  const QuantPlan again = read_plan(parse_json(document.dump(), "t"), "plan.json", graph_);
  for (std::size_t i = 0; i < plan_.linears.size(); ++i) {
    EXPECT_EQ(again.linears[i].range, plan_.linears[i].range) << i;
    EXPECT_EQ(again.linears[i].activation, plan_.linears[i].activation) << i;
  }
  EXPECT_FALSE(document["linears"][3].contains("range"));
  EXPECT_FALSE(document["linears"][3].contains("activation"));
  const std::string name = plan_.linears[1].name;
  const auto set = [](const char* key, const Json& value) {
    return [key, value](Json& linears) { linears[1][key] = value; };
  };
  for (const Json& bad : {Json("widest"), Json(3), Json("")}) {
    EXPECT_EQ(fault_of_refusal(set("range", bad), name), "") << bad;
  }
  for (const Json& bad : {Json(8), Json::object(), Json{{"bits", 1}}, Json{{"bits", 32}}}) {
    EXPECT_EQ(fault_of_refusal(set("activation", bad), name), "") << bad;
  }
}

TEST(Recipes, NameWhatThereIs) {
  for (const Recipe& recipe : recipes()) {
    EXPECT_EQ(&find_recipe(recipe.name), &recipe);
    EXPECT_FALSE(recipe.summary.empty());
    const Method* method = find_method(recipe.method);
    ASSERT_NE(method, nullptr) << recipe.name;
    EXPECT_GE(recipe.bits, method->min_bits) << recipe.name;
    EXPECT_LE(recipe.bits, method->max_bits) << recipe.name;
    EXPECT_TRUE(recipe.transform.empty() || find_transform(recipe.transform) != nullptr)
        << recipe.name;
  }
  for (const char* name : {"rtn", "gptq", "gptaq", "awq", "smoothquant", "billm", "best"}) {
    EXPECT_NO_THROW((void)find_recipe(name)) << name;
  }
  EXPECT_THROW((void)find_recipe("magic"), UsageError);
  EXPECT_THROW((void)find_recipe(""), UsageError);
}

TEST(Recipes, ScoresAreNotClipped) {
  EXPECT_EQ(range_for(Role::kQuery, RangeSearch::kOutput), RangeSearch::kMinMax);
  EXPECT_EQ(range_for(Role::kKey, RangeSearch::kOutput), RangeSearch::kMinMax);
  EXPECT_EQ(range_for(Role::kDown, RangeSearch::kOutput), RangeSearch::kOutput);
  EXPECT_EQ(range_for(Role::kQuery, RangeSearch::kWeighted), RangeSearch::kWeighted);
}

TEST_F(Plan, NamesMustBeThoseOfTheModel) {
  const std::string second = plan_.linears[1].name;
  EXPECT_EQ(fault_of_refusal([](Json& linears) { linears[3] = linears[1]; }, second), "");  // twice
  EXPECT_EQ(fault_of_refusal([](Json& linears) { linears.push_back(linears[1]); }, second), "");
  EXPECT_EQ(fault_of_refusal([](Json& linears) { linears.erase(1); }, second), "");  // missing
  EXPECT_EQ(fault_of_refusal([](Json& linears) { linears = Json::array(); }, "q_proj"), "");
  EXPECT_EQ(
      fault_of_refusal(
          [](Json& linears) {
            linears.push_back(linears[1]);
            linears.back()["name"] = "model.layers.2.self_attn.k_proj";
          },
          "model.layers.2.self_attn.k_proj"),
      "");
  EXPECT_EQ(
      fault_of_refusal(
          [](Json& linears) {
            linears.push_back(linears[1]);
            linears.back()["name"] = "lm_head";
          },
          "lm_head"),
      "");
  EXPECT_EQ(fault_of_refusal([](Json& linears) { linears[1].erase("name"); }, "name"), "");
  EXPECT_EQ(fault_of_refusal([](Json& linears) { linears[1]["name"] = 3; }, "name"), "");
}

TEST_F(Plan, ValuesOutOfRangeAreRefusedByName) {
  const std::string name = plan_.linears[1].name;
  const auto set = [](const char* key, const Json& value) {
    return [key, value](Json& linears) { linears[1][key] = value; };
  };
  for (const Json& bad :
       {Json(0), Json(9), Json(-4), Json("4"), Json(4.5), Json(nullptr), Json(INT64_MAX)}) {
    EXPECT_EQ(fault_of_refusal(set("bits", bad), name), "") << bad;
  }
  for (const Json& bad : {Json(-2), Json((1 << 20) + 1), Json("g"), Json(nullptr), Json(0.5)}) {
    EXPECT_EQ(fault_of_refusal(set("group_size", bad), name), "") << bad;
  }
  EXPECT_EQ(fault_of_refusal(set("symmetric", 1), name), "");
  EXPECT_EQ(fault_of_refusal(set("method", 1), name), "");
  EXPECT_EQ(fault_of_refusal(set("method", nullptr), name), "");
  EXPECT_EQ(fault_of_refusal(set("reason", 1), name), "");
  EXPECT_EQ(fault_of_refusal([](Json& linears) { linears[1].erase("bits"); }, name), "");
  EXPECT_EQ(fault_of_refusal([](Json& linears) { linears[1].erase("group_size"); }, name), "");
}

TEST_F(Plan, OtherDocumentsAreRefused) {
  for (const char* text : {"[]", "3", "{}", R"({"linears": {}})", R"({"linears": [3]})"}) {
    EXPECT_THROW((void)read_plan(parse_json(text, "t"), "plan.json", graph_), ParseError) << text;
  }
}

}  // namespace
}  // namespace quern
