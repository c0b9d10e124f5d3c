// SPDX-License-Identifier: Apache-2.0
// FP8 releases: the values of the type, blocks, forged files, and what quantize makes of them.
#include "base/error.h"
#include "format/derived_checkpoint.h"
#include "format/safetensors_writer.h"
#include "golden.h"
#include "quant/fp8_matrix.h"
#include "run_binary.h"
#include "running_model.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace quern {
namespace {

namespace fs = std::filesystem;

using testing::golden_texts;
using testing::GoldenText;
using testing::relative_difference;
using testing::run_quern;
using testing::RunningModel;
using testing::RunResult;
using testing::ScratchDirectory;
using testing::test_kernels;
using testing::test_model;

// Table 1 of arXiv:2209.05433.
TEST(Fp8, ValuesOfTheType) {
  EXPECT_EQ(fp8_e4m3_to_float(0x00), 0.0F);
  EXPECT_EQ(fp8_e4m3_to_float(0x01), 0x1p-9F);  // smallest subnormal
  EXPECT_EQ(fp8_e4m3_to_float(0x07), 0.875F * 0x1p-6F);
  EXPECT_EQ(fp8_e4m3_to_float(0x08), 0x1p-6F);  // smallest normal
  EXPECT_EQ(fp8_e4m3_to_float(0x38), 1.0F);
  EXPECT_EQ(fp8_e4m3_to_float(0x7e), 448.0F);
  EXPECT_EQ(fp8_e4m3_to_float(0xfe), -448.0F);
  EXPECT_TRUE(std::isnan(fp8_e4m3_to_float(0x7f)));
  EXPECT_TRUE(std::isnan(fp8_e4m3_to_float(0xff)));
  EXPECT_TRUE(std::signbit(fp8_e4m3_to_float(0x80)));
  for (int bits = 1; bits < 0x7f; ++bits) {
    EXPECT_GT(
        fp8_e4m3_to_float(static_cast<std::uint8_t>(bits)),
        fp8_e4m3_to_float(static_cast<std::uint8_t>(bits - 1)));
  }
}

// The last blocks are smaller: 5 x 7 in blocks of 2 x 3 has 3 x 3 scales.
TEST(Fp8, EveryValueHasTheScaleOfItsBlock) {
  Fp8Matrix matrix;
  matrix.out_features = 5;
  matrix.in_features = 7;
  matrix.block_rows = 2;
  matrix.block_columns = 3;
  const std::vector<std::byte> ones(35, std::byte{0x38});
  matrix.values = ones;
  for (int i = 0; i < 9; ++i) {
    matrix.scales.push_back(static_cast<float>(i + 1));
  }
  EXPECT_EQ(matrix.scale_shape(), (Shape{3, 3}));
  const std::vector<float> values = matrix.dequantize(test_kernels());
  for (int row = 0; row < 5; ++row) {
    for (int column = 0; column < 7; ++column) {
      EXPECT_EQ(
          values[static_cast<std::size_t>(row * 7 + column)],
          static_cast<float>(row / 2 * 3 + column / 3 + 1));
    }
  }
  const auto parts = matrix.parts();
  std::map<std::string, TensorView> views;
  for (const MatrixPart& part : parts) {
    views[part.name] = {part.dtype, part.shape, part.bytes};
  }
  const Json parameters = matrix.parameters();
  const auto again = restore_matrix(
      Fp8Matrix::kKind,
      5,
      7,
      JsonReader(parameters, "p"),
      [&](const std::string& name) { return &views.at(name); },
      "m");
  EXPECT_EQ(again->dequantize(test_kernels()), values);
}

// A copy of the bundled FP8 model with other tensors or another configuration.
class ForgedFp8 : public ::testing::Test {
 protected:
  struct Stored {
    TensorDeclaration declaration;
    std::vector<std::byte> bytes;
  };
  using Tensors = std::map<std::string, Stored>;

