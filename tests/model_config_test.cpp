// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "model/graph.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <string>
#include <vector>

namespace quern {
namespace {

Json base_config(const std::string& family) {
  return {
      {"model_type", family},
      {"architectures", {"AnyForCausalLM"}},
      {"hidden_act", "silu"},
      {"vocab_size", 320},
      {"hidden_size", 64},
      {"num_hidden_layers", 3},
      {"num_attention_heads", 4},
      {"num_key_value_heads", 2},
      {"head_dim", 16},
      {"intermediate_size", 96},
      {"max_position_embeddings", 128},
      {"rms_norm_eps", 1e-6},
      {"rope_theta", 1e6},
      {"tie_word_embeddings", true},
      {"torch_dtype", "bfloat16"}};
}

ModelGraph graph_of(const Json& config) {
  return build_graph(config, "config.json");
}

Json with(Json config, const std::string& key, const Json& value) {
  config[key] = value;
  return config;
}

Json without(Json config, const std::string& key) {
  config.erase(key);
  return config;
}

const std::vector<std::string> kFamilies = {"qwen3", "qwen2", "llama", "mistral"};

// "" when the config is refused as E with kind kInput and the key in the message; else what
// happened instead.
template <class E>
std::string fault_of_refusal(const Json& config, const std::string& key) {
  try {
    (void)graph_of(config);
  } catch (const E& error) {
    if (error.kind() != ErrorKind::kInput) {
      return "another kind";
    }
    return error.where().find(key) == std::string::npos ? "the place is " + error.where() : "";
  } catch (const std::exception& error) {
    return std::string("another error: ") + error.what();
  }
  return "accepted";
}

TEST(ModelConfig, EveryFamilyTakesThePlainConfig) {
  for (const std::string& family : kFamilies) {
    const ModelGraph graph = graph_of(base_config(family));
    EXPECT_EQ(graph.config.family, family);
    EXPECT_EQ(graph.blocks.size(), 3U);
    EXPECT_EQ(graph.blocks[0].has_qk_norm, family == "qwen3");
    EXPECT_EQ(graph.blocks[0].linears[kQ].has_bias, family == "qwen2");
    EXPECT_EQ(graph.blocks[0].linears[kV].has_bias, family == "qwen2");
    EXPECT_FALSE(graph.blocks[0].linears[kO].has_bias);
  }
}

TEST(ModelConfig, WhatWouldChangeTheComputationIsRefused) {
  struct Case {
    std::string key;
    Json value;
  };
  const std::vector<Case> cases = {
      {"hidden_act", "gelu"},
      {"hidden_act", "gelu_pytorch_tanh"},
      {"hidden_act", 3},
      {"partial_rotary_factor", 0.5},
      {"partial_rotary_factor", "1"},
      {"num_experts", 8},
      {"num_local_experts", 8},
      {"n_routed_experts", 8},
      {"attn_logit_softcapping", 50.0},
      {"final_logit_softcapping", 30.0},
      {"query_pre_attn_scalar", 256},
      {"logit_scale", 0.0625},
      {"embedding_multiplier", 12.0},
      {"residual_multiplier", 0.22},
      {"attention_multiplier", 0.0078125},
      {"clip_qkv", 8.0},
      {"alibi", true},
      {"torch_dtype", "float8_e4m3fn"},
      {"num_key_value_heads", 3},
      {"head_dim", 15},
      {"layer_types", {"full_attention", "linear_attention", "full_attention"}},
      {"layer_types", {"full_attention", 3, "full_attention"}},
      {"layer_types", {"full_attention", nullptr, "full_attention"}},
      {"eos_token_id", "</s>"},
      {"eos_token_id", 1.5},
      {"eos_token_id", {1, "x"}},
      {"eos_token_id", Json::object()},
  };
  for (const std::string& family : kFamilies) {
    for (const Case& c : cases) {
      EXPECT_EQ(
          fault_of_refusal<UnsupportedError>(with(base_config(family), c.key, c.value), c.key), "")
          << family << ": " << c.key << " = " << c.value;
    }
    // Null is as good as absent.
    EXPECT_NO_THROW((void)graph_of(with(base_config(family), "num_experts", nullptr)));
    EXPECT_NO_THROW((void)graph_of(with(base_config(family), "partial_rotary_factor", 1)));
  }
  EXPECT_EQ(
      fault_of_refusal<UnsupportedError>(
          with(base_config("llama"), "pretraining_tp", 2), "pretraining_tp"),
      "");
}

TEST(ModelConfig, UnknownFamiliesAreToldTheKnownOnes) {
  for (const char* type : {"qwen3_vl_moe", "qwen4_exp", "gemma3", "QWEN3", ""}) {
    try {
      (void)graph_of(base_config(type));
      FAIL() << type;
    } catch (const UnsupportedError& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kInput);
      for (const std::string& family : kFamilies) {
        EXPECT_NE(error.reason().find(family), std::string::npos);
      }
    }
  }
  EXPECT_EQ(
      fault_of_refusal<ParseError>(with(base_config("x"), "model_type", 3), "model_type"), "");
  EXPECT_EQ(
      fault_of_refusal<ParseError>(without(base_config("x"), "model_type"), "model_type"), "");
  EXPECT_EQ(fault_of_refusal<ParseError>(Json::array(), "config.json"), "");
}

TEST(ModelConfig, NumbersOutOfRangeAreRefused) {
  const std::vector<Json> bad = {
      -1, 0, INT64_MAX, INT64_MIN, UINT64_MAX, 2.5, "64", true, Json::array(), Json::object()};
  for (const char* key :
       {"vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "max_position_embeddings"}) {
    for (const Json& value : bad) {
      EXPECT_EQ(fault_of_refusal<ParseError>(with(base_config("qwen3"), key, value), key), "")
          << key << " = " << value;
    }
  }
  const std::vector<Json> not_positive = {-1e-6, 0, 0.0, -0.0, "1e-6", true};
  for (const char* key : {"rms_norm_eps", "rope_theta"}) {
    for (const Json& value : not_positive) {
      EXPECT_EQ(fault_of_refusal<ParseError>(with(base_config("qwen3"), key, value), key), "")
          << key << " = " << value;
    }
  }
  for (const char* key :
       {"vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size"}) {
    EXPECT_EQ(fault_of_refusal<ParseError>(without(base_config("qwen3"), key), key), "");
  }
  EXPECT_EQ(
      fault_of_refusal<ParseError>(
          with(base_config("qwen3"), "tie_word_embeddings", 1), "tie_word_embeddings"),
      "");
  EXPECT_EQ(
      fault_of_refusal<ParseError>(
          with(base_config("qwen3"), "layer_types", {"full_attention"}), "layer_types"),
      "");
  EXPECT_EQ(
      fault_of_refusal<ParseError>(
          with(base_config("qwen3"), "layer_types", "full_attention"), "layer_types"),
      "");
}

TEST(ModelConfig, EndTokensAreIdsThatFitAnId) {
  EXPECT_EQ(
      graph_of(with(base_config("qwen3"), "eos_token_id", 7)).config.eos_ids,
      (std::vector<std::int32_t>{7}));
  EXPECT_EQ(
      graph_of(with(base_config("qwen3"), "eos_token_id", {7, 9})).config.eos_ids,
      (std::vector<std::int32_t>{7, 9}));
  EXPECT_TRUE(graph_of(with(base_config("qwen3"), "eos_token_id", nullptr)).config.eos_ids.empty());
  for (const Json& bad : {Json(std::int64_t{1} << 32), Json(UINT64_MAX), Json(INT64_MIN)}) {
    EXPECT_EQ(
        fault_of_refusal<UnsupportedError>(
            with(base_config("qwen3"), "eos_token_id", bad), "eos_token_id"),
        "")
        << bad;
  }
}

TEST(ModelConfig, AbsentKeysHaveTheDefaultsOfTheFamily) {
  EXPECT_EQ(graph_of(without(base_config("qwen3"), "head_dim")).config.head_dim, 128);
  for (const char* family : {"qwen2", "llama", "mistral"}) {
    EXPECT_EQ(graph_of(without(base_config(family), "head_dim")).config.head_dim, 16);
  }
  const ModelGraph many = graph_of(without(base_config("qwen2"), "num_key_value_heads"));
  EXPECT_EQ(many.config.kv_heads, 4);
  EXPECT_EQ(many.blocks[0].linears[kK].out_features, 64);
  // Not tied unless the file says so.
  const ModelGraph untied = graph_of(without(base_config("qwen3"), "tie_word_embeddings"));
  EXPECT_FALSE(untied.head_tied);
  EXPECT_EQ(untied.head.module, "lm_head");
}

TEST(ModelConfig, BiasesFollowTheConfig) {
  const ModelGraph qwen3 = graph_of(with(base_config("qwen3"), "attention_bias", true));
  EXPECT_TRUE(qwen3.blocks[2].linears[kO].has_bias);
  EXPECT_FALSE(qwen3.blocks[2].linears[kDownProj].has_bias);
  const ModelGraph llama = graph_of(with(base_config("llama"), "mlp_bias", true));
  EXPECT_FALSE(llama.blocks[2].linears[kQ].has_bias);
  EXPECT_TRUE(llama.blocks[2].linears[kGateProj].has_bias);
  EXPECT_TRUE(llama.blocks[2].linears[kDownProj].has_bias);
}

TEST(Rope, PlainFrequenciesArePowersOfTheta) {
  const Rope rope = graph_of(base_config("qwen3")).config.rope;
  ASSERT_EQ(rope.inverse_frequencies.size(), 8U);
  EXPECT_EQ(rope.attention_factor, 1.0F);
  for (std::size_t m = 0; m < 8; ++m) {
    EXPECT_FLOAT_EQ(
        rope.inverse_frequencies[m],
        static_cast<float>(std::exp(-std::log(1e6) * static_cast<double>(m) / 8)));
  }
}

TEST(Rope, ThetaIsRequiredWhereTheDefaultIsWrong) {
  for (const char* family : {"qwen3", "qwen2"}) {
    EXPECT_EQ(
        fault_of_refusal<ParseError>(without(base_config(family), "rope_theta"), "rope_theta"), "");
  }
  for (const char* family : {"llama", "mistral"}) {
    const Rope rope = graph_of(without(base_config(family), "rope_theta")).config.rope;
    EXPECT_FLOAT_EQ(rope.inverse_frequencies[4], 0.01F);
  }
}

// `scaling` in the three places and spellings that transformers has written.
std::vector<Json> spellings(const Json& scaling) {
  const Json base = base_config("qwen3");
  Json old = scaling;
  old["type"] = old["rope_type"];
  old.erase("rope_type");
  Json parameters = scaling;
  parameters["rope_theta"] = 1e6;
  return {
      with(base, "rope_scaling", scaling),
      with(base, "rope_scaling", old),
      with(without(base, "rope_theta"), "rope_parameters", parameters)};
}

TEST(Rope, AllSpellingsAreOne) {
  for (const Json& scaling :
       {Json{{"rope_type", "default"}},
        Json{{"rope_type", "linear"}, {"factor", 4}},
        Json{{"rope_type", "yarn"}, {"factor", 4}, {"original_max_position_embeddings", 32}},
        Json{
            {"rope_type", "llama3"},
            {"factor", 8},
            {"low_freq_factor", 1},
            {"high_freq_factor", 4},
            {"original_max_position_embeddings", 32}}}) {
    const std::vector<Json> configs = spellings(scaling);
    const Rope first = graph_of(configs.front()).config.rope;
    const Rope plain = graph_of(base_config("qwen3")).config.rope;
    EXPECT_EQ(
        first.inverse_frequencies == plain.inverse_frequencies, scaling["rope_type"] == "default");
    for (const Json& config : configs) {
      const Rope rope = graph_of(config).config.rope;
      EXPECT_EQ(rope.inverse_frequencies, first.inverse_frequencies) << config;
      EXPECT_EQ(rope.attention_factor, first.attention_factor) << config;
    }
  }
}

TEST(Rope, ScaledFrequenciesStayBetweenPlainAndDivided) {
  const Rope plain = graph_of(base_config("qwen3")).config.rope;
  for (const Json& config : spellings(
           {{"rope_type", "llama3"},
            {"factor", 8},
            {"low_freq_factor", 1},
            {"high_freq_factor", 4},
            {"original_max_position_embeddings", 32}})) {
    const Rope rope = graph_of(config).config.rope;
    // Wavelengths 2 pi 1e6^(m/8): 6.28, 35.3, … - short (below 32/4), then long (above 32/1).
    EXPECT_EQ(rope.inverse_frequencies[0], plain.inverse_frequencies[0]);
    for (std::size_t m = 1; m < 8; ++m) {
      EXPECT_FLOAT_EQ(rope.inverse_frequencies[m], plain.inverse_frequencies[m] / 8);
    }
  }
  const Rope linear =
      graph_of(spellings({{"rope_type", "linear"}, {"factor", 4}}).front()).config.rope;
  EXPECT_FLOAT_EQ(linear.inverse_frequencies[0], 0.25F);
  const Rope yarn =
      graph_of(spellings(
                   {{"rope_type", "yarn"}, {"factor", 4}, {"original_max_position_embeddings", 32}})
                   .front())
          .config.rope;
  EXPECT_FLOAT_EQ(yarn.attention_factor, static_cast<float>(0.1 * std::log(4.0) + 1));
  EXPECT_FLOAT_EQ(yarn.inverse_frequencies[0], 1.0F);
  EXPECT_FLOAT_EQ(yarn.inverse_frequencies[7], plain.inverse_frequencies[7] / 4);
}

TEST(Rope, UnknownTypesAndBrokenParametersAreRefused) {
  for (const char* type : {"dynamic", "longrope", "su", "ntk", ""}) {
    for (const Json& config : spellings({{"rope_type", type}, {"factor", 2}})) {
      EXPECT_EQ(fault_of_refusal<UnsupportedError>(config, "rope_type"), "") << config;
    }
  }
  for (const Json& config :
       spellings({{"rope_type", "default"}, {"partial_rotary_factor", 0.25}})) {
    EXPECT_EQ(fault_of_refusal<UnsupportedError>(config, "partial_rotary_factor"), "") << config;
  }
  for (const Json& bad : {Json(0), Json(-2.0), Json("2"), Json(nullptr)}) {
    for (const char* type : {"linear", "yarn", "llama3"}) {
      for (const Json& config : spellings(
               {{"rope_type", type},
                {"factor", bad},
                {"low_freq_factor", 1},
                {"high_freq_factor", 4},
                {"original_max_position_embeddings", 32}})) {
        EXPECT_EQ(fault_of_refusal<ParseError>(config, "factor"), "") << config;
      }
    }
  }
  for (const Json& config : spellings(
           {{"rope_type", "llama3"},
            {"factor", 8},
            {"low_freq_factor", 4},
            {"high_freq_factor", 4},
            {"original_max_position_embeddings", 32}})) {
    EXPECT_EQ(fault_of_refusal<ParseError>(config, "high_freq_factor"), "") << config;
  }
  EXPECT_EQ(
      fault_of_refusal<ParseError>(
          with(base_config("qwen3"), "rope_scaling", "yarn"), "rope_scaling"),
      "");
  // One set of parameters for each kind of layer (Gemma, ModernBERT): not read, so not taken.
  EXPECT_EQ(
      fault_of_refusal<UnsupportedError>(
          with(
              base_config("llama"),
              "rope_parameters",
              {{"full_attention", {{"rope_theta", 1e6}, {"rope_type", "default"}}},
               {"sliding_attention", {{"rope_theta", 1e4}, {"rope_type", "default"}}}}),
          "rope_parameters"),
      "");
}

// Whatever a file says: an angle that is no number would make every logit one.
TEST(Rope, FrequenciesAreFiniteOrRefused) {
  const Json yarn = {
      {"rope_type", "yarn"}, {"factor", 4}, {"original_max_position_embeddings", 32}};
  const Json base = base_config("qwen3");
  const std::vector<Json> configs = {
      with(base, "rope_theta", 1e-300),
      with(with(base, "rope_theta", 1), "rope_scaling", yarn),
      with(base, "rope_scaling", with(yarn, "beta_fast", -1)),
      with(base, "rope_scaling", with(yarn, "beta_slow", 0)),
      with(base, "rope_scaling", with(yarn, "beta_fast", 1e308)),
      with(base, "rope_scaling", with(yarn, "attention_factor", 1e300)),
      with(base, "rope_scaling", with(with(yarn, "mscale", 1e308), "mscale_all_dim", -1e308)),
      with(
          base,
          "rope_scaling",
          with(with(yarn, "mscale", 1), "mscale_all_dim", -7.213475204444817)),
      with(base, "rope_scaling", {{"rope_type", "linear"}, {"factor", 1e-300}}),
      with(base, "rope_scaling", with(yarn, "factor", 1e-300))};
  for (const Json& config : configs) {
    try {
      const Rope rope = graph_of(config).config.rope;
      EXPECT_TRUE(std::isfinite(rope.attention_factor)) << config;
      for (const float f : rope.inverse_frequencies) {
        ASSERT_TRUE(std::isfinite(f)) << config;
      }
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kInput);
    }
  }
}

std::vector<std::int64_t> windows_of(const Json& config) {
  std::vector<std::int64_t> windows;
  for (const Block& block : graph_of(config).blocks) {
    windows.push_back(block.sliding_window);
  }
  return windows;
}

TEST(SlidingWindow, IsOnWhereTheFamilySaysSo) {
  using Windows = std::vector<std::int64_t>;
  for (const char* family : {"qwen3", "qwen2"}) {
    Json config = with(base_config(family), "sliding_window", 32);
    EXPECT_EQ(windows_of(config), (Windows{0, 0, 0}));
    config["use_sliding_window"] = true;
    EXPECT_EQ(windows_of(config), (Windows{0, 0, 0}));  // max_window_layers is 28 when absent
    config["max_window_layers"] = 1;
    EXPECT_EQ(windows_of(config), (Windows{0, 32, 32}));
    config["layer_types"] = {"sliding_attention", "full_attention", "sliding_attention"};
    EXPECT_EQ(windows_of(config), (Windows{32, 0, 32}));
    config["sliding_window"] = nullptr;
    EXPECT_EQ(fault_of_refusal<ParseError>(config, "sliding_window"), "");
  }
  EXPECT_EQ(windows_of(with(base_config("mistral"), "sliding_window", 32)), (Windows{32, 32, 32}));
  EXPECT_EQ(
      windows_of(with(base_config("mistral"), "sliding_window", nullptr)), (Windows{0, 0, 0}));
  EXPECT_EQ(windows_of(with(base_config("llama"), "sliding_window", 32)), (Windows{0, 0, 0}));
  for (const Json& bad : {Json(0), Json(-5), Json("x"), Json(1.5)}) {
    EXPECT_EQ(
        fault_of_refusal<ParseError>(
            with(base_config("mistral"), "sliding_window", bad), "sliding_window"),
        "");
  }
}

// The whole graph as text, for the snapshots.
std::string graph_text(const ModelGraph& graph) {
  const ModelConfig& c = graph.config;
  const std::vector<float>& f = c.rope.inverse_frequencies;
  std::string text = fmt::format(
      "family {} architecture {} dtype {} eos {}\n",
      c.family,
      c.architecture,
      dtype_name(c.dtype),
      fmt::join(c.eos_ids, " "));
  text += fmt::format(
      "vocab {} hidden {} layers {} heads {}/{} of {} inner {} positions {} eps {:g}\n",
      c.vocab_size,
      c.hidden_size,
      c.layers,
      c.heads,
      c.kv_heads,
      c.head_dim,
      c.intermediate_size,
      c.max_positions,
      c.norm_eps);
  text += fmt::format(
      "rope {} frequencies {:g} {:.6g} ... {:.6g} factor {:g}\n",
      f.size(),
      f[0],
      f[1],
      f.back(),
      c.rope.attention_factor);
  text += fmt::format("embedding {}\n", graph.embedding.weight());
  text += fmt::format(
      "head {} {}x{}{}\n",
      graph.head.module,
      graph.head.out_features,
      graph.head.in_features,
      graph.head_tied ? " tied" : "");
  text += fmt::format("norm {} {}\n", graph.final_norm.tensor, graph.final_norm.size);
  text += fmt::format("linear parameters {}\n", graph.linear_parameters());
  for (const Block& block : graph.blocks) {
    text += fmt::format("block {} window {}\n", block.index, block.sliding_window);
    std::vector<const Norm*> norms = {&block.attention_norm, &block.mlp_norm};
    if (block.has_qk_norm) {
      norms.insert(norms.end(), {&block.q_norm, &block.k_norm});
    }
    for (const Norm* norm : norms) {
      text += fmt::format("  norm {} {}\n", norm->tensor, norm->size);
    }
    for (const Linear& linear : block.linears) {
      text += fmt::format(
          "  {} {} {}x{}{}\n",
          role_name(linear.role),
          linear.module,
          linear.out_features,
          linear.in_features,
          linear.has_bias ? " bias" : "");
    }
    for (const CalibrationSite& site : block.sites) {
      text += fmt::format("  site {} {}:", site.name, site.width);
      for (const int index : site.linears) {
        text +=
            fmt::format(" {}", role_name(block.linears.at(static_cast<std::size_t>(index)).role));
      }
      text += "\n";
    }
  }
  return text;
}

TEST(ModelGraph, ReleasedConfigurationsGiveTheReleasedShapes) {
  for (const char* name : {"Qwen3-4B-2507", "Qwen2.5-0.5B-4layers"}) {
    const std::filesystem::path directory =
        std::filesystem::path(QUERN_TESTDATA) / "configs" / name;
    const ModelGraph graph = build_graph(read_json(directory / "config.json"), name);
    EXPECT_EQ(graph_text(graph), read_file(directory / "graph.txt")) << name;
  }
}

}  // namespace
}  // namespace quern
