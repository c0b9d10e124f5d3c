// SPDX-License-Identifier: Apache-2.0
#include "run_binary.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <set>
#include <sstream>
#include <string>

// Whole jobs through the program on a small trained model with biases.
namespace quern {
namespace {

namespace fs = std::filesystem;

using testing::bundled_model;
using testing::calibration_ids;
using testing::error_of;
using testing::run_quern;
using testing::RunResult;
using testing::ScratchDirectory;

using Words = std::vector<std::string>;

class EndToEnd : public ::testing::Test {
 protected:
  [[nodiscard]] std::string at(const std::string& name) const {
    return (scratch_.path() / name).string();
  }
  [[nodiscard]] RunResult quantize(const std::string& out, const Words& more) const {
    Words words = {"quantize", model_, "-o", at(out), "--calibration", calibration_ids()};
    words.insert(words.end(), {"--samples", "2", "--json"});
    words.insert(words.end(), more.begin(), more.end());
    return run_quern(words);
  }
  [[nodiscard]] Json verify(const std::string& out) const {
    const RunResult result = run_quern({"verify", at(out), "--against", model_, "--json"});
    EXPECT_EQ(result.code, 0) << result.err << result.out;
    return result.json();
  }
  // KL from the original on one window.
  [[nodiscard]] double divergence(const std::string& out) const {
    const std::string text = std::string(QUERN_TESTDATA) + "/text/wiki.test.raw";
    const RunResult result = run_quern(
        {"eval",
         at(out),
         "--reference",
         model_,
         "--perplexity",
         text,
         "--context",
         "256",
         "--windows",
         "1",
         "--json"});
    EXPECT_EQ(result.code, 0) << result.err;
    const Json document = result.json();
    EXPECT_EQ(document["schema"], "quern.eval/1");
    return document["divergence"].front()["kl_mean"].get<double>();
  }