  fs::path write(
      const std::function<void(Tensors&)>& change,
      const std::function<void(Json&)>& reconfigure = [](Json&) {}) {
    Tensors tensors;
    const auto source = SafetensorsStore::open(source_);
    for (const auto& [name, view] : source->tensors()) {
      tensors[name] = {{name, view.dtype, view.shape}, {view.bytes.begin(), view.bytes.end()}};
    }
    change(tensors);
    const fs::path to = scratch_.path() / std::to_string(count_++);
    fs::create_directories(to);
    std::vector<TensorDeclaration> declarations;
    for (const auto& [name, stored] : tensors) {
      declarations.push_back(stored.declaration);
    }
    SafetensorsWriter writer(to, plan_safetensors(declarations, {}));
    for (const auto& [name, stored] : tensors) {
      writer.write(name, stored.bytes);
    }
    writer.finish();
    Json config = read_json(source_ / "config.json");
    reconfigure(config);
    write_file(to / "config.json", config.dump());
    return to;
  }
  void refused(
      const std::string& part,
      const std::function<void(Tensors&)>& change,
      const std::function<void(Json&)>& reconfigure = [](Json&) {}) {
    try {
      (void)load_model(open_checkpoint(write(change, reconfigure)));
      ADD_FAILURE() << part << ": was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(exit_code(error.kind()), 3) << error.three_lines();
      EXPECT_NE(error.three_lines().find(part), std::string::npos) << error.three_lines();
    }
  }
  void refused_config(const std::string& key, const Json& value, const std::string& part) {
    refused(
        part, [](Tensors&) {}, [&](Json& config) { config["quantization_config"][key] = value; });
  }

