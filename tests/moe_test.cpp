// SPDX-License-Identifier: Apache-2.0
#include "nn/moe.h"

#include "format/fused_experts.h"
#include "format/safetensors.h"
#include "format/safetensors_writer.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <vector>

namespace quern {
namespace {

using testing::ScratchDirectory;

Mixture mixture_of(int experts, int taken, bool normalize) {
  Mixture mixture;
  mixture.experts = experts;
  mixture.experts_per_token = taken;
  mixture.normalize = normalize;
  return mixture;
}

TEST(Route, TakesTheLargestAndSortsByExpert) {
  const std::vector<float> scores = {0, 2, 1, -1, /**/ 5, 5, 5, 5, /**/ -3, -1, -2, 0};
  std::vector<float> p(scores.size());
  const Routing routing = route(mixture_of(4, 2, false), scores.data(), 3, p.data());
  // Rows 0: experts 1, 2; 1: the first of equals, 0 and 1; 2: 3 and 1.
  EXPECT_EQ(routing.begin, (std::vector<std::int64_t>{0, 1, 4, 5, 6}));
  EXPECT_EQ(routing.rows, (std::vector<std::int64_t>{1, 0, 1, 2, 0, 2}));
  EXPECT_FLOAT_EQ(routing.weights[0], 0.25F);
  const double sum = std::exp(-2.0) + 1 + std::exp(-1.0) + std::exp(-3.0);
  EXPECT_NEAR(routing.weights[1], 1 / sum, 1e-6);
  for (int row = 0; row < 3; ++row) {
    EXPECT_NEAR(std::accumulate(p.begin() + 4 * row, p.begin() + 4 * row + 4, 0.0), 1, 1e-6);
  }
  const Routing normal = route(mixture_of(4, 2, true), scores.data(), 3);
  EXPECT_EQ(normal.rows, routing.rows);
  EXPECT_NEAR(normal.weights[1] + normal.weights[4], 1, 1e-6);
  EXPECT_FLOAT_EQ(normal.weights[0], 0.5F);
}

TEST(Route, NamesTheRowsWhereRoundingDecides) {
  // Apart; the two left out equal; the last taken and the first left out equal; these again, at a
  // probability of 0.21, 4e-7 and 1.7e-6 apart.
  const std::vector<float> scores = {0, 2, 1, -1, /**/ 3, 2,   0,      0, /**/ 3, 1,
                                     1, 0, 1, 0,  2e-6F,  -20, /**/ 1, 0, 8e-6F,  -20};
  const Routing routing = route(mixture_of(4, 2, false), scores.data(), 5);
  EXPECT_EQ(routing.ties, (std::vector<std::int64_t>{2, 3}));
  EXPECT_TRUE(route(mixture_of(4, 4, false), scores.data(), 5).ties.empty());
}

TEST(FusedExperts, AreShownAsTheirMatrices) {
  const ScratchDirectory scratch;
  const std::vector<TensorDeclaration> declarations = {
      {"a.mlp.experts.gate_up_proj", DType::kF32, {3, 4, 5}},  // 3 experts, width 2, hidden 5
      {"a.mlp.experts.down_proj", DType::kF32, {3, 5, 2}},
      {"b.mlp.experts.gate_up_proj", DType::kF32, {3, 5, 4}},  // the other orientation
      {"b.mlp.experts.down_proj", DType::kF32, {3, 2, 5}},
      {"a.norm.weight", DType::kF32, {5}}};
  {
    SafetensorsWriter writer(scratch.path(), plan_safetensors(declarations, {}));
    float next = 0;
    for (const TensorDeclaration& tensor : declarations) {
      std::int64_t count = 1;
      for (const std::int64_t n : tensor.shape) {
        count *= n;
      }
      std::vector<float> values(static_cast<std::size_t>(count));
      std::iota(values.begin(), values.end(), next);
      next += static_cast<float>(count);
      writer.write(tensor.name, from_float(values, DType::kF32));
    }
    writer.finish();
  }
  const auto store = split_fused_experts(SafetensorsStore::open(scratch.path()));
  EXPECT_EQ(store->tensors().size(), 3U * 3U + 2U + 1U);
  EXPECT_EQ(store->find("a.mlp.experts.gate_up_proj"), nullptr);
  EXPECT_NE(store->find("b.mlp.experts.gate_up_proj"), nullptr);
  // Expert 1: rows 4 … 7 of gate_up, of which the first two are the gate.
  EXPECT_EQ(to_float(store->require("a.mlp.experts.1.gate_proj.weight", {2, 5})).front(), 20);
  EXPECT_EQ(to_float(store->require("a.mlp.experts.1.up_proj.weight", {2, 5})).front(), 30);
  EXPECT_EQ(to_float(store->require("a.mlp.experts.2.down_proj.weight", {5, 2})).back(), 89);
  EXPECT_NO_THROW(store->release(*store->find("a.mlp.experts.1.up_proj.weight")));
  // Nothing to split: the same store comes back.
  const auto again = SafetensorsStore::open(scratch.path());
  EXPECT_EQ(again->tensors().size(), declarations.size());
}

}  // namespace
}  // namespace quern
