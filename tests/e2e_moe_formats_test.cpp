// SPDX-License-Identifier: Apache-2.0
// Mixtures of experts and DeltaNet through quantize, verify and the readers.
#include "format/gguf_file.h"
#include "format/safetensors_writer.h"
#include "run_binary.h"
#include "running_model.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <algorithm>
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
using testing::run_quern;
using testing::RunningModel;
using testing::RunResult;
using testing::ScratchDirectory;
using testing::test_model;

using Words = std::vector<std::string>;

double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0;
  double square = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    error += std::pow(static_cast<double>(a[i]) - b[i], 2);
    square += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(error / square);
}

// How far apart two models are in their logits for the first text of `texts`.
double distance_between(const fs::path& a, const fs::path& b, const fs::path& texts) {
  const GoldenText text = golden_texts(texts).front();
  RunningModel first(a);
  RunningModel second(b);
  return distance(first.logits(text.ids), second.logits(text.ids));
}

// How far the logits of `model` are from those that transformers computed for the source.
double distance_to_golden(const fs::path& model, const fs::path& source) {
  const GoldenText text = golden_texts(source).front();
  RunningModel running(model);
  return distance(running.logits(text.ids), text.logits);
}

// The same values read through another door: rounding moves such random models far (a token takes
// other experts), so what is written is compared with itself as plain floats.
void expect_runs_as_its_values(
    const fs::path& model, const fs::path& texts, const fs::path& dense) {
  const RunResult exported = run_quern(
      {"export", model.string(), "-o", dense.string(), "--format", "dense", "--dtype", "float32"});
  ASSERT_EQ(exported.code, 0) << exported.err;
  EXPECT_LE(distance_between(model, dense, texts), 1e-3);
}

Json quantized(const Words& more) {
  Words words = {"quantize", "--method", "rtn", "--json"};
  words.insert(words.end(), more.begin(), more.end());
  const RunResult result = run_quern(words);
  EXPECT_EQ(result.code, 0) << result.err;
  return result.json();
}

Json verified(const Words& more) {
  Words words = {"verify", "--json"};
  words.insert(words.end(), more.begin(), more.end());
  const RunResult result = run_quern(words);
  EXPECT_EQ(result.code, 0) << result.err;
  return result.json();
}

// The bundled model as it would be released with vision: experts of a layer in two tensors, the
// decoder one level down, a tower and draft layers beside it.
void write_multimodal(const fs::path& from, const fs::path& to) {
  fs::create_directories(to);
  const auto source = SafetensorsStore::open(from);
  std::vector<TensorDeclaration> declarations;
  std::map<std::string, std::vector<std::byte>> bytes;
  const auto add = [&](const std::string& name, const Shape& shape, std::vector<std::byte> data) {
    declarations.push_back({name, DType::kBF16, shape});
    bytes[name] = std::move(data);
  };
  std::map<std::string, std::map<int, std::map<std::string, TensorView>>> experts;
  for (const auto& [name, view] : source->tensors()) {
    if (name.starts_with("mtp.")) {
      continue;  // less of it, below
    }
    const std::string longer =
        name.starts_with("model.") ? "model.language_model." + name.substr(6) : name;
    const std::size_t at = longer.find(".experts.");
    if (at == std::string::npos) {
      add(longer, view.shape, {view.bytes.begin(), view.bytes.end()});
      continue;
    }
    const std::size_t dot = longer.find('.', at + 9);
    experts[longer.substr(0, at + 8)][std::stoi(longer.substr(at + 9, dot - at - 9))]
           [longer.substr(dot + 1)] = view;
  }
  for (const auto& [layer, all] : experts) {
    std::vector<std::byte> gate_up;
    std::vector<std::byte> down;
    for (const auto& [expert, parts] : all) {
      for (const char* part : {"gate_proj.weight", "up_proj.weight"}) {
        const auto& view = parts.at(part);
        gate_up.insert(gate_up.end(), view.bytes.begin(), view.bytes.end());
      }
      const auto& view = parts.at("down_proj.weight");
      down.insert(down.end(), view.bytes.begin(), view.bytes.end());
    }
    const Shape& shape = all.begin()->second.at("down_proj.weight").shape;
    const auto count = static_cast<std::int64_t>(all.size());
    add(layer + ".gate_up_proj", {count, 2 * shape[1], shape[0]}, gate_up);
    add(layer + ".down_proj", {count, shape[0], shape[1]}, down);
  }
  add("model.visual.blocks.0.attn.qkv.weight", {6, 4}, std::vector<std::byte>(48));
  add("mtp.layers.0.self_attn.q_proj.weight", {8, 64}, std::vector<std::byte>(1024));
  add("mtp.norm.weight", {64}, std::vector<std::byte>(128));
  SafetensorsWriter writer(to, plan_safetensors(declarations, {}));
  for (const auto& [name, data] : bytes) {
    writer.write(name, data);
  }
  writer.finish();
  Json text = read_json(from / "config.json");
  Json config = {
      {"model_type", "qwen3_5_moe"},
      {"architectures", {"Qwen3_5MoeForConditionalGeneration"}},
      {"tie_word_embeddings", false},
      {"dtype", "bfloat16"},
      {"text_config", text}};
  write_file(to / "config.json", config.dump());
}