  ScratchDirectory scratch_;
  fs::path source_ = test_model("random-models/qwen3-fp8");
  int count_ = 0;
};

TEST_F(ForgedFp8, WhatDoesNotFitIsRefused) {
  const std::string up = "model.layers.0.mlp.up_proj.weight";  // 256 x 128: two scales
  const std::string scale = up + "_scale_inv";
  EXPECT_NO_THROW((void)load_model(open_checkpoint(write([](Tensors&) {}))));
  refused("weight_scale_inv", [&](Tensors& t) { t.erase(scale); });
  refused("do not fit", [&](Tensors& t) { t[scale].declaration.shape = {1, 2}; });
  refused("do not fit", [&](Tensors& t) {
    t[scale].declaration.shape = {1, 1};
    t[scale].bytes.resize(2);
  });
  refused("do not fit", [&](Tensors& t) { t[scale].declaration.dtype = DType::kU16; });
  refused("without its weight", [&](Tensors& t) { t.erase(up); });
  refused("without its weight", [&](Tensors& t) { t[up].declaration.dtype = DType::kU8; });
  refused("not finite", [&](Tensors& t) {
    t[scale].bytes[1] = std::byte{0x7f};
    t[scale].bytes[0] = std::byte{0x80};
  });
  refused_config("weight_block_size", Json::array({128}), "weight_block_size");
  refused_config("weight_block_size", Json::array({0, 128}), "weight_block_size");
  refused_config("weight_block_size", nullptr, "without scales by block");
  refused_config("weight_block_size", Json::array({64, 128}), "do not fit");
  refused_config("fmt", "e5m2", "fmt");
  refused_config("scale_fmt", "ue8m0", "scale_fmt");
}

// A row too many for the blocks: the last one has a scale of its own.
TEST_F(ForgedFp8, LastBlocksMayBeSmaller) {
  const auto bigger = [](Json& config) { config["intermediate_size"] = 192; };
  const fs::path path = write(
      [](Tensors& tensors) {
        for (const char* name : {"gate_proj", "up_proj"}) {
          for (const char* layer : {"0", "1"}) {
            const std::string weight =
                std::string("model.layers.") + layer + ".mlp." + name + ".weight";
            tensors[weight].declaration.shape = {192, 128};
            tensors[weight].bytes.resize(192 * 128);
          }
        }
        for (const char* layer : {"0", "1"}) {
          const std::string weight = std::string("model.layers.") + layer + ".mlp.down_proj.weight";
          tensors[weight].declaration.shape = {128, 192};
          tensors[weight].bytes.resize(192 * 128);
        }
      },
      bigger);
  const auto checkpoint = open_checkpoint(path);
  const std::string module = "model.layers.0.mlp.up_proj";
  const StoredLinear stored = checkpoint->load_linear(module, 192, 128);
  const std::vector<float> values = stored.quantized->dequantize(test_kernels());
  const std::vector<float> scales =
      to_float(checkpoint->tensors().require(module + ".weight_scale_inv", {2, 1}));
  const TensorView& raw = *checkpoint->tensors().find(module + ".weight");
  for (const std::size_t row : {0U, 127U, 128U, 191U}) {
    const float wanted =
        fp8_e4m3_to_float(static_cast<std::uint8_t>(raw.bytes[row * 128 + 3])) * scales[row / 128];
    EXPECT_EQ(values[row * 128 + 3], wanted) << row;
  }
}

// Weights are made when they are asked for, and go when they are released.
TEST(Fp8Source, GivesPlainWeightsOnDemand) {
  const fs::path path = test_model("random-models/qwen3-fp8");
  const auto stored = open_checkpoint(path);
  EXPECT_EQ(stored->format(), "fp8");
  const auto plain = with_plain_weights(open_checkpoint(path));
  EXPECT_EQ(plain->format(), "dense");
  EXPECT_FALSE(plain->config().contains("quantization_config"));
  const std::string module = "model.layers.1.self_attn.q_proj";
  const std::string name = module + ".weight";
  EXPECT_EQ(plain->tensors().find(name + "_scale_inv"), nullptr);
  const TensorView& known = plain->tensors().tensors().at(name);
  EXPECT_EQ(known.dtype, DType::kBF16);
  EXPECT_TRUE(known.bytes.empty());
  const StoredLinear linear = plain->load_linear(module, 128, 128);
  const std::vector<float> exact =
      stored->load_linear(module, 128, 128).quantized->dequantize(test_kernels());
  const std::vector<float> rounded = to_float(*linear.dense);
  for (std::size_t i = 0; i < exact.size(); ++i) {
    EXPECT_LE(std::fabs(rounded[i] - exact[i]), 0x1p-8F * std::fabs(exact[i]));  // of BF16
  }
  const TensorView* again = plain->tensors().find(name);
  EXPECT_EQ(again->bytes.data(), linear.dense->bytes.data());  // not made twice
  plain->tensors().release(*again);
  EXPECT_EQ(to_float(*linear.dense), rounded);  // somebody still holds it
  plain->tensors().release(*linear.dense);
  EXPECT_THROW((void)plain->load_linear(module, 128, 64), ParseError);
  // A checkpoint of another format comes back as it is.
  EXPECT_EQ(
      with_plain_weights(open_checkpoint(test_model("random-models/qwen3-moe")))->format(),
      "dense");
}

class Fp8Quantized : public ::testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(
    Families, Fp8Quantized, ::testing::Values("qwen3-fp8", "qwen3-moe-fp8"), [](const auto& model) {
      return testing::test_name(model.param);
    });

TEST_P(Fp8Quantized, LosesNoMoreThanEightBitsDo) {
  const ScratchDirectory scratch;
  const fs::path source = test_model(std::string("random-models/") + GetParam());
  const fs::path out = scratch.path() / "out";
  const RunResult made = run_quern(
      {"quantize",
       source.string(),
       "-o",
       out.string(),
       "--method",
       "rtn",
       "--bits",
       "8",
       "--group-size",
       "32",
       "--format",
       "compressed-tensors",
       "--json"});
  ASSERT_EQ(made.code, 0) << made.err;
  EXPECT_TRUE(made.json()["census"]["skipped"].empty());
  const auto written = open_checkpoint(out);
  EXPECT_EQ(written->format(), "compressed-tensors");
  EXPECT_EQ(written->tensors().find("model.layers.0.self_attn.q_proj.weight_scale_inv"), nullptr);
  const RunResult checked = run_quern(
      {"verify", out.string(), "--against", source.string(), "--engine", "vllm", "--json"});
  EXPECT_EQ(checked.code, 0) << checked.err;
  const GoldenText text = golden_texts(source).front();
  RunningModel model(out);
  EXPECT_LE(relative_difference(model.logits(text.ids), text.logits), 0.05);
}

}  // namespace
}  // namespace quern
