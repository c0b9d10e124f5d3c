// SPDX-License-Identifier: Apache-2.0
#include "pipeline/export.h"

#include "base/error.h"
#include "format/checkpoint.h"
#include "packed_model.h"
#include "quant_fixture.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace quern {
namespace {

namespace fs = std::filesystem;

using testing::forged_linears;
using testing::ForgedLinear;
using testing::PackedModel;
using testing::test_kernels;

constexpr const char* kFormats[] = {"gptq", "gptq_v2", "awq", "compressed-tensors", "quern"};

std::vector<float> values(const Checkpoint& checkpoint, const ForgedLinear& linear) {
  const StoredLinear stored = checkpoint.load_linear(linear.name, linear.out, linear.in);
  return stored.quantized ? stored.quantized->dequantize(test_kernels()) : to_float(*stored.dense);
}

class Export : public ::testing::Test {
 protected:
  [[nodiscard]] fs::path at(const std::string& name) const { return scratch_.path() / name; }
  [[nodiscard]] Json run(
      const std::string& model,
      const std::string& output,
      const std::string& format,
      const std::string& dtype = "") const {
    ExportOptions options;
    options.model = at(model);
    options.output = at(output);
    options.format = format;
    options.dtype = dtype;
    return export_checkpoint(*context_, options);
  }
  void expect_same_values(const std::string& a, const std::string& b) const {
    const auto left = open_checkpoint(at(a));
    const auto right = open_checkpoint(at(b));
    for (const ForgedLinear& linear : forged_linears()) {
      EXPECT_EQ(values(*left, linear), values(*right, linear)) << linear.name;
    }
    for (const testing::ForgedPlain& plain : testing::forged_plain_tensors()) {
      const TensorView* before = left->tensors().find(plain.name);
      const TensorView* after = right->tensors().find(plain.name);
      ASSERT_EQ(before == nullptr, after == nullptr) << plain.name;
      EXPECT_TRUE(before == nullptr || testing::same_bytes(*before, *after)) << plain.name;
    }
  }
  // Refused with exit code 3, this in the hint, and nothing left behind.
  void expect_refused(
      const std::string& model, const std::string& format, const std::string& hint) const {
    try {
      (void)run(model, "refused", format);
      ADD_FAILURE() << format << " was accepted";
    } catch (const UnsupportedError& error) {
      EXPECT_EQ(exit_code(error.kind()), 3);
      EXPECT_NE(error.hint().find(hint), std::string::npos) << error.three_lines();
    }
    EXPECT_FALSE(fs::exists(at("refused")));
    EXPECT_FALSE(fs::exists(at("refused.partial")));
  }