class MoeFormats : public ::testing::TestWithParam<const char*> {
 protected:
  ScratchDirectory scratch_;
  fs::path source_ = test_model(std::string("random-models/") + GetParam());
};

INSTANTIATE_TEST_SUITE_P(
    Families,
    MoeFormats,
    ::testing::Values("qwen3-moe", "qwen3-next", "qwen3.5", "qwen3.5-moe"),
    [](const auto& model) { return testing::test_name(model.param); });

// Written, held to vLLM's rules, compared with the source, and run.
TEST_P(MoeFormats, AreWrittenAsVllmLoadsThem) {
  for (const std::string format : {"gptq", "compressed-tensors", "awq"}) {
    SCOPED_TRACE(format);
    const fs::path out = scratch_.path() / format;
    const Json manifest = quantized(
        {source_.string(), "-o", out.string(), "--format", format, "--group-size", "channel"});
    EXPECT_EQ(manifest["census"]["in"], SafetensorsStore::open(source_)->tensors().size());
    EXPECT_EQ(manifest["census"]["out"], SafetensorsStore::open(out)->tensors().size());
    EXPECT_TRUE(manifest["census"]["skipped"].empty());
    const Json document =
        verified({out.string(), "--engine", "vllm", "--against", source_.string()});
    EXPECT_TRUE(document["problems"].empty());
    expect_runs_as_its_values(out, source_, scratch_.path() / (format + "-dense"));
    EXPECT_GE(distance_to_golden(out, source_), 1e-3);
  }
}

TEST(MoeFormatsMultimodal, FusedExpertsBecomeMatricesAndTheRestStays) {
  const ScratchDirectory scratch;
  const fs::path source = scratch.path() / "source";
  const fs::path plain = test_model("random-models/qwen3.5-moe");
  write_multimodal(plain, source);
  for (const std::string format : {"gptq", "compressed-tensors", "awq"}) {
    SCOPED_TRACE(format);
    const fs::path out = scratch.path() / format;
    const Json manifest = quantized(
        {source.string(), "-o", out.string(), "--format", format, "--group-size", "channel"});
    const auto written = SafetensorsStore::open(out);
    EXPECT_EQ(manifest["census"]["in"], SafetensorsStore::open(source)->tensors().size());
    EXPECT_EQ(manifest["census"]["out"], written->tensors().size());
    ASSERT_EQ(manifest["census"]["divided"].size(), 8U);  // two in each of four layers
    EXPECT_EQ(
        manifest["census"]["divided"][1]["name"],
        "model.language_model.layers.0.mlp.experts.gate_up_proj");
    EXPECT_EQ(manifest["census"]["divided"][1]["parts"], 12);
    const std::string expert = "model.language_model.layers.3.mlp.experts.5.up_proj";
    const char* codes = format == "compressed-tensors" ? ".weight_packed" : ".qweight";
    EXPECT_NE(written->find(expert + codes), nullptr);
    for (const char* kept :
         {"model.language_model.layers.0.mlp.gate.weight",
          "model.language_model.layers.0.mlp.shared_expert_gate.weight",
          "model.language_model.layers.0.linear_attn.in_proj_a.weight",
          "model.language_model.layers.0.linear_attn.in_proj_b.weight",
          "model.language_model.layers.0.linear_attn.conv1d.weight",
          "model.visual.blocks.0.attn.qkv.weight",
          "mtp.layers.0.self_attn.q_proj.weight",
          "mtp.norm.weight",
          "lm_head.weight"}) {
      EXPECT_NE(written->find(kept), nullptr) << kept;
    }
    const Json document =
        verified({out.string(), "--engine", "vllm", "--against", source.string()});
    EXPECT_TRUE(document["problems"].empty());
    expect_runs_as_its_values(out, plain, scratch.path() / (format + "-dense"));
  }
}