  ScratchDirectory scratch_;
  std::string model_ = bundled_model("tiny-qwen2.5");
};

void expect_keys(const Json& object, const Words& keys) {
  for (const std::string& key : keys) {
    EXPECT_TRUE(object.contains(key)) << key;
  }
}

TEST_F(EndToEnd, QuantizeKeepsTheContract) {
  const RunResult result = quantize("out", {});
  ASSERT_EQ(result.code, 0) << result.err;
  const Json document = result.json();
  expect_keys(
      document,
      {"schema",
       "output",
       "source",
       "format",
       "bits_per_weight",
       "bytes",
       "seconds",
       "cpu_seconds",
       "peak_rss_bytes",
       "seed",
       "calibration",
       "linears",
       "census"});
  EXPECT_EQ(document["schema"], "quern.quantize/1");
  EXPECT_EQ(document["output"], at("out"));
  EXPECT_EQ(document["source"], model_);
  EXPECT_EQ(document["calibration"]["samples"], 2);
  EXPECT_EQ(document["calibration"]["tokens"], 1024);
  EXPECT_EQ(document["calibration"]["sha256"].get<std::string>().size(), 64U);
  ASSERT_EQ(document["linears"].size(), 28U);
  for (const Json& linear : document["linears"]) {
    expect_keys(
        linear,
        {"name",
         "method",
         "bits",
         "group_size",
         "symmetric",
         "order",
         "tokens",
         "relative_error",
         "damping",
         "fallback",
         "rule"});
    EXPECT_LT(linear["relative_error"].get<double>(), 0.1) << linear["name"];
    EXPECT_TRUE(linear["fallback"].is_null()) << linear["fallback"];
  }
  EXPECT_EQ(document["census"]["in"], 50);
  EXPECT_EQ(document["census"]["out"], 50 + 28 * 3);
  EXPECT_TRUE(document["census"]["skipped"].empty());

  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(at("out"))) {
    names.insert(entry.path().filename().string());
  }
  const std::set<std::string> expected = {
      "README.md",
      "chat_template.jinja",
      "config.json",
      "generation_config.json",
      "model.safetensors",
      "quantization_manifest.json",
      "quantize_config.json",
      "tokenizer.json",
      "tokenizer_config.json"};
  EXPECT_EQ(names, expected);
  const Json manifest = read_json(at("out") + "/quantization_manifest.json");
  for (const auto& [key, value] : manifest.items()) {
    if (key != "output" && key != "source") {
      EXPECT_EQ(document[key], value) << key;
    }
  }
  const Json verified = verify("out");
  EXPECT_EQ(verified["schema"], "quern.verify/1");
  EXPECT_EQ(verified["quantized_linears"], 28);
  EXPECT_EQ(verified["hashes_checked"], 1);
  // Nothing of the run is left beside it.
  EXPECT_EQ(std::distance(fs::directory_iterator(scratch_.path()), fs::directory_iterator()), 1);
}

TEST_F(EndToEnd, VerifySeesAFlippedByte) {
  ASSERT_EQ(quantize("out", {"--method", "rtn"}).code, 0);
  const std::string path = at("out") + "/model.safetensors";
  const std::string bytes = read_file(path);
  for (const std::size_t place : {bytes.size() - 1, bytes.size() / 2, bytes.size() / 4}) {
    std::string flipped = bytes;
    flipped[place] = static_cast<char>(flipped[place] ^ 4);
    write_file(path, flipped);
    const RunResult result = run_quern({"verify", at("out"), "--against", model_});
    EXPECT_TRUE(result.code == 1 || result.code == 3) << place << ": " << result.code;
  }
  write_file(path, bytes);
  EXPECT_EQ(verify("out")["problems"].size(), 0U);
}

TEST_F(EndToEnd, PredictedBytesAreTheWrittenOnes) {
  for (const Words& options :
       {Words{"--method", "rtn"},
        Words{"--method", "rtn", "--shard-size", "1MB"},
        Words{"--method", "rtn", "--bits", "3", "--group-size", "channel", "--asymmetric"}}) {
    Words dry = options;
    dry.emplace_back("--dry-run");
    const RunResult predicted = quantize("out", dry);
    ASSERT_EQ(predicted.code, 0) << predicted.err;
    EXPECT_FALSE(fs::exists(at("out")));
    const Json prediction = predicted.json()["predicted"];
    const RunResult result = quantize("out", options);
    ASSERT_EQ(result.code, 0) << result.err;
    std::uint64_t written = 0;
    for (const auto& entry : fs::directory_iterator(at("out"))) {
      written += entry.path().extension() == ".safetensors" ? entry.file_size() : 0;
    }
    EXPECT_EQ(prediction["bytes"], written);
    EXPECT_EQ(result.json()["bytes"], written);
    EXPECT_EQ(prediction["bits_per_weight"], result.json()["bits_per_weight"]);
    EXPECT_EQ(verify("out")["problems"].size(), 0U);
    fs::remove_all(at("out"));
  }
}

// The memory that a dry run names for a file of ids is that of its sequences.
TEST_F(EndToEnd, IdsFilesAreMeasuredByTheirHeader) {
  const auto peak = [&](const Words& more) {
    Words words = {"plan", model_, "--calibration", calibration_ids(), "--json"};
    words.insert(words.end(), more.begin(), more.end());
    const RunResult result = run_quern(words);
    EXPECT_EQ(result.code, 0) << result.err;
    return result.json()["predicted"]["peak_rss_bytes"].get<std::uint64_t>();
  };
  EXPECT_EQ(peak({}), peak({"--samples", "128"}));
  EXPECT_LT(peak({"--samples", "64"}), peak({}));
  EXPECT_EQ(peak({"--samples", "1000000"}), peak({}));
}

TEST_F(EndToEnd, FewerBitsDivergeMore) {
  double last = 0;
  for (const char* bits : {"8", "4", "2"}) {
    const std::string out = std::string("out-") + bits;
    const RunResult result = quantize(out, {"--bits", bits, "--sweeps", "1", "--refits", "1"});
    ASSERT_EQ(result.code, 0) << result.err;
    const double kl = divergence(out);
    EXPECT_GT(kl, last) << bits;
    last = kl;
  }
}

TEST_F(EndToEnd, AsymmetricInBothVersions) {
  for (const char* format : {"gptq", "gptq_v2"}) {
    const RunResult result =
        quantize(format, {"--asymmetric", "--format", format, "--sweeps", "1", "--refits", "1"});
    ASSERT_EQ(result.code, 0) << result.err;
    EXPECT_EQ(verify(format)["format"], format);
    EXPECT_EQ(read_json(at(format) + "/quantize_config.json")["sym"], false);
    EXPECT_LT(divergence(format), 0.5);
  }
}

TEST_F(EndToEnd, WidthsThatTheFormatCannotHold) {
  for (const char* bits : {"5", "6", "7"}) {
    const RunResult result = quantize("out", {"--bits", bits});
    EXPECT_EQ(result.code, 3);
    EXPECT_NE(error_of(result).find("2, 3, 4 or 8 bits"), std::string::npos) << result.err;
    EXPECT_TRUE(result.out.empty());
  }
  EXPECT_TRUE(fs::is_empty(scratch_.path()));
}

TEST_F(EndToEnd, GgufFilesAreWrittenAndRun) {
  for (const std::string& type : {std::string("Q4_K"), std::string("Q2_K")}) {
    const std::string name = type + ".gguf";
    const RunResult result = quantize(name, {"--format", "gguf:" + type});
    ASSERT_EQ(result.code, 0) << result.err;
    const Json manifest = result.json();
    EXPECT_EQ(manifest["predicted"]["bytes"], fs::file_size(at(name)));
    EXPECT_EQ(manifest["bytes"], fs::file_size(at(name)));
    EXPECT_TRUE(fs::exists(at(name + ".manifest.json")));
    EXPECT_FALSE(fs::exists(at(name + ".partial")));
    EXPECT_FALSE(fs::exists(at(name + ".run")));
    EXPECT_LT(divergence(name), type == "Q4_K" ? 0.2 : 2.0);
    // The same command finds its result, and another one does not write over it.
    EXPECT_EQ(quantize(name, {"--format", "gguf:" + type}).code, 0);
    EXPECT_EQ(quantize(name, {"--format", "gguf:Q6_K"}).code, 2);
  }
  EXPECT_EQ(quantize("directory", {"--format", "gguf", "--bits", "6"}).code, 0);
  EXPECT_LT(divergence("directory/model.gguf"), 0.05);
  EXPECT_EQ(quantize("x.gguf", {"--format", "gguf:IQ1_S"}).code, 2);
  EXPECT_EQ(quantize("x.gguf", {"--format", "gguf", "--bits", "7"}).code, 2);
  EXPECT_EQ(quantize("x.gguf", {"--format", "gguf", "--embedding-bits", "mixed:100"}).code, 3);
  EXPECT_FALSE(fs::exists(at("x.gguf")));
}

TEST_F(EndToEnd, TablesOverTheVocabularyAreRoundedWhereTheFormatHoldsThem) {
  const RunResult mixed =
      quantize("mixed", {"--format", "quern", "--embedding-bits", "mixed:500", "--bits", "8"});
  ASSERT_EQ(mixed.code, 0) << mixed.err;
  EXPECT_LT(divergence("mixed"), 0.05);
  const RunResult eight =
      quantize("eight", {"--format", "quern", "--embedding-bits", "8", "--bits", "8"});
  ASSERT_EQ(eight.code, 0) << eight.err;
  EXPECT_LT(mixed.json()["bytes"], eight.json()["bytes"]);
  EXPECT_LT(divergence("eight"), divergence("mixed"));
  EXPECT_EQ(quantize("x", {"--format", "gptq", "--embedding-bits", "8"}).code, 3);
  EXPECT_EQ(quantize("x", {"--format", "quern", "--embedding-bits", "3"}).code, 2);
  EXPECT_EQ(quantize("x", {"--format", "quern", "--embedding-bits", "many"}).code, 2);
}

TEST_F(EndToEnd, ChannelFactorsAndMismatchTargetsLowerTheDivergence) {
  const Words best = {"--transform", "scale", "--mismatch-target", "--bits", "3"};
  ASSERT_EQ(quantize("plain", {"--bits", "3"}).code, 0);
  const RunResult result = quantize("best", best);
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_FALSE(result.json()["transforms"].empty());
  EXPECT_LT(divergence("best"), 0.8 * divergence("plain"));
}

class Plans : public EndToEnd {
 protected:
  void SetUp() override {
    const RunResult result =
        run_quern({"plan", model_, "-o", at("plan.json"), "--calibration", calibration_ids()});
    ASSERT_EQ(result.code, 0) << result.err;
    plan_ = read_json(at("plan.json"));
  }
  // The values are put into every linear whose name contains `part`.
  void edit(const std::string& part, const Json& values) {
    for (Json& linear : plan_["linears"]) {
      if (linear["name"].get<std::string>().find(part) != std::string::npos) {
        linear.update(values);
      }
    }
  }
  [[nodiscard]] RunResult obey() const {
    write_file(at("plan.json"), plan_.dump());
    return quantize("out", {"--plan", at("plan.json"), "--sweeps", "0", "--refits", "0"});
  }

