// SPDX-License-Identifier: Apache-2.0
#include "run_binary.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

// quantize, export, compare and verify --engine through the program.
namespace quern {
namespace {

namespace fs = std::filesystem;

using testing::bundled_model;
using testing::error_of;
using testing::run_quern;
using testing::RunResult;
using testing::ScratchDirectory;

using Words = std::vector<std::string>;

class Formats : public ::testing::Test {
 protected:
  [[nodiscard]] std::string at(const std::string& name) const {
    return (scratch_.path() / name).string();
  }
  [[nodiscard]] RunResult quantize(const std::string& format, const Words& more = {}) const {
    Words words = {"quantize", model_, "-o", at(format), "--method", "rtn", "--format", format};
    words.insert(words.end(), more.begin(), more.end());
    return run_quern(words);
  }
  static Json json_of(Words words) {
    words.emplace_back("--json");
    const RunResult result = run_quern(words);
    EXPECT_EQ(result.code, 0) << result.err;
    return result.json();
  }
  static void refused(int code, const Words& words, const std::string& part) {
    const RunResult result = run_quern(words);
    EXPECT_EQ(result.code, code) << result.err;
    EXPECT_NE(error_of(result).find(part), std::string::npos) << result.err;
  }

  ScratchDirectory scratch_;
  std::string model_ = bundled_model("tiny-qwen2.5");
};

TEST_F(Formats, EveryFormatIsWrittenVerifiedAndComparesEqualAfterExport) {
  for (const std::string format : {"awq", "compressed-tensors", "quern"}) {
    SCOPED_TRACE(format);
    ASSERT_EQ(quantize(format).code, 0);
    const Json verified = json_of({"verify", at(format), "--against", model_});
    EXPECT_EQ(verified["format"], format);
    EXPECT_EQ(verified["quantized_linears"], 28);
    EXPECT_EQ(verified["against"]["quantized_linears"], 28);
    EXPECT_TRUE(verified["problems"].empty());
    const Json exported =
        json_of({"export", at(format), "-o", at(format + "-gptq"), "--format", "gptq"});
    EXPECT_EQ(exported["schema"], "quern.export/1");
    EXPECT_EQ(exported["output"], at(format + "-gptq"));
    EXPECT_EQ(exported["linears"].size(), 28U);
    EXPECT_TRUE(fs::exists(at(format + "-gptq") + "/tokenizer.json"));
    const Json same = json_of({"compare", at(format), at(format + "-gptq"), "--weights-only"});
    EXPECT_EQ(same["schema"], "quern.compare/1");
    EXPECT_EQ(same["summary"]["equal_linears"], same["summary"]["linears"]);
    EXPECT_EQ(run_quern({"verify", at(format + "-gptq"), "--engine", "vllm"}).code, 0);
  }
  EXPECT_EQ(run_quern({"verify", at("quern"), "--engine", "vllm"}).code, 1);
}

TEST_F(Formats, CompareRunsBothEndToEnd) {
  ASSERT_EQ(quantize("gptq").code, 0);
  const Json document =
      json_of({"compare", model_, at("gptq"), "--windows", "2", "--context", "128"});
  EXPECT_EQ(document["a"]["format"], "dense");
  EXPECT_EQ(document["b"]["format"], "gptq");
  EXPECT_GT(document["summary"]["rms_relative_difference"].get<double>(), 0.01);
  EXPECT_EQ(document["end_to_end"]["windows"], 2);
  EXPECT_GT(document["end_to_end"]["kl_mean"].get<double>(), 0);
  const Json same = json_of({"compare", model_, model_, "--windows", "1", "--context", "64"});
  EXPECT_EQ(same["end_to_end"]["kl_mean"], 0.0);
  EXPECT_EQ(same["end_to_end"]["top1_agreement"], 1.0);
  const RunResult text = run_quern({"compare", model_, at("gptq"), "--windows", "1"});
  EXPECT_NE(text.out.find("top-1 agreement"), std::string::npos);
}

TEST_F(Formats, MixedPlansAreWrittenWhereTheyCanBe) {
  ASSERT_EQ(run_quern({"plan", model_, "--method", "rtn", "-o", at("plan.json")}).code, 0);
  Json plan = read_json(at("plan.json"));
  for (Json& linear : plan["linears"]) {
    if (linear["name"].get<std::string>().ends_with("down_proj")) {
      linear["group_size"] = 64;
    }
  }
  write_file(at("plan.json"), plan.dump());
  refused(
      3,
      {"quantize", model_, "-o", at("x"), "--plan", at("plan.json"), "--format", "awq"},
      "one scheme for all modules");
  ASSERT_EQ(
      run_quern({"quantize",
                 model_,
                 "-o",
                 at("compressed-tensors"),
                 "--plan",
                 at("plan.json"),
                 "--format",
                 "compressed-tensors"})
          .code,
      0);
  const Json verified = json_of({"verify", at("compressed-tensors"), "--engine", "vllm"});
  EXPECT_TRUE(verified["problems"].empty());
  refused(
      3,
      {"export", at("compressed-tensors"), "-o", at("x"), "--format", "awq"},
      "formats that hold this model");
  EXPECT_FALSE(fs::exists(at("x")));
}

// Forms that only quern's own container holds, and blocks of a GGUF file.
TEST_F(Formats, OtherFormsGoToTheContainerAndToDense) {
  ASSERT_EQ(quantize("quern", {"--embedding-bits", "mixed:100"}).code, 0);
  ASSERT_EQ(
      run_quern(
          {"quantize", model_, "-o", at("m.gguf"), "--method", "rtn", "--format", "gguf:Q4_0"})
          .code,
      0);
  for (const std::string source : {"quern", "m.gguf"}) {
    SCOPED_TRACE(source);
    for (const Words& target : {Words{"quern"}, Words{"dense", "--dtype", "float32"}}) {
      const std::string out = at(source + "-" + target[0]);
      Words words = {"export", at(source), "-o", out, "--format"};
      words.insert(words.end(), target.begin(), target.end());
      const Json exported = json_of(words);
      EXPECT_EQ(exported["format"], target[0]);
      const Json same = json_of({"compare", at(source), out, "--weights-only"});
      EXPECT_EQ(same["summary"]["equal_linears"], same["summary"]["linears"]);
    }
    refused(
        3,
        {"export", at(source), "-o", at("x"), "--format", "compressed-tensors"},
        "formats that hold this model: dense with --dtype float32, quern");
    refused(3, {"export", at(source), "-o", at("x"), "--format", "gguf:Q8_0"}, "quern quantize");
    EXPECT_EQ(run_quern({"verify", at(source), "--engine", "vllm"}).code, 1);
  }
  EXPECT_EQ(run_quern({"verify", at("m.gguf"), "--engine", "llama.cpp"}).code, 0);
}

TEST_F(Formats, OneRunWritesSeveral) {
  const Words also = {"--also", "compressed-tensors", "--also", "quern"};
  ASSERT_EQ(quantize("gptq", also).code, 0);
  ASSERT_EQ(quantize("quern", {"--also", "compressed-tensors", "--embedding-bits", "8"}).code, 0);
  for (const std::string other : {"compressed-tensors", "quern"}) {
    SCOPED_TRACE(other);
    const Json same = json_of({"compare", at("gptq"), at("gptq-" + other), "--weights-only"});
    EXPECT_EQ(same["summary"]["equal_linears"], same["summary"]["linears"]);
    EXPECT_EQ(same["b"]["format"], other);
  }
  EXPECT_EQ(quantize("gptq", also).code, 0);  // all there
  fs::remove_all(at("gptq-quern"));
  EXPECT_EQ(quantize("gptq", also).code, 0);  // what is missing is made
  EXPECT_TRUE(fs::exists(at("gptq-quern") + "/config.json"));
  refused(
      3,
      {"quantize", model_, "-o", at("x"), "--also", "gguf", "--method", "rtn"},
      "grids of its own");
  refused(
      3,
      {"quantize", model_, "-o", at("x"), "--also", "awq", "--method", "rtn", "--bits", "8"},
      "4 bits");
  EXPECT_FALSE(fs::exists(at("x")));
}

TEST_F(Formats, AnImportanceMatrixStandsForText) {
  const std::string matrix = at("m.imatrix.gguf");
  ASSERT_EQ(quantize("gptq", {"--samples", "8", "--imatrix-out", matrix}).code, 0);
  EXPECT_TRUE(fs::exists(matrix));
  const auto error = [&](const std::string& name, const Words& more) {
    Words words = {"quantize", model_, "-o", at(name), "--format", "gguf:Q2_K", "--method", "rtn"};
    words.insert(words.end(), more.begin(), more.end());
    EXPECT_EQ(run_quern(words).code, 0);
    return json_of({"compare", model_, at(name), "--windows", "4"})["end_to_end"]["kl_mean"]
        .get<double>();
  };
  EXPECT_LT(error("with.gguf", {"--imatrix", matrix}), 0.8 * error("without.gguf", {}));
  // GPTQ on a diagonal: no feedback, but weighted ranges and scales.
  const Json made =
      json_of({"quantize", model_, "-o", at("diagonal"), "--imatrix", matrix, "--bits", "3"});
  EXPECT_EQ(made["calibration"]["samples"], 0);
  EXPECT_EQ(made["linears"][0]["tokens"], 8 * 512);
  refused(
      2,
      {"quantize", model_, "-o", at("x"), "--imatrix", matrix, "--recipe", "best"},
      "is not enough");
  refused(
      2,
      {"quantize", model_, "-o", at("x"), "--imatrix", matrix, "--linear-bpw", "3"},
      "is not enough");
  refused(
      2,
      {"quantize", bundled_model("tiny-qwen3"), "-o", at("x"), "--imatrix", matrix},
      "another model");
  refused(3, {"quantize", model_, "-o", at("x"), "--imatrix", model_ + "/config.json"}, "config");
  refused(
      2,
      {"quantize",
       model_,
       "-o",
       at("gptq"),
       "--method",
       "rtn",
       "--samples",
       "8",
       "--imatrix-out",
       at("other")},
      "--no-resume");
}

// A slip of the hand must not cost a model, a text or a night of work.
TEST_F(Formats, WhatIsWrittenBesideTheOutput) {
  const std::string model = at("model");
  fs::copy(model_, model, fs::copy_options::recursive);
  const std::string text = at("text.txt");
  write_file(text, std::string(50000, 'a'));
  const Words base = {"quantize", model, "-o", at("x"), "--method", "rtn"};
  const auto with = [&](const Words& more) {
    Words words = base;
    words.insert(words.end(), more.begin(), more.end());
    return words;
  };
  refused(2, with({"--imatrix-out", model + "/model.safetensors"}), "something else");
  refused(2, with({"--imatrix-out", text}), "something else");
  refused(2, with({"--imatrix-out", at("x") + "/m.imatrix"}), "in the output");
  refused(2, with({"--report", model + "/config.json"}), "something else");
  refused(2, with({"--report", model}), "a directory stands there");
  refused(2, with({"--report", at("x") + "/report.html"}), "in the output");
  refused(2, {"plan", model, "-o", model + "/config.json"}, "something else");
  fs::create_directories(at("x-awq"));
  write_file(at("x-awq") + "/mine.txt", "x");
  refused(2, with({"--also", "awq"}), "x-awq");
  for (const char* name : {"x", "x.run", "x.partial"}) {
    EXPECT_FALSE(fs::exists(at(name))) << name;
  }
  EXPECT_EQ(read_file(model + "/config.json"), read_file(model_ + "/config.json"));
  // Directories are made, and what these options wrote before is theirs.
  for (int i = 0; i < 2; ++i) {
    const RunResult result = run_quern(with(
        {"--force",
         "--report",
         at("new/report.html"),
         "--imatrix-out",
         at("new/m.imatrix"),
         "--samples",
         "2"}));
    EXPECT_EQ(result.code, 0) << result.err;
    EXPECT_EQ(run_quern({"plan", model, "-o", at("new/plan.json")}).code, 0);
  }
  refused(2, {"report", at("x"), "-o", at("x") + "/quantization_manifest.json"}, "something else");
}

TEST_F(Formats, GgufInADirectoryAndAsItIs) {
  ASSERT_EQ(quantize("gguf:Q4_0").code, 0);
  const std::string made = at("gguf:Q4_0");
  EXPECT_TRUE(fs::exists(made + "/model.gguf"));
  const Json verified = json_of({"verify", made, "--against", model_});
  EXPECT_TRUE(verified["problems"].empty()) << verified["problems"];
  const Json copied = json_of({"export", made, "-o", at("copy.gguf"), "--format", "gguf"});
  EXPECT_EQ(copied["format"], "gguf");
  EXPECT_EQ(read_file(at("copy.gguf")), read_file(made + "/model.gguf"));
  (void)json_of({"export", made, "-o", at("dense"), "--format", "dense"});
  EXPECT_EQ(run_quern({"verify", at("dense"), "--against", model_}).code, 0);
  refused(3, {"export", made, "-o", at("other.gguf"), "--format", "gguf:Q8_0"}, "quern quantize");
}

TEST_F(Formats, PlansSayWhatIsWrongWithThem) {
  ASSERT_EQ(run_quern({"plan", model_, "--method", "rtn", "-o", at("plan.json")}).code, 0);
  const Json plan = read_json(at("plan.json"));
  const auto edited = [&](const std::string& key, const Json& value, bool of_linear) {
    Json other = plan;
    (of_linear ? other["linears"][3] : other)[key] = value;
    write_file(at("edited.json"), other.dump());
    return Words{"quantize", model_, "-o", at("x"), "--plan", at("edited.json")};
  };
  refused(3, edited("method", "foo", true), "o_proj");
  refused(3, edited("method", "", true), "o_proj");
  refused(3, edited("bits", 1, true), "o_proj");
  refused(3, edited("shape", {1, 2}, true), "o_proj");
  refused(3, edited("transform", "zzz", false), "channel factors");
  refused(3, edited("schema", "zzz", false), "quern.plan/1");
  Words twice = edited("model", "any", false);
  twice.insert(twice.end(), {"--bits", "3"});
  refused(2, twice, "says this already");
  refused(
      3, {"plan", model_, "--format", "awq", "--linear-bpw", "4.3"}, "one scheme for all linears");
  refused(2, {"plan", model_, "--format", "gguf:Q3_K", "--bpw", "6"}, "leaves nothing to plan");
  refused(2, {"plan", model_, "--embedding-bits", "5", "--format", "quern"}, "16, 8, 6, 4");
  refused(2, {"plan", model_, "--activation-scale", "static"}, "--activation-bits");
}

// Families that run and are not quantized yet are refused before anything is made.
// Engines are told what of a multimodal model is not quantized: they hold those linears too.
TEST_F(Formats, TowersAndDraftLayersAreNamedAsKept) {
  const std::string models = std::string(QUERN_TESTDATA) + "/random-models/";
  for (const auto& [name, part] :
       {std::pair<std::string, std::string>("qwen3.5-vision", "visual"), {"qwen3.5-moe", "mtp"}}) {
    SCOPED_TRACE(name);
    ASSERT_EQ(
        run_quern({"quantize",
                   models + name,
                   "-o",
                   at(name),
                   "--method",
                   "rtn",
                   "--group-size",
                   "32",
                   "--format",
                   "compressed-tensors"})
            .code,
        0);
    const Json config = read_json(at(name) + "/config.json");
    const std::string ignored = config["quantization_config"]["ignore"].dump();
    EXPECT_NE(ignored.find(part), std::string::npos) << ignored;
    EXPECT_TRUE(json_of({"verify", at(name), "--against", models + name})["problems"].empty());
    std::string hazards;
    const Json inspected = json_of({"inspect", models + name});
    for (const Json& hazard : inspected["hazards"]) {
      hazards += hazard["id"].get<std::string>() + " ";
    }
    EXPECT_NE(hazards.find(part == "visual" ? "vision" : "fused_experts"), std::string::npos)
        << hazards;
  }
}

// What a recipe is said to do is done.
TEST_F(Formats, RecipesReachTheMethod) {
  const Words best = {
      "quantize",
      model_,
      "-o",
      at("best"),
      "--recipe",
      "best",
      "--restarts",
      "0",
      "--samples",
      "2",
      "--sequence-length",
      "64",
      "--force"};
  const Json made = json_of(best);
  EXPECT_EQ(made["options"]["mismatch_target"], true);
  EXPECT_EQ(made["options"]["transform"], "scale");
  double strength = 0;
  for (const Json& linear : made["linears"]) {
    strength += linear["mismatch_strength"].get<double>();
  }
  EXPECT_GT(strength, 0);
  Words without = best;
  without.insert(without.end(), {"--no-mismatch-target", "--no-resume"});
  EXPECT_EQ(json_of(without)["options"]["mismatch_target"], false);
  without.emplace_back("--mismatch-target");
  refused(2, without, "mismatch-target");
}

TEST_F(Formats, MixturesAndDeltaNetAreQuantizedAndReadBack) {
  std::ofstream(at("ids.json")) << "[[1, 2, 3, 4]]";
  for (const std::string name :
       {"qwen2-moe", "qwen3-moe", "qwen3-next", "qwen3.5", "qwen3.5-moe"}) {
    SCOPED_TRACE(name);
    const std::string model = std::string(QUERN_TESTDATA) + "/random-models/" + name;
    const std::string format = name == "qwen3-moe" ? "gptq" : "compressed-tensors";
    const Json made = json_of(
        {"quantize",
         model,
         "-o",
         at(name),
         "--method",
         "rtn",
         "--group-size",
         "32",
         "--format",
         format});
    for (const Json& linear : made["linears"]) {
      EXPECT_NE(linear["role"], "router");
      EXPECT_NE(linear["role"], "delta_gates");
    }
    EXPECT_TRUE(json_of({"verify", at(name), "--against", model})["problems"].empty());
    const Json logits =
        json_of({"logits", at(name), "--ids", at("ids.json"), "-o", at(name + "-logits")});
    EXPECT_EQ(logits["rows"], 1);
    refused(3, {"plan", model, "--linear-bpw", "4", "-o", at("plan.json")}, "planned");
  }
  const std::string models = std::string(QUERN_TESTDATA) + "/random-models/";
  const Words plain = {"--method", "rtn", "--group-size", "32", "--experts-only"};
  Words words = {"quantize", models + "qwen3.5-moe", "-o", at("experts")};
  words.insert(words.end(), plain.begin(), plain.end());
  const Json experts = json_of(words);
  EXPECT_EQ(experts["linears"].size(), 4U * 6U * 3U);  // layers, experts, gate, up and down
  EXPECT_EQ(experts["experts"].size(), 4U);
  words[1] = models + "qwen3.5";
  refused(2, words, "no experts");
}

TEST_F(Formats, Misuse) {
  refused(2, {"export", model_, "-o", at("x"), "--format", "gptq"}, "quern quantize");
  refused(2, {"export", model_, "-o", at("x")}, "--format");
  refused(2, {"compare", model_}, "B");
  refused(2, {"compare", model_, model_, "--windows", "-1"}, "--windows");
  refused(2, {"compare", model_, bundled_model("tiny-qwen3"), "--weights-only"}, "same model");
  refused(2, {"verify", model_, "--engine", "ollama"}, "vllm");
  refused(3, {"quantize", model_, "-o", at("x"), "--bits", "5"}, "compressed-tensors");
  refused(3, {"quantize", model_, "-o", at("x"), "--format", "awq", "--bits", "8"}, "4 bits");
}

}  // namespace
}  // namespace quern