// --- GGUF ----------------------------------------------------------------------------------------

// A model of the test data with a tokenizer: that of tiny-qwen3, cut to the tokens that fit.
void add_tokenizer(const fs::path& model, const fs::path& to) {
  fs::create_directories(to);
  for (const char* file : {"config.json", "model.safetensors"}) {
    fs::copy_file(model / file, to / file);
  }
  constexpr int kTokens = 300;
  Json json = read_json(test_model("models/tiny-qwen3") / "tokenizer.json");
  Json vocabulary = Json::object();
  for (const auto& [token, id] : json["model"]["vocab"].items()) {
    if (id.get<int>() < kTokens) {
      vocabulary[token] = id;
    }
  }
  Json merges = Json::array();
  for (const Json& merge : json["model"]["merges"]) {
    std::string left;
    std::string right;
    if (merge.is_array()) {
      left = merge[0].get<std::string>();
      right = merge[1].get<std::string>();
    } else {
      const auto text = merge.get<std::string>();
      left = text.substr(0, text.find(' '));
      right = text.substr(text.find(' ') + 1);
    }
    if (vocabulary.contains(left) && vocabulary.contains(right) &&
        vocabulary.contains(left + right)) {
      merges.push_back(merge);
    }
  }
  json["model"]["vocab"] = std::move(vocabulary);
  json["model"]["merges"] = std::move(merges);
  json["added_tokens"] = Json::array();
  write_file(to / "tokenizer.json", json.dump());
  write_file(to / "tokenizer_config.json", "{}");
}

std::vector<float> floats_of(const GgufFile& file, const std::string& name) {
  const GgufTensor* tensor = file.find(name);
  EXPECT_NE(tensor, nullptr) << name;
  std::vector<float> values(static_cast<std::size_t>(tensor->shape[0]));
  EXPECT_EQ(tensor->type, GgmlType::kF32) << name;
  dequantize_row(tensor->type, tensor->bytes, values);
  return values;
}

class MoeGguf : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    add_tokenizer(test_model(std::string("random-models/") + GetParam()), source_);
  }
  // A plan that rounds the linears that `rounds` names, to Q8_0.
  void write_plan(const std::function<bool(const std::string&)>& rounds) {
    const RunResult made = run_quern(
        {"plan",
         source_.string(),
         "--method",
         "rtn",
         "--format",
         "gguf:Q8_0",
         "-o",
         plan_.string()});
    ASSERT_EQ(made.code, 0) << made.err;
    Json json = read_json(plan_);
    for (Json& linear : json["linears"]) {
      if (!rounds(linear["name"].get<std::string>())) {
        linear["method"] = "keep";
      }
    }
    write_file(plan_, json.dump());
  }

  ScratchDirectory scratch_;
  fs::path source_ = scratch_.path() / "source";
  fs::path file_ = scratch_.path() / "m.gguf";
  fs::path plan_ = scratch_.path() / "plan.json";
};

INSTANTIATE_TEST_SUITE_P(
    Families,
    MoeGguf,
    ::testing::Values("qwen3-next-square", "qwen3.5-moe-square"),
    [](const auto& model) { return testing::test_name(model.param); });

