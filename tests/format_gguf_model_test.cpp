// SPDX-License-Identifier: Apache-2.0
// GGUF files as models: names, metadata and tokenizer against llama.cpp's conversion script, and
// what runs from such files.
#include "base/error.h"
#include "base/file.h"
#include "gguf_model.h"
#include "quant/ggml_matrix.h"
#include "running_model.h"
#include "scratch.h"
#include "tokenizer_files.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>
#include <string>
#include <vector>

namespace quern {
namespace {

using testing::all_of;
using testing::GgufModelWriter;
using testing::golden_texts;
using testing::GoldenText;
using testing::relative_difference;
using testing::RunningModel;
using testing::ScratchDirectory;
using testing::test_model;
using testing::write_gguf_model;

std::filesystem::path converted(const std::string& name) {
  return test_model("golden/gguf/converted/" + name);
}

std::string hex_of(std::span<const std::byte> bytes) {
  Sha256 hash;
  hash.update(bytes);
  return hash.hex();
}

TEST(GgufNames, AreTranslatedBothWays) {
  const std::vector<std::pair<std::string, std::string>> pairs = {
      {"model.embed_tokens.weight", "token_embd.weight"},
      {"model.norm.weight", "output_norm.weight"},
      {"lm_head.weight", "output.weight"},
      {"model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"},
      {"model.layers.10.self_attn.q_proj.bias", "blk.10.attn_q.bias"},
      {"model.layers.63.self_attn.o_proj.weight", "blk.63.attn_output.weight"},
      {"model.layers.7.self_attn.k_norm.weight", "blk.7.attn_k_norm.weight"},
      {"model.layers.7.post_attention_layernorm.weight", "blk.7.ffn_norm.weight"},
      {"model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"}};
  for (const auto& [name, gguf] : pairs) {
    EXPECT_EQ(gguf_tensor_name(name), gguf);
    EXPECT_EQ(checkpoint_tensor_name(gguf), name);
  }
  for (const char* other :
       {"",
        ".weight",
        "weight",
        "blk.weight",
        "blk.1.weight",
        "blk.01.ffn_up.weight",
        "blk.-1.ffn_up.weight",
        "blk..ffn_up.weight",
        "blk.1234567.ffn_up.weight",
        "blk.1.ffn_up",
        "blk.1.ffn_up.scale",
        "blk.1.ffn_gate_exps.weight",
        "blk.1.ffn_up.weight.weight",
        "rope_freqs.weight",
        "model.norm.weight"}) {
    EXPECT_FALSE(checkpoint_tensor_name(other).has_value()) << other;
  }
  EXPECT_FALSE(gguf_tensor_name("model.layers.1.mlp.experts.0.up_proj.weight").has_value());
  EXPECT_FALSE(gguf_tensor_name("output.weight").has_value());
}

TEST(GgufNames, LlamasQueryAndKeyRowsAreInterleaved) {
  EXPECT_EQ(
      gguf_row_order("llama", "model.layers.0.self_attn.q_proj.weight", 8, 4),
      (std::vector<std::int64_t>{0, 2, 1, 3, 4, 6, 5, 7}));
  EXPECT_EQ(
      gguf_row_order("llama", "model.layers.0.self_attn.k_proj.bias", 6, 6),
      (std::vector<std::int64_t>{0, 3, 1, 4, 2, 5}));
  EXPECT_TRUE(gguf_row_order("llama", "model.layers.0.self_attn.v_proj.weight", 8, 4).empty());
  EXPECT_TRUE(gguf_row_order("qwen3", "model.layers.0.self_attn.q_proj.weight", 8, 4).empty());
}

class ConvertedModel : public ::testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(
    Trained,
    ConvertedModel,
    ::testing::Values("tiny-qwen3", "tiny-qwen2.5", "tiny-llama3"),
    [](const auto& model) { return testing::test_name(model.param); });

TEST_P(ConvertedModel, MetadataHasEveryKeyOfTheReference) {
  const std::string name = GetParam();
  const auto reference = GgufFile::open(converted(name + ".gguf"));
  GgufModelWriter writer(test_model("models/" + name), all_of(GgmlType::kBF16));
  const GgufMetadata& found = writer.metadata();
  std::size_t compared = 0;
  for (const GgufMetadata::Entry& entry : reference->metadata().entries()) {
    // What a person is shown, and llama.cpp's defaults of sampling.
    static const std::set<std::string> kOthers = {
        "general.name",
        "general.size_label",
        "general.file_type",
        "tokenizer.ggml.add_space_prefix"};
    if (kOthers.contains(entry.key) || entry.key.starts_with("general.sampling.")) {
      continue;
    }
    const GgufValue* value = found.find(entry.key);
    ASSERT_NE(value, nullptr) << entry.key;
    EXPECT_TRUE(*value == entry.value) << entry.key;
    ++compared;
  }
  EXPECT_GE(compared, 20U);
}

TEST_P(ConvertedModel, TensorsAreThoseOfTheReference) {
  const std::string name = GetParam();
  const ScratchDirectory scratch;
  const std::filesystem::path path = scratch.path() / "m.gguf";
  write_gguf_model(test_model("models/" + name), all_of(GgmlType::kBF16), path);
  const auto file = GgufFile::open(path);
  const Json reference = read_json(converted(name + ".json"));
  ASSERT_EQ(file->tensors().size(), reference.size());
  for (const Json& expected : reference) {
    const GgufTensor* tensor = file->find(expected.at("name"));
    ASSERT_NE(tensor, nullptr) << expected;
    EXPECT_EQ(ggml_type_info(tensor->type).name, expected.at("type").get<std::string>());
    Shape extents = tensor->shape;
    std::reverse(extents.begin(), extents.end());
    EXPECT_EQ(extents, expected.at("ne").get<Shape>());
    if (expected.contains("sha256")) {
      EXPECT_EQ(hex_of(tensor->bytes), expected.at("sha256").get<std::string>()) << tensor->name;
      continue;
    }
    std::vector<float> values(static_cast<std::size_t>(tensor->shape[0]));
    dequantize_row(tensor->type, tensor->bytes, values);
    for (std::size_t i = 0; i < values.size(); ++i) {
      // The reference computes its frequencies in float: a few roundings of 2^-24.
      const double wanted = expected.at("values").at(i).get<double>();
      EXPECT_NEAR(values[i], wanted, 4e-7 * std::abs(wanted)) << tensor->name << ' ' << i;
    }
  }
}

TEST_P(ConvertedModel, TheTokenizerComesBack) {
  const std::string name = GetParam();
  const Tokenizer original = load_tokenizer(test_model("models/" + name));
  const Tokenizer found = open_tokenizer(converted(name + ".gguf"));
  EXPECT_EQ(found.vocab_size(), original.vocab_size());
  EXPECT_EQ(found.eos_id(), original.eos_id());
  EXPECT_EQ(found.adds_bos(), original.adds_bos());
  for (std::int32_t id = 0; id < original.vocab_size(); ++id) {
    ASSERT_EQ(found.token_bytes(id), original.token_bytes(id)) << id;
    ASSERT_EQ(found.is_special(id), original.is_special(id)) << id;
  }
  const std::string text = read_file(std::string(QUERN_TESTDATA) + "/text/wiki.test.raw");
  const std::string part = text.substr(0, 200'000) + "<|im_start|>user\n<think>3 33 é<|im_end|>";
  EXPECT_EQ(found.encode(part), original.encode(part));
}

class GgufModel : public ::testing::TestWithParam<const char*> {
 protected:
  std::filesystem::path directory_ = test_model(GetParam());
  ScratchDirectory scratch_;
  std::filesystem::path path_ = scratch_.path() / "m.gguf";
};

INSTANTIATE_TEST_SUITE_P(
    All,
    GgufModel,
    ::testing::Values(
        "models/tiny-qwen3",
        "models/tiny-qwen2.5",
        "models/tiny-llama3",
        "random-models/llama3-tied",
        "random-models/qwen2-untied",
        "random-models/qwen2-yarn",
        "random-models/qwen3-wide-heads"),
    [](const auto& model) { return testing::test_name(model.param); });

// The same weights in a file that holds the same values: only rotary factors went through a float.
TEST_P(GgufModel, FloatFilesGiveTheLogitsOfTheModel) {
  for (const GgmlType type : {GgmlType::kF32, GgmlType::kBF16}) {
    const auto source = open_checkpoint(directory_);
    if (type == GgmlType::kBF16 && source->config().value("torch_dtype", "") != "bfloat16") {
      continue;  // BF16 would not hold the values
    }
    write_gguf_model(directory_, all_of(type), path_);
    RunningModel original(directory_);
    RunningModel model(path_);
    for (const GoldenText& text : golden_texts(directory_)) {
      EXPECT_LE(relative_difference(model.logits(text.ids), text.logits), 2e-5) << text.name;
      EXPECT_LE(relative_difference(model.logits(text.ids), original.logits(text.ids)), 1e-5);
    }
  }
}

double squared_error(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0;
  double square = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    error += std::pow(static_cast<double>(a[i]) - b[i], 2);
    square += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(error / square);
}

// Blocks run as the values that they stand for: a quantized file, and a float file of its values.
TEST_P(GgufModel, QuantizedFilesRunAsTheirValues) {
  const auto choose = [](const Linear& linear) {
    const bool whole = linear.in_features % 256 == 0;
    switch (linear.role) {
      case Role::kEmbedding:
      case Role::kHead: return whole ? GgmlType::kQ6K : GgmlType::kQ80;
      case Role::kQuery: return whole ? GgmlType::kQ5K : GgmlType::kQ51;
      case Role::kKey: return whole ? GgmlType::kQ4K : GgmlType::kQ50;
      case Role::kGate: return whole ? GgmlType::kIQ4XS : GgmlType::kIQ4NL;
      default: return GgmlType::kQ80;
    }
  };
  write_gguf_model(directory_, choose, path_);
  RunningModel model(path_);
  const auto checkpoint = open_checkpoint(path_);
  EXPECT_EQ(checkpoint->format(), "gguf");
  const GoldenText text = golden_texts(directory_).front();
  const double error = squared_error(model.logits(text.ids), text.logits);
  EXPECT_LE(error, 0.3);  // it is this model, not another one
  EXPECT_GE(error, 1e-4);  // and not in floats

  const ModelGraph graph = build_graph(checkpoint->config(), checkpoint->config_place());
  const auto source = open_checkpoint(directory_);
  for (const Linear& linear : graph.blocks.front().linears) {
    const StoredLinear stored =
        checkpoint->load_linear(linear.module, linear.out_features, linear.in_features);
    ASSERT_NE(stored.quantized, nullptr) << linear.module;
    EXPECT_TRUE(checkpoint->is_quantized(linear.module));
    const std::vector<float> values = stored.quantized->dequantize(testing::test_kernels());
    EXPECT_LE(squared_error(values, to_float(*source->tensors().find(linear.weight()))), 0.1)
        << linear.module;
  }
}

TEST(GgmlMatrix, IsSavedAndRestored) {
  const ScratchDirectory scratch;
  write_gguf_model(
      test_model("models/tiny-llama3"), all_of(GgmlType::kQ4K), scratch.path() / "m.gguf");
  const auto checkpoint = open_checkpoint(scratch.path() / "m.gguf");
  // Its rows are interleaved in the file.
  const StoredLinear stored = checkpoint->load_linear("model.layers.1.self_attn.q_proj", 256, 256);
  const QuantizedMatrix& matrix = *stored.quantized;
  EXPECT_EQ(matrix.kind(), "ggml");
  const std::vector<MatrixPart> parts = matrix.parts();
  ASSERT_EQ(parts.size(), 1U);
  EXPECT_EQ(parts[0].shape, (Shape{256, 144}));
  EXPECT_EQ(matrix.stored_bytes(), 256U * 144U);
  const TensorView view = {parts[0].dtype, parts[0].shape, parts[0].bytes};
  const PartReader reader = [&](const std::string& name) {
    return name == "blocks" ? &view : nullptr;
  };
  const Json parameters = matrix.parameters();
  const auto restore = [&](const Json& json, std::int64_t out, std::int64_t in) {
    return restore_matrix("ggml", out, in, JsonReader(json, "p"), reader, "m");
  };
  EXPECT_EQ(
      restore(parameters, 256, 256)->dequantize(testing::test_kernels()),
      matrix.dequantize(testing::test_kernels()));
  EXPECT_THROW((void)restore(parameters, 255, 256), ParseError);
  EXPECT_THROW((void)restore(parameters, 256, 128), ParseError);
  EXPECT_THROW((void)restore({{"type", "Q5_K"}}, 256, 256), ParseError);
  EXPECT_THROW((void)restore({{"type", "IQ2_XS"}}, 256, 256), ParseError);
  EXPECT_THROW((void)restore({{"type", "x"}}, 256, 256), ParseError);
  EXPECT_THROW((void)restore(Json::object(), 256, 256), ParseError);
  EXPECT_THROW(
      (void)GgmlMatrix::make(GgmlType::kQ4K, 1, 256, std::vector<std::byte>(143)),
      std::logic_error);
}

TEST(GgufConfig, WhatGgufReadersComputeOtherwiseIsNotWritten) {
  const auto refused = [](const std::string& model, const std::function<void(Json&)>& change) {
    Json config = read_json(test_model(model) / "config.json");
    change(config);
    try {
      const ModelGraph graph = build_graph(config, "config.json");
      (void)gguf_metadata(config, graph, "x", 0);
      ADD_FAILURE() << config.dump();
    } catch (const UnsupportedError& error) {
      EXPECT_EQ(exit_code(error.kind()), 3);
    }
  };
  const auto nothing = [](Json&) {};
  refused("random-models/mistral-window", nothing);
  const std::string qwen3 = "models/tiny-qwen3";
  refused(qwen3, [](Json& c) { c["attention_bias"] = true; });
  refused(qwen3, [](Json& c) {
    c["use_sliding_window"] = true;
    c["sliding_window"] = 64;
    c["max_window_layers"] = 1;
    c.erase("layer_types");
  });
  const auto scaling = [&](Json block) {
    refused(qwen3, [&](Json& c) { c["rope_parameters"] = block; });
  };
  scaling(
      {{"rope_type", "llama3"},
       {"rope_theta", 1e4},
       {"factor", 8},
       {"low_freq_factor", 1},
       {"high_freq_factor", 4},
       {"original_max_position_embeddings", 64}});
  scaling({{"rope_type", "yarn"}, {"rope_theta", 1e4}, {"factor", 4}, {"attention_factor", 1.2}});
  scaling({{"rope_type", "yarn"}, {"rope_theta", 1e4}, {"factor", 4}, {"truncate", false}});
}

TEST(GgufConfig, FileTypesHaveTheirNumbers) {
  EXPECT_EQ(gguf_file_type("Q4_K_M"), 15U);
  EXPECT_EQ(gguf_file_type("BF16"), 32U);
  EXPECT_EQ(gguf_file_type("IQ4_XS"), 30U);
  EXPECT_FALSE(gguf_file_type("Q4_K").has_value());
}

// Rebuilds a file with other metadata; `change` gets the pairs, or drops them by an empty key.
void rewrite(
    const std::filesystem::path& from,
    const std::filesystem::path& to,
    const std::function<void(GgufMetadata::Entry&)>& change,
    const std::function<void(GgufDeclaration&)>& rename) {
  const auto file = GgufFile::open(from);
  GgufMetadata metadata;
  for (GgufMetadata::Entry entry : file->metadata().entries()) {
    change(entry);
    if (!entry.key.empty()) {
      metadata.add(entry.key, entry.value);
    }
  }
  std::vector<GgufDeclaration> declarations;
  for (const GgufTensor& tensor : file->tensors()) {
    declarations.push_back({tensor.name, tensor.type, tensor.shape});
    rename(declarations.back());
  }
  GgufWriter writer(to, plan_gguf(metadata, declarations));
  for (std::size_t i = 0; i < declarations.size(); ++i) {
    const std::uint64_t bytes = writer.layout().slots.at(declarations[i].name).bytes;
    std::vector<std::byte> data(bytes);
    const auto& old = file->tensors()[i].bytes;
    std::copy_n(old.begin(), std::min<std::size_t>(bytes, old.size()), data.begin());
    writer.write(declarations[i].name, data);
  }
  writer.finish();
}

class ForgedGgufModel : public ::testing::Test {
 protected:
  void SetUp() override {
    write_gguf_model(test_model("random-models/llama3-tied"), all_of(GgmlType::kQ80), good_);
  }

  void refused(
      const std::string& name,
      const std::function<void(GgufMetadata::Entry&)>& change,
      const std::function<void(GgufDeclaration&)>& rename = [](GgufDeclaration&) {}) {
    rewrite(good_, bad_, change, rename);
    try {
      (void)load_model(open_checkpoint(bad_));
      ADD_FAILURE() << name << ": was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(exit_code(error.kind()), 3) << name;
      const std::string text = error.three_lines();
      EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 3) << name << '\n' << text;
      if (std::getenv("QUERN_SHOW_ERRORS") != nullptr) {  // NOLINT(concurrency-mt-unsafe)
        std::cout << "[" << name << "]\n" << text;
      }
    }
  }
  // The value of a key replaced, or the key dropped.
  void key(const std::string& name, const GgufValue& value) {
    refused(name, [&](GgufMetadata::Entry& entry) {
      if (entry.key == name) {
        entry.value = value;
      }
    });
  }
  void without(const std::string& name) {
    refused("without " + name, [&](GgufMetadata::Entry& entry) {
      if (entry.key == name) {
        entry.key.clear();
      }
    });
  }
  // A key more, in the place of general.name.
  void also(const std::string& name, const GgufValue& value) {
    refused("with " + name, [&](GgufMetadata::Entry& entry) {
      if (entry.key == "general.name") {
        entry = {name, value};
      }
    });
  }
  void tensor(const std::string& name, const std::function<void(GgufDeclaration&)>& change) {
    refused(
        name,
        [](GgufMetadata::Entry&) {},
        [&](GgufDeclaration& declaration) {
          if (declaration.name == name) {
            change(declaration);
          }
        });
  }

  ScratchDirectory scratch_;
  std::filesystem::path good_ = scratch_.path() / "good.gguf";
  std::filesystem::path bad_ = scratch_.path() / "bad.gguf";
};

TEST_F(ForgedGgufModel, MetadataThatDoesNotDescribeTheTensorsIsRefused) {
  EXPECT_NO_THROW((void)load_model(open_checkpoint(good_)));
  key("general.architecture", std::string("bert"));
  key("general.architecture", std::uint32_t{1});
  key("general.architecture", std::string("qwen2"));
  for (const char* size :
       {"block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length"}) {
    const std::string name = std::string("llama.") + size;
    key(name, std::uint32_t{0});
    key(name, std::int64_t{-1});
    key(name, std::string("4"));
    key(name, std::uint64_t{0xffffffffffffffffU});
    if (std::string(size) != "context_length") {
      key(name, std::uint32_t{1000000});
      key(name, std::uint32_t{3});
    }
    if (std::string(size).find("_kv") == std::string::npos &&
        std::string(size).find("key") == std::string::npos) {
      without(name);
    }
  }
  without("general.architecture");
  without("llama.attention.layer_norm_rms_epsilon");
  key("llama.attention.layer_norm_rms_epsilon", -1.0F);
  key("llama.attention.layer_norm_rms_epsilon", true);
  key("llama.rope.freq_base", 0.0F);
  key("llama.rope.freq_base", std::nanf(""));
  key("llama.rope.dimension_count", std::uint32_t{8});
  key("llama.attention.value_length", std::uint32_t{8});
  also("llama.rope.scaling.type", std::string("yarn"));
  also("llama.expert_count", std::uint32_t{8});
  also("llama.attention.sliding_window", std::uint32_t{64});
  also("llama.logit_scale", 0.5F);
  also("llama.use_parallel_residual", true);
  also("tokenizer.ggml.eos_token_id", std::int32_t{-2});
}

TEST_F(ForgedGgufModel, TensorsThatDoNotFitAreRefused) {
  const std::string q = "blk.0.attn_q.weight";
  const auto renamed = [](const std::string& name) {
    return [name](GgufDeclaration& tensor) { tensor.name = name; };
  };
  tensor("token_embd.weight", renamed("token_types.weight"));
  tensor("output_norm.weight", renamed("output_norm.bias"));
  tensor(q, renamed("blk.0.attn_qkv.weight"));
  tensor(q, renamed("blk.0.attn_q_norm.weight"));
  tensor(q, renamed("blk.99.attn_q.weight"));
  tensor(q, [](GgufDeclaration& t) { t.shape = {32, 128}; });
  tensor(q, [](GgufDeclaration& t) { t.shape = {63, 64}; });
  tensor(q, [](GgufDeclaration& t) { t.shape = {64, 2, 32}; });
  tensor(q, [](GgufDeclaration& t) { t.shape = {64 * 64}; });
  tensor(q, [](GgufDeclaration& t) { t.shape = {0, 64}; });
  tensor(q, [](GgufDeclaration& t) { t.shape = {std::int64_t{1} << 40U, 0}; });
  tensor(q, [](GgufDeclaration& t) { t.type = GgmlType::kI8; });
  tensor(q, [](GgufDeclaration& t) {
    t.type = GgmlType::kIQ2XS;
    t.shape = {16, 256};
  });
  tensor("blk.1.ffn_up.weight", [](GgufDeclaration& t) { t.shape = {64, 64}; });
  tensor("blk.1.ffn_norm.weight", [](GgufDeclaration& t) { t.type = GgmlType::kQ80; });
  tensor("blk.1.ffn_norm.weight", [](GgufDeclaration& t) { t.shape = {32}; });
  tensor("rope_freqs.weight", [](GgufDeclaration& t) { t.type = GgmlType::kF16; });
  tensor("rope_freqs.weight", [](GgufDeclaration& t) { t.shape = {4}; });
  tensor("rope_freqs.weight", [](GgufDeclaration& t) { t.name = "rope_factors_long.weight"; });
}

// The tokenizer of the golden container has too few tokens to encode anything.
TEST(GgufTokenizer, ForgedOnesAreRefused) {
  const auto good = GgufFile::open(converted("tiny-qwen3.gguf"));
  const auto refused = [&](const std::string& name,
                           const std::function<void(GgufMetadata::Entry&)>& change) {
    GgufMetadata metadata("forged");
    for (GgufMetadata::Entry entry : good->metadata().entries()) {
      change(entry);
      if (!entry.key.empty()) {
        metadata.add(entry.key, entry.value);
      }
    }
    try {
      (void)tokenizer_from_gguf(metadata);
      ADD_FAILURE() << name << ": was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(exit_code(error.kind()), 3) << name;
    }
  };
  const auto key = [&](const std::string& name, const GgufValue& value) {
    refused(name, [&](GgufMetadata::Entry& entry) {
      if (entry.key == name) {
        entry.value = value;
      }
    });
  };
  for (const char* name : {"model", "pre", "tokens", "merges"}) {
    const std::string full = std::string("tokenizer.ggml.") + name;
    refused("without " + full, [&](GgufMetadata::Entry& entry) {
      if (entry.key == full) {
        entry.key.clear();
      }
    });
    key(full, std::uint32_t{1});
  }
  key("tokenizer.ggml.model", std::string("llama"));
  key("tokenizer.ggml.pre", std::string("tekken"));
  key("tokenizer.ggml.tokens", GgufArray(std::vector<std::string>{}));
  key("tokenizer.ggml.tokens", GgufArray(std::vector<std::string>(4096, "a")));
  key("tokenizer.ggml.token_type", GgufArray(std::vector<std::int32_t>{1, 1}));
  key("tokenizer.ggml.token_type", GgufArray(std::vector<float>(4096, 1)));
  key("tokenizer.ggml.token_type", GgufArray(std::vector<std::int32_t>(4096, 5)));
  key("tokenizer.ggml.merges", GgufArray(std::vector<std::string>{"ab"}));
  key("tokenizer.ggml.merges", GgufArray(std::vector<std::string>{"a b c"}));
  key("tokenizer.ggml.merges", GgufArray(std::vector<std::string>{"a \xff"}));
  key("tokenizer.ggml.eos_token_id", std::uint32_t{4096});
  key("tokenizer.ggml.eos_token_id", std::uint32_t{0xffffffffU});
  key("tokenizer.ggml.bos_token_id", std::string("a"));
  key("tokenizer.ggml.add_bos_token", std::uint32_t{1});
  refused("add_bos without bos", [](GgufMetadata::Entry& entry) {
    if (entry.key == "tokenizer.ggml.bos_token_id") {
      entry.key.clear();
    }
    if (entry.key == "tokenizer.ggml.add_bos_token") {
      entry.value = true;
    }
  });
}

using testing_files::lines_of;
using testing_files::qwen_tokenizer_json;
using testing_files::read_gz;
using testing_files::testdata;

TEST(GgufTokenizer, ReleasedVocabulariesComeBack) {
  const ScratchDirectory scratch;
  write_file(scratch.path() / "tokenizer.json", qwen_tokenizer_json("qwen3"));
  GgufMetadata metadata;
  add_gguf_tokenizer(metadata, scratch.path(), Json::object(), 151936);
  EXPECT_EQ(metadata.get_string("tokenizer.ggml.pre"), "qwen2");
  const std::vector<std::string>& tokens = metadata.get_strings("tokenizer.ggml.tokens");
  const std::vector<std::int64_t> types = metadata.get_ints("tokenizer.ggml.token_type");
  ASSERT_EQ(tokens.size(), 151936U);
  EXPECT_EQ(tokens[151644], "<|im_start|>");
  EXPECT_EQ(types[151644], 3);
  EXPECT_EQ(tokens[151667], "<think>");
  EXPECT_EQ(types[151667], 4);
  EXPECT_EQ(tokens[151900], "[PAD151900]");
  EXPECT_EQ(types[151900], 5);
  const Tokenizer tokenizer = tokenizer_from_gguf(metadata);
  std::size_t texts = 0;
  for (const std::string& line :
       lines_of(read_gz(testdata() / "golden/tokenizer/qwen3.jsonl.gz"))) {
    const Json json = parse_json(line, "golden");
    const std::string text = json.at("text");
    ASSERT_EQ(tokenizer.encode(text), json.at("ids").get<std::vector<std::int32_t>>()) << text;
    ++texts;
  }
  EXPECT_EQ(texts, 400U);
  EXPECT_THROW(
      add_gguf_tokenizer(metadata, scratch.path(), Json::object(), 151668), UnsupportedError);
}

TEST(GgufTokenizer, SplitPatternsAreToldApart) {
  const std::string qwen2 = read_file(test_model("models/tiny-qwen3") / "tokenizer.json");
  const Json document = parse_json(qwen2, "tokenizer.json");
  const auto name_of = [&](const char* pattern) {
    const ScratchDirectory scratch;
    Json json = document;
    for (Json& member : json["pre_tokenizer"]["pretokenizers"]) {
      if (member["type"] == "Split") {
        member["pattern"]["Regex"] = pattern;
      }
    }
    write_file(scratch.path() / "tokenizer.json", json.dump());
    GgufMetadata metadata;
    add_gguf_tokenizer(metadata, scratch.path(), Json::object(), 4096);
    return metadata.get_string("tokenizer.ggml.pre");
  };
  EXPECT_EQ(name_of(kQwen2Split), "qwen2");
  EXPECT_EQ(name_of(kQwen35Split), "qwen35");
  EXPECT_EQ(name_of(kLlama3Split), "llama-bpe");
  EXPECT_EQ(name_of(kGpt2Split), "gpt-2");
  EXPECT_THROW((void)name_of(R"(\p{L}+|\p{N}+)"), UnsupportedError);
}

TEST(GgufTokenizer, WhatGgufReadersWouldRunOtherwiseIsNotWritten) {
  const ScratchDirectory ranks;
  write_file(ranks.path() / "tokenizer.model", testing_files::llama3_model());
  GgufMetadata metadata;
  EXPECT_THROW(
      add_gguf_tokenizer(metadata, ranks.path(), Json::object(), 128256), UnsupportedError);
  EXPECT_THROW(
      add_gguf_tokenizer(metadata, test_model("models/stories260K"), Json::object(), 512),
      UnsupportedError);
}

}  // namespace
}  // namespace quern
