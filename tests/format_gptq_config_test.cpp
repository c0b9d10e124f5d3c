// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/gptq_config.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace quern {
namespace {

GptqConfig read(const std::string& text) {
  return read_gptq_config(parse_json(text, "test"), "test");
}

TEST(GptqConfig, ReadsEveryNameOfAKey) {
  const GptqConfig plain = read(R"({"bits":4,"group_size":128,"desc_act":true,"lm_head":true})");
  EXPECT_EQ(plain.scheme, (QuantScheme{4, true, 128}));
  EXPECT_EQ(plain.version, GptqVersion::kV1);
  EXPECT_TRUE(plain.desc_act);
  EXPECT_TRUE(plain.lm_head);
  const GptqConfig alias =
      read(R"({"w_bit":8,"q_group_size":-1,"zero_point":true,"version":"gptq_v2","bits":null})");
  EXPECT_EQ(alias.scheme, (QuantScheme{8, false, 0}));
  EXPECT_EQ(alias.version, GptqVersion::kV2);
  EXPECT_EQ(read(R"({"wbits":3,"group_size":64,"format":"gptq_p"})").version, GptqVersion::kPlanar);
  EXPECT_FALSE(read(R"({"bits":4,"group_size":64,"sym":false})").scheme.symmetric);
  EXPECT_NO_THROW((void)read(R"({"bits":4,"group_size":64,"rotation":"","adapter":{}})"));
}

TEST(GptqConfig, TheSecondPlaceFillsInAndMustAgree) {
  const Json first = parse_json(R"({"bits":4,"group_size":128})", "config.json");
  const Json second = parse_json(
      R"({"bits":4,"group_size":128,"sym":false,"checkpoint_format":"gptq_v2"})", "quantize");
  const GptqConfig config = read_gptq_config(first, "config.json", &second, "quantize");
  EXPECT_EQ(config.version, GptqVersion::kV2);
  EXPECT_FALSE(config.scheme.symmetric);
  const Json other = parse_json(R"({"bits":8})", "quantize");
  EXPECT_THROW((void)read_gptq_config(first, "config.json", &other, "quantize"), ParseError);
}

TEST(GptqConfig, RulesMatchFromTheStartAndTheFirstWins) {
  const GptqConfig config = read(R"({"bits":4,"group_size":128,"dynamic":{
      "-:.*\\.mlp\\.gate$": {},
      "+:.*\\.layers\\.(0|1)\\.": {"bits":8,"group_size":-1},
      ".*down_proj": {"bits":2,"sym":false},
      "layers": {"bits":3},
      "-:.*\\.layers\\.0\\.": {}}})");
  EXPECT_EQ(config.scheme_for("model.layers.0.mlp.down_proj"), (QuantScheme{8, true, 0}));
  EXPECT_EQ(config.scheme_for("model.layers.2.mlp.down_proj"), (QuantScheme{2, false, 128}));
  EXPECT_EQ(config.scheme_for("model.layers.2.mlp.up_proj"), (QuantScheme{4, true, 128}));
  EXPECT_EQ(config.scheme_for("model.layers.2.mlp.gate"), std::nullopt);
}

constexpr QuantScheme kFour{4, true, 128};
constexpr QuantScheme kEight{8, true, 32};

std::vector<GptqModule> qwen_layer(int layer, QuantScheme attention, QuantScheme mlp) {
  const std::string prefix = "model.language_model.layers." + std::to_string(layer) + ".";
  return {
      {prefix + "self_attn.q_proj", attention},
      {prefix + "self_attn.k_proj", attention},
      {prefix + "self_attn.v_proj", attention},
      {prefix + "self_attn.o_proj", attention},
      {prefix + "mlp.gate", std::nullopt},
      {prefix + "mlp.experts.0.gate_proj", mlp},
      {prefix + "mlp.experts.0.up_proj", mlp},
      {prefix + "mlp.experts.0.down_proj", mlp},
      {prefix + "mlp.experts.1.gate_proj", mlp},
      {prefix + "mlp.experts.1.up_proj", mlp},
      {prefix + "mlp.experts.1.down_proj", mlp},
      {prefix + "mlp.shared_expert.gate_proj", mlp},
      {prefix + "mlp.shared_expert.up_proj", mlp},
      {prefix + "mlp.shared_expert.down_proj", mlp}};
}

std::vector<GptqModule> mixed_model() {
  std::vector<GptqModule> modules;
  for (int layer = 0; layer < 12; ++layer) {
    const auto more =
        qwen_layer(layer, layer % 3 == 0 ? kEight : kFour, layer == 1 ? kEight : kFour);
    modules.insert(modules.end(), more.begin(), more.end());
  }
  modules.push_back({"lm_head", std::nullopt});
  modules.push_back({"mtp.fc", std::nullopt});
  modules.push_back({"mtp.layers.0.self_attn.q_proj", std::nullopt});
  modules.push_back({"model.visual.blocks.0.attn.qkv", std::nullopt});
  return modules;
}