TEST_P(MoeGguf, IsWrittenReadBackAndRuns) {
  const Json manifest =
      quantized({source_.string(), "-o", file_.string(), "--format", "gguf:Q8_0"});
  EXPECT_EQ(manifest["census"]["in"], SafetensorsStore::open(source_)->tensors().size());
  const auto file = GgufFile::open(file_);
  EXPECT_EQ(manifest["census"]["out"], file->tensors().size());
  EXPECT_EQ(manifest["census"]["merged"].size(), 12U);  // three in each of four layers
  const GgufTensor* stack = file->find("blk.0.ffn_gate_exps.weight");
  ASSERT_NE(stack, nullptr);
  EXPECT_EQ(stack->shape, (Shape{4, 32, 64}));
  EXPECT_EQ(stack->type, GgmlType::kQ80);
  EXPECT_EQ(file->find("blk.0.ffn_gate_inp.weight")->type, GgmlType::kF32);
  EXPECT_EQ(file->find("blk.0.ffn_gate_inp_shexp.weight")->shape, (Shape{64}));
  EXPECT_EQ(file->find("blk.0.ssm_conv1d.weight")->shape, (Shape{256, 4}));
  const auto store = SafetensorsStore::open(source_);
  // Four value heads on two key heads: 0 1 2 3 stand as 0 2 1 3 in qwen35moe.
  const bool is_tiled = std::string(GetParam()).starts_with("qwen3.5");
  const std::vector<std::size_t> heads =
      is_tiled ? std::vector<std::size_t>{0, 2, 1, 3} : std::vector<std::size_t>{0, 1, 2, 3};
  const std::vector<float> logs = to_float(*store->find("model.layers.0.linear_attn.A_log"));
  const std::vector<float> decays = floats_of(*file, "blk.0.ssm_a");
  for (std::size_t head = 0; head < heads.size(); ++head) {
    EXPECT_FLOAT_EQ(decays[head], -std::exp(logs[heads[head]]));
  }
  const std::vector<float> norm = to_float(*store->find("model.norm.weight"));
  const std::vector<float> gains = floats_of(*file, "output_norm.weight");
  for (std::size_t i = 0; i < norm.size(); ++i) {
    EXPECT_FLOAT_EQ(gains[i], norm[i] + 1);
  }
  EXPECT_TRUE(verified({file_.string(), "--against", source_.string()})["problems"].empty());
}

// With all but one linear of the last layer in floats, the file gives the logits of the model: no
// row, head or expert stands in another's place.
TEST_P(MoeGguf, GivesTheLogitsOfTheModel) {
  write_plan(
      [](const std::string& name) { return name == "model.layers.3.mlp.shared_expert.up_proj"; });
  const RunResult made = run_quern(
      {"quantize",
       source_.string(),
       "-o",
       file_.string(),
       "--format",
       "gguf",
       "--plan",
       plan_.string()});
  ASSERT_EQ(made.code, 0) << made.err;
  const double error =
      distance_to_golden(file_, test_model(std::string("random-models/") + GetParam()));
  EXPECT_LE(error, 0.01);
  EXPECT_GE(error, 1e-6);
}

// Slices of one tensor cannot differ.
TEST_P(MoeGguf, ExpertsOfALayerHaveOneType) {
  write_plan([](const std::string& name) {
    return name != "model.layers.0.mlp.experts.1.down_proj" && name.ends_with("_proj");
  });
  const RunResult result = run_quern(
      {"quantize",
       source_.string(),
       "-o",
       file_.string(),
       "--format",
       "gguf",
       "--plan",
       plan_.string()});
  EXPECT_EQ(result.code, 3) << result.err;
  EXPECT_NE(result.err.find("experts of a layer in one tensor"), std::string::npos) << result.err;
}

TEST(MoeGgufRefusals, WhatLlamaCppComputesOtherwise) {
  const ScratchDirectory scratch;
  for (const auto& [model, key] : std::map<std::string, std::string>{
           {"qwen3-moe", "mlp_only_layers"},  // an MLP between mixtures
           {"qwen3.5", "linear_value_head_dim"},  // heads of two widths
           {"qwen2-moe", "model_type"}}) {
    const fs::path source = scratch.path() / model;
    add_tokenizer(test_model("random-models/" + model), source);
    const RunResult result = run_quern(
        {"quantize",
         source.string(),
         "-o",
         (scratch.path() / "x.gguf").string(),
         "--method",
         "rtn",
         "--format",
         "gguf:Q8_0"});
    EXPECT_EQ(result.code, 3) << model << result.err;
    EXPECT_NE(result.err.find(key), std::string::npos) << result.err;
  }
}

}  // namespace
}  // namespace quern