  Json plan_;
};

TEST_F(Plans, AreObeyed) {
  edit("down_proj", {{"bits", 8}});
  edit("o_proj", {{"bits", 3}, {"group_size", 64}});
  edit("layers.2.mlp.down_proj", {{"method", "keep"}});
  edit("layers.3.mlp.down_proj", {{"method", "rtn"}, {"symmetric", false}});
  const RunResult result = obey();
  ASSERT_EQ(result.code, 0) << result.err;
  const Json document = result.json();
  ASSERT_EQ(document["linears"].size(), 27U);
  for (const Json& linear : document["linears"]) {
    const std::string name = linear["name"];
    const int bits = name.ends_with("down_proj") ? 8 : name.ends_with("o_proj") ? 3 : 4;
    EXPECT_EQ(linear["bits"], bits) << name;
    EXPECT_EQ(linear["group_size"], bits == 3 ? 64 : 128) << name;
    EXPECT_EQ(linear["method"], name.find("3.mlp.down") != std::string::npos ? "rtn" : "gptq");
  }
  const Json verified = verify("out");
  EXPECT_EQ(verified["quantized_linears"], 27);
  EXPECT_LT(divergence("out"), 1.0);
}

TEST_F(Plans, WhatTheFormatCannotSayIsRefusedBeforeTheWork) {
  edit("layers.1.self_attn.q_proj", {{"bits", 8}});
  const RunResult result = obey();
  EXPECT_EQ(result.code, 3);
  EXPECT_NE(error_of(result).find("one scheme for linears that they merge"), std::string::npos);
  EXPECT_EQ(result.err, error_of(result));
  EXPECT_FALSE(fs::exists(at("out.run")));
}

TEST_F(Plans, ThatQuantizeNothingAreRefused) {
  edit("", {{"method", "keep"}});
  EXPECT_EQ(obey().code, 2);
}

TEST_F(Plans, BrokenOnesAreRefused) {
  const Json good = plan_;
  const auto refused = [&](int code) {
    const RunResult result = obey();
    EXPECT_EQ(result.code, code) << plan_.dump().substr(0, 200);
    EXPECT_FALSE(error_of(result).empty()) << result.err;
    plan_ = good;
  };
  plan_["linears"].erase(27);  // the last one of a block: tables may be missing
  refused(3);
  plan_["linears"].push_back(plan_["linears"][0]);
  refused(3);
  plan_["linears"][0]["name"] = "unknown";
  refused(3);
  edit("q_proj", {{"bits", 11}});
  refused(3);
  edit("q_proj", {{"bits", "4"}});
  refused(3);
  edit("q_proj", {{"group_size", 1 << 30}});
  refused(3);
  edit("down_proj", {{"method", "unknown"}});
  refused(3);
  plan_["linears"] = "all";
  refused(3);
  plan_ = Json::array();
  refused(3);
}

// Lines of the card that name the command, and the checksum of its text, differ with the command.
std::string without_command(const std::string& card) {
  std::istringstream lines(card);
  std::string text;
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with("quern quantize") && !line.starts_with("<!-- quern card")) {
      text += line + "\n";
    }
  }
  return text;
}