TEST(GptqConfig, WrittenRulesGiveEveryModuleItsScheme) {
  const std::vector<GptqModule> modules = mixed_model();
  const Json json = gptq_config_json(kFour, GptqVersion::kV1, modules);
  const GptqConfig config = read_gptq_config(json, "test");
  EXPECT_EQ(config.scheme, kFour);
  for (const GptqModule& module : modules) {
    if (module.name != "lm_head") {
      EXPECT_EQ(config.scheme_for(module.name), module.scheme) << module.name;
    }
  }
  EXPECT_FALSE(config.lm_head);
}

TEST(GptqConfig, WrittenRulesFitTheEnginesNames) {
  const Json json = gptq_config_json(kFour, GptqVersion::kV1, mixed_model());
  const GptqConfig config = read_gptq_config(json, "test");
  // vLLM's own names of the merged modules.
  const std::string prefix = "language_model.model.layers.";
  EXPECT_EQ(config.scheme_for(prefix + "3.self_attn.qkv_proj"), kEight);
  EXPECT_EQ(config.scheme_for(prefix + "4.self_attn.qkv_proj"), kFour);
  EXPECT_EQ(config.scheme_for(prefix + "1.mlp.experts"), kEight);
  EXPECT_EQ(config.scheme_for(prefix + "10.mlp.experts"), kFour);
  EXPECT_EQ(config.scheme_for(prefix + "1.mlp.shared_expert.gate_up_proj"), kEight);
  EXPECT_EQ(config.scheme_for(prefix + "1.mlp.gate"), std::nullopt);
  EXPECT_EQ(config.scheme_for("visual.blocks.0.attn.qkv"), std::nullopt);
  bool positive = false;
  bool mtp = false;
  for (const auto& [key, value] : json["dynamic"].items()) {
    EXPECT_EQ(key.substr(1, 3), ":.*") << key;
    EXPECT_FALSE(positive && key[0] == '-') << "a rule that excludes stands behind others";
    positive = positive || key[0] == '+';
    mtp = mtp || key == "-:.*mtp.*";
  }
  EXPECT_TRUE(positive);
  EXPECT_TRUE(mtp);
}

TEST(GptqConfig, WritesTheKeysThatEnginesRequire) {
  const std::vector<GptqModule> modules = {{"lm_head", kFour}};
  const Json json = gptq_config_json(
      {8, false, 0}, GptqVersion::kV2, modules, parse_json(R"({"damp_percent":0.05})", ""));
  EXPECT_EQ(json["quant_method"], "gptq");
  EXPECT_EQ(json["bits"], 8);
  EXPECT_EQ(json["group_size"], -1);
  EXPECT_EQ(json["desc_act"], false);
  EXPECT_EQ(json["sym"], false);
  EXPECT_EQ(json["lm_head"], true);
  EXPECT_EQ(json["checkpoint_format"], "gptq_v2");
  EXPECT_EQ(json["format"], "gptq_v2");
  EXPECT_EQ(json["pack_dtype"], "int32");
  EXPECT_EQ(json["meta"]["quantizer"][0].get<std::string>().rfind("quern:", 0), 0U);
  EXPECT_EQ(json["meta"]["damp_percent"], 0.05);
  EXPECT_EQ(json["dynamic"].dump(), R"({"+:.*lm_head$":{"bits":4,"group_size":128,"sym":true}})");
  EXPECT_FALSE(gptq_config_json(kFour, GptqVersion::kV1, modules).contains("dynamic"));
}

TEST(GptqConfig, RefusesMixesThatEnginesCannotExpress) {
  std::vector<GptqModule> modules = qwen_layer(0, kFour, kFour);
  modules[1].scheme = kEight;  // k_proj
  EXPECT_THROW((void)gptq_config_json(kFour, GptqVersion::kV1, modules), UnsupportedError);
  modules = qwen_layer(0, kFour, kFour);
  modules[10].scheme = std::nullopt;  // one projection of one expert
  EXPECT_THROW((void)gptq_config_json(kFour, GptqVersion::kV1, modules), UnsupportedError);
  modules = {{"mtp.layers.0.mlp.up_proj", kFour}, {"mtp.layers.0.mlp.down_proj", std::nullopt}};
  EXPECT_THROW((void)gptq_config_json(kFour, GptqVersion::kV1, modules), UnsupportedError);
}

TEST(GptqConfig, QuantizedDraftLayersKeepTheirOwnScheme) {
  std::vector<GptqModule> modules = qwen_layer(0, kEight, kFour);
  modules.push_back({"mtp.layers.0.self_attn.o_proj", kFour});
  const GptqConfig config =
      read_gptq_config(gptq_config_json(kFour, GptqVersion::kV1, modules), "test");
  for (const GptqModule& module : modules) {
    EXPECT_EQ(config.scheme_for(module.name), module.scheme) << module.name;
  }
}

}  // namespace
}  // namespace quern
