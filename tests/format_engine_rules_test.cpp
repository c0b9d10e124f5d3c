// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/awq.h"
#include "format/compressed_tensors_config.h"
#include "format/engine_rules.h"
#include "format/gptq_config.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

namespace quern {
namespace {

// Two layers of a Qwen3 with 16 heads, 8 of them for keys and values.
EngineModel model_of(const std::string& format, const QuantScheme& scheme) {
  EngineModel model;
  model.format = format;
  model.family = "qwen3";
  model.heads = 16;
  model.kv_heads = 8;
  const auto add =
      [&](const std::string& name, std::int64_t out, std::int64_t in, EngineSplit split) {
        EngineModule module;
        module.name = name;
        module.out_features = out;
        module.in_features = in;
        module.split = split;
        module.scheme = scheme;
        module.scale_dtype = DType::kBF16;
        model.modules.push_back(module);
      };
  for (int layer = 0; layer < 2; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    add(prefix + "self_attn.q_proj", 2048, 1024, EngineSplit::kOutputs);
    add(prefix + "self_attn.k_proj", 1024, 1024, EngineSplit::kKeyValueHeads);
    add(prefix + "self_attn.v_proj", 1024, 1024, EngineSplit::kKeyValueHeads);
    add(prefix + "self_attn.o_proj", 1024, 2048, EngineSplit::kInputs);
    add(prefix + "mlp.gate_proj", 3072, 1024, EngineSplit::kOutputs);
    add(prefix + "mlp.up_proj", 3072, 1024, EngineSplit::kOutputs);
    add(prefix + "mlp.down_proj", 1024, 3072, EngineSplit::kInputs);
  }
  return model;
}

EngineVerdict verdict(const std::string& engine, const EngineModel& model) {
  return judge(find_engine(engine), model);
}
bool loads(const std::string& engine, const EngineModel& model) {
  return verdict(engine, model).problems.empty();
}
bool mentions(const std::vector<std::string>& lines, const std::string& part) {
  return std::any_of(lines.begin(), lines.end(), [&](const std::string& line) {
    return line.find(part) != std::string::npos;
  });
}

EngineModule embedding_of(const QuantScheme& scheme) {
  EngineModule module;
  module.name = "model.embed_tokens";
  module.out_features = 4096;
  module.in_features = 1024;
  module.scheme = scheme;
  module.scale_dtype = DType::kBF16;
  module.kind = EngineKind::kEmbedding;
  module.split = EngineSplit::kNone;
  return module;
}

constexpr QuantScheme kUsual{4, true, 128};

// formats.md 1.7.
TEST(EngineRules, Gptq) {
  struct Row {
    QuantScheme scheme;
    bool vllm;
    bool sglang;
  };
  for (const Row& row : std::vector<Row>{
           {{4, true, 128}, true, true},
           {{8, true, 32}, true, true},
           {{8, true, 0}, true, true},
           {{4, false, 128}, false, true},
           {{8, false, 128}, false, true},
           {{2, true, 128}, false, true},
           {{3, true, 128}, false, true},
           {{4, true, 256}, false, true},
           {{4, true, 16}, false, true}}) {
    const EngineModel model = model_of("gptq", row.scheme);
    const std::string label = std::to_string(row.scheme.bits) + " " +
                              std::to_string(row.scheme.group_size) + " " +
                              std::to_string(row.scheme.symmetric);
    EXPECT_EQ(loads("vllm", model), row.vllm) << label;
    EXPECT_EQ(loads("sglang", model), row.sglang) << label;
    EXPECT_TRUE(loads("transformers", model)) << label;
    EXPECT_FALSE(loads("llama.cpp", model)) << label;
  }
  EXPECT_FALSE(loads("sglang", model_of("gptq_p", {4, true, 128})));
  EXPECT_FALSE(loads("sglang", model_of("gptq_p", {5, true, 128})));
}

TEST(EngineRules, DescActIsRefusedByVllmUnlessItMeansNothing) {
  EngineModel model = model_of("gptq", kUsual);
  model.says_desc_act = true;
  EXPECT_FALSE(loads("vllm", model));
  EXPECT_TRUE(mentions(verdict("vllm", model).problems, "desc_act"));
  EXPECT_TRUE(loads("sglang", model));
  EngineModel whole_rows = model_of("gptq", {4, true, 0});
  whole_rows.says_desc_act = true;
  EXPECT_TRUE(loads("vllm", whole_rows));
}

TEST(EngineRules, PartsOfAMergedModuleMustAgree) {
  for (const char* format : {"gptq", "compressed-tensors"}) {
    EngineModel model = model_of(format, kUsual);
    model.modules[1].scheme = QuantScheme{8, true, 128};  // k_proj
    EXPECT_FALSE(loads("vllm", model)) << format;
    EXPECT_FALSE(loads("sglang", model)) << format;
    EXPECT_TRUE(mentions(verdict("vllm", model).problems, "self_attn.k_proj")) << format;
    model.modules[1].scheme.reset();
    EXPECT_FALSE(loads("vllm", model)) << format;
    model = model_of(format, kUsual);
    model.modules[6].scheme = QuantScheme{8, true, 128};  // down_proj stands alone
    EXPECT_TRUE(loads("vllm", model)) << format;
  }
  EngineModel mixed = model_of("gptq", kUsual);
  mixed.modules[6].scheme = QuantScheme{8, true, 128};
  EXPECT_FALSE(loads("transformers", mixed));  // optimum knows no `dynamic`
  mixed.format = "compressed-tensors";
  EXPECT_TRUE(loads("transformers", mixed));
}

TEST(EngineRules, CompressedTensors) {
  for (int bits = 2; bits <= 8; ++bits) {
    for (const bool symmetric : {true, false}) {
      const EngineModel model = model_of("compressed-tensors", {bits, symmetric, 128});
      EXPECT_TRUE(loads("vllm", model)) << bits;
      const bool marlin = bits == 4 || (bits == 8 && symmetric);
      EXPECT_NE(mentions(verdict("vllm", model).notes, "Humming"), marlin) << bits;
      EXPECT_EQ(loads("sglang", model), bits == 4 || bits == 8) << bits;
      EXPECT_EQ(loads("transformers", model), symmetric) << bits;
    }
  }
  EXPECT_TRUE(mentions(
      verdict("vllm", model_of("compressed-tensors", {4, true, 256})).notes, "no Marlin kernel"));
  EngineModel act_order = model_of("compressed-tensors", kUsual);
  act_order.modules[0].act_order = true;
  EXPECT_FALSE(loads("vllm", act_order));
  EngineModel odd = model_of("compressed-tensors", {4, true, 0});
  odd.modules[6].in_features = 3076;
  EXPECT_FALSE(loads("vllm", odd));
  EngineModel halves = model_of("compressed-tensors", kUsual);
  halves.modules[0].scale_dtype = DType::kF16;
  EXPECT_TRUE(mentions(verdict("vllm", halves).notes, "rounded to the dtype"));
  EXPECT_TRUE(verdict("vllm", model_of("compressed-tensors", kUsual)).notes.empty());
}

TEST(EngineRules, IntegerInputs) {
  const auto with_inputs = [](const QuantScheme& scheme, int bits, bool dynamic) {
    EngineModel model = model_of("compressed-tensors", scheme);
    for (EngineModule& module : model.modules) {
      module.activation.bits = bits;
      module.activation.dynamic = dynamic;
    }
    return model;
  };
  for (const bool dynamic : {true, false}) {
    const EngineModel w8a8 = with_inputs({8, true, 0}, 8, dynamic);
    EXPECT_TRUE(loads("vllm", w8a8));
    EXPECT_TRUE(loads("sglang", w8a8));
  }
  EXPECT_TRUE(loads("vllm", with_inputs({4, true, 128}, 8, true)));
  EXPECT_FALSE(loads("sglang", with_inputs({4, true, 128}, 8, true)));
  EXPECT_FALSE(loads("vllm", with_inputs({4, true, 128}, 8, false)));
  EXPECT_FALSE(loads("vllm", with_inputs({8, true, 128}, 8, true)));
  EXPECT_FALSE(loads("vllm", with_inputs({8, false, 0}, 8, true)));
  EXPECT_FALSE(loads("vllm", with_inputs({8, true, 0}, 4, true)));
}

TEST(EngineRules, Embeddings) {
  const auto with_embedding = [](const QuantScheme& scheme) {
    EngineModel model = model_of("compressed-tensors", kUsual);
    model.modules.push_back(embedding_of(scheme));
    return model;
  };
  EXPECT_TRUE(loads("vllm", with_embedding({8, true, 128})));
  EXPECT_TRUE(loads("vllm", with_embedding({2, true, 0})));
  EXPECT_FALSE(loads("vllm", with_embedding({3, true, 128})));
  EXPECT_FALSE(loads("vllm", with_embedding({4, false, 128})));
  EXPECT_FALSE(loads("sglang", with_embedding({8, true, 128})));
  EXPECT_FALSE(loads("transformers", with_embedding({8, true, 128})));
  EngineModel tied = with_embedding({8, true, 128});
  tied.tied = true;
  EXPECT_FALSE(loads("vllm", tied));
  EngineModel other = with_embedding({8, true, 128});
  other.family = "qwen3_5";
  EXPECT_FALSE(loads("vllm", other));
  EngineModel gptq = with_embedding({8, true, 128});
  gptq.format = "gptq";
  EXPECT_FALSE(loads("vllm", gptq));
}

TEST(EngineRules, Containers) {
  const EngineModel ours = model_of("quern", kUsual);
  EngineModel dense = model_of("dense", kUsual);
  EngineModel gguf = model_of("gguf", kUsual);
  for (EngineModel* model : {&dense, &gguf}) {
    for (EngineModule& module : model->modules) {
      module.scheme.reset();
    }
  }
  for (const char* engine : {"vllm", "sglang", "transformers"}) {
    EXPECT_FALSE(loads(engine, ours)) << engine;
    EXPECT_TRUE(loads(engine, dense)) << engine;
    EXPECT_EQ(loads(engine, gguf), std::string(engine) != "vllm") << engine;
    EXPECT_TRUE(loads(engine, model_of("awq", kUsual))) << engine;
  }
  EXPECT_FALSE(loads("llama.cpp", dense));
  EXPECT_TRUE(loads("llama.cpp", gguf));
  EXPECT_THROW((void)find_engine("ollama"), UsageError);
  EXPECT_EQ(engines().size(), 4U);
}

// Dimension / devices must stay a multiple of the group size: 3072 in groups of 128 are 24 groups.
TEST(EngineRules, LargestTensorParallelSize) {
  EXPECT_EQ(largest_tensor_parallel(model_of("gptq", {4, true, 128})), 8);
  EXPECT_EQ(largest_tensor_parallel(model_of("gptq", {4, true, 32})), 16);
  EXPECT_EQ(largest_tensor_parallel(model_of("gptq", {4, true, 1024})), 1);
  EXPECT_EQ(largest_tensor_parallel(model_of("compressed-tensors", {4, true, 512})), 2);
  EXPECT_EQ(largest_tensor_parallel(model_of("gptq", {4, true, 0})), 16);
  EngineModel dense = model_of("dense", kUsual);
  for (EngineModule& module : dense.modules) {
    module.scheme.reset();
  }
  EXPECT_EQ(largest_tensor_parallel(dense), 16);  // as many as heads
  dense.heads = 14;
  dense.kv_heads = 2;
  EXPECT_EQ(largest_tensor_parallel(dense), 2);
  // Words along the outputs: 3072 / 16 = 192 zero points of 3 bits are 18 words, 24 are not whole.
  EngineModel three = model_of("gptq", {3, true, 32});
  EXPECT_EQ(largest_tensor_parallel(three), 16);
  three.modules[4].out_features = 3072 + 16;
  EXPECT_EQ(largest_tensor_parallel(three), 1);
}

// --- mixtures of experts and DeltaNet ------------------------------------------------------------

// A Qwen3.5-MoE with vision tower and draft layer: DeltaNet in layer 0, attention in layer 1, two
// experts in each. Routers, gates, tower and draft keep their floats.
EngineModel moe_model(const std::string& format, const QuantScheme& scheme = kUsual) {
  EngineModel model;
  model.format = format;
  model.family = "qwen3_5_moe";
  model.multimodal = true;
  model.heads = 16;
  model.kv_heads = 4;
  model.experts = 16;
  model.delta_net = {16, 32};
  const auto add = [&](const std::string& name,
                       std::int64_t out,
                       std::int64_t in,
                       EngineSplit split,
                       EngineKind kind = EngineKind::kLinear,
                       bool quantized = true) {
    EngineModule module;
    module.name = name;
    module.out_features = out;
    module.in_features = in;
    module.split = split;
    module.kind = kind;
    module.scale_dtype = DType::kBF16;
    if (quantized) {
      module.scheme = scheme;
    }
    model.modules.push_back(module);
  };
  constexpr EngineSplit kAll = EngineSplit::kNone;
  for (int layer = 0; layer < 2; ++layer) {
    const std::string prefix = "model.language_model.layers." + std::to_string(layer) + ".";
    if (layer == 0) {
      add(prefix + "linear_attn.in_proj_qkv", 8192, 2048, EngineSplit::kOutputs);
      add(prefix + "linear_attn.in_proj_z", 4096, 2048, EngineSplit::kOutputs);
      for (const char* gate : {"in_proj_b", "in_proj_a"}) {
        add(prefix + "linear_attn." + gate,
            32,
            2048,
            EngineSplit::kOutputs,
            EngineKind::kLinear,
            false);
      }
      add(prefix + "linear_attn.out_proj", 2048, 4096, EngineSplit::kInputs);
    } else {
      add(prefix + "self_attn.q_proj", 8192, 2048, EngineSplit::kOutputs);
      add(prefix + "self_attn.k_proj", 1024, 2048, EngineSplit::kKeyValueHeads);
      add(prefix + "self_attn.v_proj", 1024, 2048, EngineSplit::kKeyValueHeads);
      add(prefix + "self_attn.o_proj", 2048, 4096, EngineSplit::kInputs);
    }
    add(prefix + "mlp.gate", 16, 2048, kAll, EngineKind::kGate, false);
    add(prefix + "mlp.shared_expert_gate", 1, 2048, kAll, EngineKind::kGate, false);
    for (const std::string expert : {"shared_expert", "experts.0", "experts.1"}) {
      const EngineKind kind = expert == "shared_expert" ? EngineKind::kLinear : EngineKind::kExpert;
      add(prefix + "mlp." + expert + ".gate_proj", 512, 2048, EngineSplit::kOutputs, kind);
      add(prefix + "mlp." + expert + ".up_proj", 512, 2048, EngineSplit::kOutputs, kind);
      add(prefix + "mlp." + expert + ".down_proj", 2048, 512, EngineSplit::kInputs, kind);
    }
  }
  for (const char* beside :
       {"model.visual.blocks.0.attn.qkv",
        "model.visual.merger.linear_fc1",
        "mtp.fc",
        "mtp.layers.0.self_attn.q_proj",
        "mtp.layers.0.mlp.experts.0.down_proj"}) {
    add(beside, 0, 0, kAll, EngineKind::kBeside, false);
  }
  return model;
}

EngineModule& module_of(EngineModel& model, const std::string& end) {
  return *std::find_if(model.modules.begin(), model.modules.end(), [&](const EngineModule& each) {
    return each.name.ends_with(end);
  });
}

void for_experts_of(
    EngineModel& model,
    const std::string& layer,
    const std::function<void(EngineModule&)>& change) {
  for (EngineModule& module : model.modules) {
    if (module.name.find("." + layer + ".mlp.experts.") != std::string::npos &&
        !module.name.starts_with("mtp")) {
      change(module);
    }
  }
}

// What quern writes for such a model.
Json written_config(const EngineModel& model) {
  std::vector<GptqModule> gptq;
  std::vector<SchemedModule> awq;
  std::vector<CompressedModule> compressed;
  for (const EngineModule& module : model.modules) {
    gptq.push_back({module.name, module.scheme});
    awq.push_back({module.name, {}});
    compressed.push_back({module.name, {}});
    if (module.scheme) {
      awq.back().scheme = ModuleScheme{*module.scheme};
      CompressedForm form;
      form.scheme = *module.scheme;
      form.activation = module.activation;
      form.layout =
          module.activation.active() ? CompressedLayout::kInteger : CompressedLayout::kPacked;
      compressed.back().form = form;
    }
  }
  if (model.format == "gptq") {
    return gptq_config_json(kUsual, GptqVersion::kV1, gptq);
  }
  return model.format == "awq" ? awq_config_json(kUsual, awq) : compressed_config_json(compressed);
}

EngineModel written(EngineModel model) {
  model.quantization = written_config(model);
  return model;
}

TEST(EngineRulesMoe, WhatQuernWritesLoads) {
  for (const char* format : {"gptq", "awq", "compressed-tensors"}) {
    const EngineVerdict found = verdict("vllm", written(moe_model(format)));
    EXPECT_TRUE(found.problems.empty()) << format << ": " << found.problems.front();
    // Layer 1 in 8 bits, experts of layer 0 in floats.
    EngineModel mixed = moe_model(format);
    if (std::string(format) != "awq") {
      for_experts_of(mixed, "1", [](EngineModule& each) { each.scheme = {8, true, 128}; });
    }
    for_experts_of(mixed, "0", [](EngineModule& each) { each.scheme.reset(); });
    const EngineVerdict other = verdict("vllm", written(mixed));
    EXPECT_TRUE(other.problems.empty()) << format << ": " << other.problems.front();
  }
}

TEST(EngineRulesMoe, TheConfigurationExceptsWhatKeepsItsFloats) {
  const Json ignore = written_config(moe_model("compressed-tensors"))["ignore"];
  const auto matches = [&](const std::string& name) {
    return std::any_of(ignore.begin(), ignore.end(), [&](const Json& entry) {
      const auto text = entry.get<std::string>();
      return text.starts_with("re:") ? ModulePattern(text.substr(3), "t").matches(name)
                                     : text == name;
    });
  };
  for (const char* name :
       {"language_model.model.layers.0.mlp.gate",
        "language_model.model.layers.1.mlp.shared_expert_gate",
        "language_model.model.layers.0.linear_attn.in_proj_a",
        "language_model.model.layers.0.linear_attn.in_proj_ba",
        "visual.blocks.0.attn.qkv",
        "model.visual.merger.linear_fc1",
        "mtp.layers.0.mlp.experts",
        "mtp.fc",
        "lm_head",
        "language_model.lm_head"}) {
    EXPECT_TRUE(matches(name)) << name;
  }
  for (const char* name :
       {"language_model.model.layers.0.mlp.experts.0.gate_proj",
        "language_model.model.layers.0.mlp.shared_expert.gate_proj",
        "language_model.model.layers.0.linear_attn.in_proj_qkvz"}) {
    EXPECT_FALSE(matches(name)) << name;
  }
  const Json skipped = written_config(moe_model("awq"))["modules_to_not_convert"];
  EXPECT_NE(std::find(skipped.begin(), skipped.end(), "visual."), skipped.end());
  EXPECT_NE(std::find(skipped.begin(), skipped.end(), "mtp."), skipped.end());
}

TEST(EngineRulesMoe, ExpertsOfALayerAreAlike) {
  for (const char* format : {"gptq", "compressed-tensors"}) {
    for (const char* expert : {"1.mlp.experts.1.down_proj", "0.mlp.experts.0.gate_proj"}) {
      EngineModel model = moe_model(format);
      module_of(model, expert).scheme = QuantScheme{8, true, 128};
      EXPECT_TRUE(mentions(verdict("vllm", model).problems, "different schemes")) << format;
      module_of(model, expert).scheme.reset();  // a rare expert that was left out
      EXPECT_TRUE(mentions(verdict("vllm", model).problems, "different schemes")) << format;
    }
    EngineModel delta = moe_model(format);
    module_of(delta, "in_proj_z").scheme.reset();
    EXPECT_TRUE(mentions(verdict("vllm", delta).problems, "in_proj_z")) << format;
    EngineModel gates = moe_model(format);
    module_of(gates, "in_proj_a").scheme = kUsual;
    EXPECT_TRUE(mentions(verdict("vllm", gates).problems, "in_proj_a")) << format;
  }
}

TEST(EngineRulesMoe, RoutersAndSharedGatesStayInFloats) {
  for (const char* gate : {"0.mlp.gate", "1.mlp.shared_expert_gate"}) {
    EngineModel model = moe_model("compressed-tensors");
    module_of(model, gate).scheme = kUsual;
    EXPECT_TRUE(mentions(verdict("vllm", model).problems, "routers and gates")) << gate;
  }
}

TEST(EngineRulesMoe, ExpertsHaveFewerSchemesThanLinears) {
  for (const int bits : {2, 3, 4, 5, 6, 7, 8}) {
    EngineModel model = moe_model("compressed-tensors", {bits, true, 128});
    EXPECT_EQ(mentions(verdict("vllm", model).problems, "4 or 8 bits only"), bits != 4 && bits != 8)
        << bits;
  }
  for (const bool dynamic : {true, false}) {
    EngineModel model = moe_model("compressed-tensors", {8, true, 0});
    for (EngineModule& module : model.modules) {
      if (module.scheme) {
        module.activation.bits = 8;
        module.activation.dynamic = dynamic;
      }
    }
    EXPECT_EQ(loads("vllm", written(model)), dynamic);
  }
  EngineModel partial = moe_model("gptq");
  for_experts_of(partial, "0", [](EngineModule& each) {
    each.in_features = each.in_features == 512 ? 320 : each.in_features;
  });
  EXPECT_TRUE(mentions(verdict("vllm", partial).problems, "whole words and groups"));
}

// Rules that are right for the names of the file only.
TEST(EngineRulesMoe, ConfigurationsAreAskedUnderTheEnginesNames) {
  const auto misfit = [](const EngineModel& model, const std::string& name) {
    EXPECT_TRUE(mentions(verdict("vllm", model).problems, "under vLLM's names")) << name;
    EXPECT_TRUE(mentions(verdict("vllm", model).problems, name)) << name;
  };
  EngineModel gptq = moe_model("gptq");
  for_experts_of(gptq, "0", [](EngineModule& each) { each.scheme.reset(); });
  gptq.quantization = {
      {"quant_method", "gptq"},
      {"bits", 4},
      {"group_size", 128},
      {"sym", true},
      {"desc_act", false}};
  gptq.quantization["dynamic"]["-:.*mtp.*"] = Json::object();
  misfit(gptq, "language_model.model.layers.0.mlp.experts");
  gptq.quantization["dynamic"][R"(-:model\.language_model\.layers\.0\.mlp\.experts)"] =
      Json::object();
  misfit(gptq, "language_model.model.layers.0.mlp.experts");
  gptq.quantization["dynamic"][R"(-:.*\.layers\.0\.mlp\.experts)"] = Json::object();
  EXPECT_TRUE(loads("vllm", gptq));
  // The parts of a merged module only.
  EngineModel eight = moe_model("gptq");
  for (const char* name : {"q_proj", "k_proj", "v_proj"}) {
    module_of(eight, std::string("self_attn.") + name).scheme = QuantScheme{8, true, 128};
  }
  eight.quantization = gptq.quantization;
  eight.quantization["dynamic"] = Json::object();
  eight.quantization["dynamic"]["-:.*mtp.*"] = Json::object();
  eight.quantization["dynamic"][R"(+:.*\.self_attn\.(q|k|v)_proj$)"] = {{"bits", 8}};
  misfit(eight, "self_attn.qkv_proj");

  EngineModel compressed = written(moe_model("compressed-tensors"));
  Json kept = Json::array();
  for (const Json& entry : compressed.quantization["ignore"]) {
    if (entry.get<std::string>().find("visual") == std::string::npos) {
      kept.push_back(entry);
    }
  }
  EngineModel tower = compressed;
  tower.quantization["ignore"] = kept;
  misfit(tower, "visual.");
  // Names are mapped with the modules, expressions are not.
  tower.quantization["ignore"].push_back("model.visual.blocks.0.attn.qkv");
  tower.quantization["ignore"].push_back("model.visual.merger.linear_fc1");
  EXPECT_TRUE(loads("vllm", tower));
  tower.quantization["ignore"] = kept;
  tower.quantization["ignore"].push_back(R"(re:model\.visual\..*)");
  misfit(tower, "visual.");

  EngineModel awq = written(moe_model("awq"));
  awq.quantization["modules_to_not_convert"] = {
      "lm_head", "mlp.gate", "in_proj_a", "in_proj_b", "mtp."};
  misfit(awq, "visual.");
}

TEST(EngineRulesMoe, DraftLayersNeedARuleInGptq) {
  EngineModel model = written(moe_model("gptq"));
  ASSERT_TRUE(loads("vllm", model));
  model.quantization["dynamic"].erase("-:.*mtp.*");
  EXPECT_TRUE(mentions(verdict("vllm", model).problems, "-:.*mtp.*"));
  EngineModel quantized = moe_model("gptq");
  for (EngineModule& module : quantized.modules) {
    if (module.name.starts_with("mtp.layers.")) {
      module.scheme = kUsual;
    }
  }
  EXPECT_TRUE(loads("vllm", written(quantized)));
  quantized.quantization = model.quantization;
  quantized.quantization["dynamic"]["-:.*mtp.*"] = Json::object();
  EXPECT_TRUE(mentions(verdict("vllm", quantized).problems, "draft layers"));
}

TEST(EngineRulesMoe, TensorParallelSizes) {
  // 512 inputs of experts in groups of 128 are four; shared gates and routers are on every device.
  EXPECT_EQ(largest_tensor_parallel(moe_model("gptq")), 4);
  EXPECT_EQ(largest_tensor_parallel(moe_model("compressed-tensors", {4, true, 32})), 16);
  EngineModel heads = moe_model("compressed-tensors", {4, true, 32});
  heads.delta_net = {2, 32};
  EXPECT_EQ(largest_tensor_parallel(heads), 2);
  EngineModel experts = moe_model("compressed-tensors", {4, true, 32});
  experts.experts = 8;
  EXPECT_EQ(largest_tensor_parallel(experts), 8);
}

}  // namespace
}  // namespace quern