TEST_F(EndToEnd, ThreadsDoNotChangeTheBytes) {
  ASSERT_EQ(quantize("one", {"--threads", "1"}).code, 0);
  ASSERT_EQ(quantize("two", {"--threads", "2"}).code, 0);
  testing::Files one = testing::timeless_files(at("one"));
  testing::Files two = testing::timeless_files(at("two"));
  one["README.md"] = without_command(one["README.md"]);
  two["README.md"] = without_command(two["README.md"]);
  ASSERT_EQ(one.size(), two.size());
  for (const auto& [name, bytes] : one) {
    EXPECT_TRUE(two[name] == bytes) << name;
  }
}

// The holdout is every tenth sequence from ten on: below, there is none. A model of one layer.
TEST_F(EndToEnd, FewOrShortSequences) {
  testing::write_files(at("model"), testing::good_checkpoints().at(1).files);
  for (const std::int64_t rows : {1, 9, 10, 11}) {
    for (const std::int64_t length : {1, 2, 33}) {
      testing::write_input_ids(at("ids.safetensors"), testing::some_ids(rows, length, 64));
      Words words = {"quantize", at("model"), "-o", at("out"), "--group-size", "32", "--json"};
      words.insert(words.end(), {"--calibration", at("ids.safetensors"), "--samples", "1000"});
      const RunResult result = run_quern(words);
      ASSERT_EQ(result.code, 0) << result.err;
      const Json document = result.json();
      EXPECT_EQ(document["calibration"]["samples"], rows);
      for (const Json& linear : document["linears"]) {
        EXPECT_EQ(linear["holdout_error"].is_null(), rows < 10) << linear["name"];
        EXPECT_EQ(linear["tokens"], (rows < 10 ? rows : rows - 1) * length) << linear["name"];
      }
      fs::remove_all(at("out"));
    }
  }
}

}  // namespace
}  // namespace quern
