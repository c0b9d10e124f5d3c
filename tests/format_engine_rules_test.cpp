// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "format/engine_rules.h"

#include <gtest/gtest.h>

#include <algorithm>
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
  module.is_embedding = true;
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

}  // namespace
}  // namespace quern