  testing::ScratchDirectory scratch_;
  testing::TestContext context_{2};
};

TEST_F(Export, EveryFormatToEveryOther) {
  const PackedModel model = PackedModel::uniform({4, true, 32});
  for (const char* from : kFormats) {
    model.write(at(from), from);
    for (const char* to : kFormats) {
      SCOPED_TRACE(std::string(from) + " to " + to);
      const std::string out = std::string(from) + "_" + to;
      const Json manifest = run(from, out, to);
      EXPECT_EQ(manifest["schema"], "quern.export/1");
      EXPECT_EQ(manifest["source_format"], from);
      EXPECT_EQ(manifest["format"], to);
      EXPECT_EQ(manifest["linears"].size(), 7U);
      EXPECT_EQ(open_checkpoint(at(out))->format(), to);
      expect_same_values(from, out);
      EXPECT_EQ(fs::exists(at(out) / "quantize_config.json"), std::string(to).starts_with("gptq"));
    }
  }
}

TEST_F(Export, AsymmetricModelsKeepTheirZeroPoints) {
  PackedModel model = PackedModel::uniform({4, false, 32});
  for (auto& [name, linear] : model.linears) {
    for (std::uint8_t& zero : linear.zeros) {
      zero = std::max<std::uint8_t>(1, zero);
    }
  }
  // One module happens to have all of them in the middle; q, k and v must still agree.
  PackedLinear& k = model.linears.at("model.layers.0.self_attn.k_proj");
  k.zeros.assign(k.zeros.size(), 8);
  model.write(at("gptq"), "gptq");
  for (const char* to : kFormats) {
    SCOPED_TRACE(to);
    (void)run("gptq", std::string("to_") + to, to);
    expect_same_values("gptq", std::string("to_") + to);
  }
  const Json config = read_json(at("to_compressed-tensors") / "config.json");
  EXPECT_EQ(config["quantization_config"]["config_groups"].size(), 1U);
}

TEST_F(Export, DenseHoldsTheValues) {
  const PackedModel model = PackedModel::uniform({4, false, 32});
  model.write(at("model"), "quern");
  const Json manifest = run("model", "wide", "dense", "float32");
  EXPECT_EQ(manifest["format"], "dense");
  expect_same_values("model", "wide");
  const Json wide = read_json(at("wide") / "config.json");
  EXPECT_FALSE(wide.contains("quantization_config"));
  EXPECT_EQ(wide["dtype"], "float32");

  (void)run("model", "usual", "dense");
  const auto source = open_checkpoint(at("model"));
  const auto usual = open_checkpoint(at("usual"));
  EXPECT_EQ(read_json(at("usual") / "config.json")["dtype"], "bfloat16");
  for (const ForgedLinear& linear : forged_linears()) {
    const StoredLinear stored = usual->load_linear(linear.name, linear.out, linear.in);
    ASSERT_TRUE(stored.dense);
    const auto rounded = from_float(values(*source, linear), DType::kBF16);
    EXPECT_TRUE(
        testing::same_bytes(*stored.dense, {DType::kBF16, {linear.out, linear.in}, rounded}));
  }
}

TEST_F(Export, ScalesKeepTheirTypeOrAreRefused) {
  // BF16 scales of these sizes are halves as well.
  PackedModel model = PackedModel::uniform({4, true, 32}, DType::kBF16);
  model.write(at("compressed"), "compressed-tensors");
  (void)run("compressed", "gptq", "gptq");
  expect_same_values("compressed", "gptq");
  // Halves stay halves in compressed-tensors, although the model is BF16.
  PackedModel::uniform({4, true, 32}, DType::kF16).write(at("halves"), "gptq");
  (void)run("halves", "compressed_halves", "compressed-tensors");
  EXPECT_EQ(
      open_checkpoint(at("compressed_halves"))
          ->tensors()
          .find("model.layers.0.mlp.up_proj.weight_scale")
          ->dtype,
      DType::kF16);
  // What no half holds.
  model.linears.at("model.layers.0.mlp.up_proj").scales[0] = 0x1p-40F;
  model.write(at("tiny_scale"), "compressed-tensors");
  expect_refused("tiny_scale", "gptq", "compressed-tensors, quern");
  expect_refused("tiny_scale", "awq", "dense with --dtype float32");
}

TEST_F(Export, MixedSchemes) {
  PackedModel model = PackedModel::uniform({4, true, 32});
  PackedLinear& down = model.linears.at("model.layers.0.mlp.down_proj");
  down = testing::random_linear({8, true, 0}, down.out_features, down.in_features);
  model.linears.erase("model.layers.0.self_attn.o_proj");
  model.write(at("gptq"), "gptq");
  for (const char* to : {"gptq", "gptq_v2", "compressed-tensors", "quern"}) {
    (void)run("gptq", std::string("to_") + to, to);
    expect_same_values("gptq", std::string("to_") + to);
  }
  expect_refused("gptq", "awq", "gptq, gptq_v2, compressed-tensors, quern");
  down = testing::random_linear({5, true, 32}, down.out_features, down.in_features);
  model.write(at("five"), "compressed-tensors");
  expect_refused("five", "gptq", "compressed-tensors, quern");
}

TEST_F(Export, AZeroPointOf0GoesToTheSecondVersion) {
  PackedModel model = PackedModel::uniform({4, false, 32});
  model.linears.at("model.layers.0.mlp.up_proj").zeros[3] = 0;
  model.write(at("v2"), "gptq_v2");
  // v1 is v2 with a 1 subtracted from every field, by whole words.
  testing::Files files;
  fs::create_directories(at("v1"));
  Json config = read_json(at("v2") / "config.json");
  config["quantization_config"]["checkpoint_format"] = "gptq";
  config["quantization_config"]["format"] = "gptq";
  write_file(at("v1") / "config.json", config.dump());
  {
    const auto store = open_checkpoint(at("v2"));
    std::vector<TensorDeclaration> declarations;
    for (const auto& [name, view] : store->tensors().tensors()) {
      declarations.push_back({name, view.dtype, view.shape});
    }
    SafetensorsWriter writer(at("v1"), plan_safetensors(declarations));
    for (const auto& [name, view] : store->tensors().tensors()) {
      if (!name.ends_with(".qzeros")) {
        writer.write(name, view.bytes);
        continue;
      }
      auto words = copy_values<std::uint32_t>(view);
      for (std::uint32_t& word : words) {
        word -= 0x11111111U;
      }
      writer.write(name, bytes_of(words));
    }
    writer.finish();
  }
  expect_same_values("v1", "v2");
  const Json manifest = run("v1", "out", "gptq");
  EXPECT_EQ(manifest["requested_format"], "gptq");
  EXPECT_EQ(manifest["format"], "gptq_v2");
  expect_same_values("v1", "out");
  // From another format it is the person's choice.
  model.write(at("quern"), "quern");
  expect_refused("quern", "gptq", "gptq_v2, awq, compressed-tensors, quern");
}

TEST_F(Export, ActOrderGoesToTheContainer) {
  PackedModel model = PackedModel::uniform({4, true, 32});
  model.write(at("natural"), "gptq");
  // Group indexes of an act-order file: groups of the right sizes, scattered.
  fs::create_directories(at("model"));
  write_file(at("model") / "config.json", read_file(at("natural") / "config.json"));
  {
    const auto store = open_checkpoint(at("natural"));
    std::vector<TensorDeclaration> declarations;
    for (const auto& [name, view] : store->tensors().tensors()) {
      declarations.push_back({name, view.dtype, view.shape});
    }
    SafetensorsWriter writer(at("model"), plan_safetensors(declarations));
    for (const auto& [name, view] : store->tensors().tensors()) {
      if (!name.ends_with(".g_idx")) {
        writer.write(name, view.bytes);
        continue;
      }
      auto index = copy_values<std::int32_t>(view);
      std::reverse(index.begin(), index.end());
      std::swap(index[0], index.back());
      writer.write(name, bytes_of(index));
    }
    writer.finish();
  }
  EXPECT_EQ(run("model", "out", "gptq")["format"], "quern");
  expect_same_values("model", "out");
  (void)run("model", "dense", "dense", "float32");
  expect_same_values("model", "dense");
  expect_refused("model", "compressed-tensors", "dense with --dtype float32, quern");
  expect_refused("model", "awq", "quern");
}

TEST_F(Export, IntegerInputsAreKeptOrRefused) {
  PackedModel model = PackedModel::uniform({8, true, 0}, DType::kF32);
  model.activation.bits = 8;
  model.activation.dynamic = false;
  model.activation.scale = 0.125F;
  model.write(at("compressed"), "compressed-tensors");
  (void)run("compressed", "container", "quern");
  (void)run("container", "again", "compressed-tensors");
  expect_same_values("compressed", "again");
  const ForgedLinear linear = forged_linears().front();
  for (const char* name : {"container", "again"}) {
    const StoredLinear stored =
        open_checkpoint(at(name))->load_linear(linear.name, linear.out, linear.in);
    ASSERT_NE(stored.activation, nullptr);
    EXPECT_EQ(*stored.activation, model.activation);
  }
  expect_refused("compressed", "gptq", "compressed-tensors, quern");
  (void)run("compressed", "dense", "dense", "float32");
  expect_same_values("compressed", "dense");
}

TEST_F(Export, QuantizedEmbeddings) {
  PackedModel model = PackedModel::uniform({4, true, 32}, DType::kBF16);
  model.config["tie_word_embeddings"] = false;
  model.linears.emplace(
      "model.embed_tokens", testing::random_linear({8, true, 32}, 64, 64, DType::kBF16));
  model.linears.emplace("lm_head", testing::random_linear({4, true, 32}, 64, 64, DType::kBF16));
  model.write(at("compressed"), "compressed-tensors");
  (void)run("compressed", "container", "quern");
  (void)run("container", "again", "compressed-tensors");
  const auto before = open_checkpoint(at("compressed"));
  const auto after = open_checkpoint(at("again"));
  for (const char* name : {"model.embed_tokens", "lm_head"}) {
    ASSERT_TRUE(after->is_quantized(name));
    EXPECT_EQ(values(*before, {name, 64, 64}), values(*after, {name, 64, 64}));
  }
  expect_refused("compressed", "gptq", "compressed-tensors, quern");
  // Tied, compressed-tensors holds it twice.
  PackedModel tied = PackedModel::uniform({4, true, 32}, DType::kBF16);
  tied.linears.emplace(
      "model.embed_tokens", testing::random_linear({8, true, 32}, 64, 64, DType::kBF16));
  tied.write(at("tied"), "quern");
  EXPECT_EQ(run("tied", "untied", "compressed-tensors")["format"], "compressed-tensors");
  EXPECT_FALSE(read_json(at("untied") / "config.json")["tie_word_embeddings"].get<bool>());
  const auto one = open_checkpoint(at("tied"));
  const auto two = open_checkpoint(at("untied"));
  for (const char* name : {"model.embed_tokens", "lm_head"}) {
    ASSERT_TRUE(two->is_quantized(name));
    EXPECT_EQ(values(*one, {"model.embed_tokens", 64, 64}), values(*two, {name, 64, 64}));
  }
}

TEST_F(Export, Misuse) {
  PackedModel::uniform({4, true, 32}).write(at("model"), "gptq");
  EXPECT_THROW((void)run("model", "out", "gptq", "float32"), UsageError);
  EXPECT_THROW((void)run("model", "out", "dense", "int8"), UsageError);
  EXPECT_THROW((void)run("model", "out", "tar"), UnsupportedError);
  EXPECT_THROW((void)run("nothing", "out", "dense"), IoError);
  EXPECT_THROW((void)run("model", "model", "dense"), UsageError);
  EXPECT_FALSE(fs::exists(at("out")));
  (void)run("model", "dense", "dense");
  EXPECT_THROW((void)run("dense", "out", "gptq"), UsageError);  // nothing is quantized
  EXPECT_THROW((void)run("model", "dense", "dense"), UsageError);  // occupied
  fs::create_directories(at("out.partial"));
  write_file(at("out.partial") / "mine.txt", "x");
  EXPECT_THROW((void)run("model", "out", "dense"), UsageError);
  EXPECT_TRUE(fs::exists(at("out.partial") / "mine.txt"));
  // What a killed export left behind is taken away.
  write_file(at("out.partial") / ".quern-export", "");
  EXPECT_NO_THROW((void)run("model", "out", "dense"));
  EXPECT_FALSE(fs::exists(at("out.partial")));
  EXPECT_FALSE(fs::exists(at("out") / "mine.txt"));
  EXPECT_FALSE(fs::exists(at("out") / ".quern-export"));
}

TEST_F(Export, TheSameBytesAtAnyNumberOfThreads) {
  PackedModel::uniform({4, true, 32}).write(at("model"), "gptq");
  (void)run("model", "two", "dense");
  const testing::TestContext one{1};
  ExportOptions options;
  options.model = at("model");
  options.output = at("one");
  options.format = "dense";
  (void)export_checkpoint(*one, options);
  EXPECT_EQ(read_file(at("one") / "model.safetensors"), read_file(at("two") / "model.safetensors"));
}

}  // namespace
}  // namespace quern
