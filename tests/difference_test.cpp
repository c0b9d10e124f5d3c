// SPDX-License-Identifier: Apache-2.0
#include "pipeline/difference.h"

#include "base/error.h"
#include "format/checkpoint.h"
#include "packed_model.h"
#include "pipeline/export.h"
#include "pipeline/verify.h"
#include "quant_fixture.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace quern {
namespace {

namespace fs = std::filesystem;

using testing::PackedModel;

StoredLinear dense(const std::vector<std::byte>& bytes, const Shape& shape) {
  StoredLinear stored;
  stored.dense = TensorView{DType::kF32, shape, bytes};
  return stored;
}

TEST(MatrixDifference, MeasuresBothNorms) {
  const testing::TestContext context;
  const std::vector<std::byte> a = from_float(std::vector<float>{3, 0, 0, 4}, DType::kF32);
  const std::vector<std::byte> b = from_float(std::vector<float>{3, 0, 0.5F, 3}, DType::kF32);
  const Linear linear{"m", Role::kQuery, 2, 2, false};
  const MatrixDifference found =
      matrix_difference(*context, dense(a, {2, 2}), dense(b, {2, 2}), linear);
  EXPECT_DOUBLE_EQ(found.relative, std::sqrt(1.25) / 5);
  EXPECT_DOUBLE_EQ(found.largest, 1);
  EXPECT_TRUE(found.finite);
  const std::vector<std::byte> zero(16);
  const MatrixDifference from_zero =
      matrix_difference(*context, dense(zero, {2, 2}), dense(a, {2, 2}), linear);
  EXPECT_DOUBLE_EQ(from_zero.relative, 5);
  const MatrixDifference same =
      matrix_difference(*context, dense(zero, {2, 2}), dense(zero, {2, 2}), linear);
  EXPECT_EQ(same.relative, 0);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const std::vector<std::byte> broken = from_float(std::vector<float>{3, bad, 0, 4}, DType::kF32);
    EXPECT_FALSE(
        matrix_difference(*context, dense(a, {2, 2}), dense(broken, {2, 2}), linear).finite);
  }
}

class Compare : public ::testing::Test {
 protected:
  [[nodiscard]] fs::path at(const std::string& name) const { return scratch_.path() / name; }
  [[nodiscard]] CheckpointDifference compare(const std::string& a, const std::string& b) const {
    return compare_checkpoints(*context_, *open_checkpoint(at(a)), *open_checkpoint(at(b)));
  }

  testing::ScratchDirectory scratch_;
  testing::TestContext context_;
};

TEST_F(Compare, FormatsOfTheSameValuesAreEqual) {
  const PackedModel model = PackedModel::uniform({4, true, 32});
  model.write(at("gptq"), "gptq");
  model.write(at("awq"), "awq");
  const Json json = difference_json(compare("gptq", "awq"));
  EXPECT_EQ(json["summary"]["linears"], 8);  // seven and the table, which is tied
  EXPECT_EQ(json["summary"]["equal_linears"], 8);
  EXPECT_EQ(json["summary"]["worst_relative_difference"], 0.0);
  EXPECT_EQ(json["summary"]["equal_tensors"], 5);
  EXPECT_EQ(json["summary"]["different_tensors"], 0);
  EXPECT_EQ(json["linears"][1]["a"], "4 bits, groups of 32, symmetric");
  EXPECT_EQ(json["linears"][0]["b"], "BF16");
}

TEST_F(Compare, OneChangedScaleIsFound) {
  PackedModel model = PackedModel::uniform({4, true, 32});
  model.write(at("before"), "quern");
  PackedLinear& changed = model.linears.at("model.layers.0.mlp.down_proj");
  changed.scales[0] *= 2;
  model.write(at("after"), "quern");
  const CheckpointDifference found = compare("before", "after");
  for (const LinearDifference& linear : found.linears) {
    EXPECT_EQ(linear.difference.largest > 0, linear.name == "model.layers.0.mlp.down_proj");
  }
  EXPECT_EQ(difference_json(found)["summary"]["worst"], "model.layers.0.mlp.down_proj");
}

TEST_F(Compare, OtherModelsAreRefused) {
  PackedModel model = PackedModel::uniform({4, true, 32});
  model.write(at("a"), "gptq");
  Json config = read_json(at("a") / "config.json");
  fs::create_directories(at("b"));
  fs::copy_file(at("a") / "model.safetensors", at("b") / "model.safetensors");
  config["num_hidden_layers"] = 0;
  write_file(at("b") / "config.json", config.dump());
  EXPECT_THROW((void)compare("a", "b"), Error);
  config["num_hidden_layers"] = 1;
  config["num_attention_heads"] = 1;
  config["num_key_value_heads"] = 1;
  write_file(at("b") / "config.json", config.dump());
  EXPECT_THROW((void)compare("a", "b"), Error);
}

TEST_F(Compare, VerifySaysWhatEnginesTake) {
  PackedModel::uniform({4, true, 32}).write(at("gptq"), "gptq");
  const auto checkpoint = open_checkpoint(at("gptq"));
  const Json all = verify_checkpoint(*context_, *checkpoint, nullptr);
  ASSERT_EQ(all["engines"].size(), 4U);
  EXPECT_EQ(all["engines"][0]["engine"], "vllm");
  EXPECT_EQ(all["engines"][0]["loads"], true);
  EXPECT_TRUE(all["problems"].empty());  // llama.cpp's verdict is none of the checkpoint's faults
  EXPECT_EQ(all["largest_tensor_parallel"], 2);  // two heads
  EXPECT_TRUE(verify_checkpoint(*context_, *checkpoint, nullptr, "vllm")["problems"].empty());
  const Json named = verify_checkpoint(*context_, *checkpoint, nullptr, "llama.cpp");
  EXPECT_EQ(named["engines"].size(), 1U);
  EXPECT_EQ(named["problems"].size(), 1U);
  EXPECT_THROW((void)verify_checkpoint(*context_, *checkpoint, nullptr, "ollama"), UsageError);

  PackedModel asymmetric = PackedModel::uniform({4, false, 32});
  asymmetric.write(at("asymmetric"), "gptq_v2");
  EXPECT_FALSE(
      verify_checkpoint(*context_, *open_checkpoint(at("asymmetric")), nullptr, "vllm")["problems"]
          .empty());
}

}  // namespace
}  // namespace quern
