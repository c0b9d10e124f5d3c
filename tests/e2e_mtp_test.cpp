// SPDX-License-Identifier: Apache-2.0
// The draft layer from the command line.
#include "edited_model.h"
#include "forged_tokenizers.h"
#include "run_binary.h"
#include "running_model.h"
#include "scratch.h"
#include "tokenizer/byte_alphabet.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace quern {
namespace {

namespace fs = std::filesystem;

using testing::bundled_model;
using testing::EditedModel;
using testing::EditedTensors;
using testing::error_of;
using testing::relative_difference;
using testing::run_quern;
using testing::RunResult;
using testing::ScratchDirectory;
using testing::test_model;
using testing::values_of;

using Words = std::vector<std::string>;

// One token a byte.
std::string byte_tokenizer() {
  Json vocab = Json::object();
  for (int byte = 0; byte < 256; ++byte) {
    vocab[to_byte_alphabet(std::string(1, static_cast<char>(byte)))] = byte;
  }
  testing_files::SmallTokenizer tokenizer;
  tokenizer.pre_tokenizer =
      R"({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true})";
  tokenizer.decoder = tokenizer.pre_tokenizer;
  tokenizer.vocab = vocab.dump();
  tokenizer.merges = "[]";
  return tokenizer.json();
}

class MtpCommands : public ::testing::Test {
 protected:
  void SetUp() override {
    fs::copy(test_model("random-models/qwen3.5-moe"), model_, fs::copy_options::recursive);
    write_file(model_ / "tokenizer.json", byte_tokenizer());
  }
  [[nodiscard]] std::string at(const std::string& name) const {
    return (scratch_.path() / name).string();
  }
  [[nodiscard]] Json generate(const Words& more) const {
    Words words = {"generate", model_.string(), "--prompt", "To be, or not to be", "--json"};
    words.insert(words.end(), {"--max-tokens", "24"});
    words.insert(words.end(), more.begin(), more.end());
    const RunResult result = run_quern(words);
    EXPECT_EQ(result.code, 0) << result.err;
    return result.json();
  }
  static void refused(int code, const Words& words, const std::string& part) {
    const RunResult result = run_quern(words);
    EXPECT_EQ(result.code, code) << result.err;
    EXPECT_NE(error_of(result).find(part), std::string::npos) << result.err;
    EXPECT_TRUE(result.out.empty());
  }

  ScratchDirectory scratch_;
  fs::path model_ = scratch_.path() / "model";
};

TEST_F(MtpCommands, GenerateGivesTheSameTextWithDrafts) {
  for (const Words& sampling : std::vector<Words>{{}, {"--temperature", "0.8", "--seed", "3"}}) {
    const Json plain = generate(sampling);
    EXPECT_EQ(plain["drafted_tokens"], 0);
    EXPECT_EQ(plain["ids"].size(), 24U);
    for (const char* drafts : {"1", "3", "8"}) {
      Words words = sampling;
      words.insert(words.end(), {"--speculative", "mtp", "--draft-tokens", drafts});
      const Json found = generate(words);
      EXPECT_EQ(found["ids"], plain["ids"]);
      EXPECT_EQ(found["text"], plain["text"]);
      EXPECT_EQ(found["finish_reason"], plain["finish_reason"]);
      EXPECT_GT(found["drafted_tokens"], 0);
      EXPECT_LE(found["accepted_draft_tokens"], found["drafted_tokens"]);
    }
  }
  EXPECT_EQ(generate({"--speculative", "off"})["drafted_tokens"], 0);
}

TEST_F(MtpCommands, LogitsWritesThoseOfTheDraftLayer) {
  const std::string out = at("logits.safetensors");
  const std::string ids = (model_ / "golden/ids.json").string();
  const RunResult result =
      run_quern({"logits", model_.string(), "--ids", ids, "-o", out, "--mtp", "--json"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_TRUE(result.json()["router_ties"].is_array());
  const auto found = SafetensorsStore::open(out);
  const auto golden = SafetensorsStore::open(model_ / "golden/mtp.safetensors");
  for (const char* name : {"draft_logits.0", "draft_logits.1"}) {
    ASSERT_NE(found->find(name), nullptr);
    EXPECT_EQ(found->find(name)->shape, golden->find(name)->shape);
    EXPECT_LE(
        relative_difference(
            values_of<float>(*found->find(name)), values_of<float>(*golden->find(name))),
        1e-4);  // mtp_test.cpp
  }
  // One token is followed by none.
  EXPECT_NE(found->find("logits.2"), nullptr);
  EXPECT_EQ(found->find("draft_logits.2"), nullptr);
  EXPECT_EQ(found->find("hidden.0.0"), nullptr);
}

// A router without weights cannot choose: every token is a tie, the lowest experts win.
TEST_F(MtpCommands, LogitsListsRouterTies) {
  const EditedModel edited(model_, [](EditedTensors& tensors) {
    for (const char* name : {"model.layers.1.mlp.gate.weight", "mtp.layers.0.mlp.gate.weight"}) {
      std::fill(tensors.at(name).values.begin(), tensors.at(name).values.end(), 0.0F);
    }
  });
  write_file(at("ids.json"), "[[5, 6, 7], [8, 9]]");
  const RunResult result = run_quern(
      {"logits",
       edited.path().string(),
       "--ids",
       at("ids.json"),
       "-o",
       at("logits.safetensors"),
       "--mtp",
       "--json"});
  ASSERT_EQ(result.code, 0) << result.err;
  std::set<std::vector<int>> found;
  const Json document = result.json();
  for (const Json& tie : document["router_ties"]) {
    found.insert(
        {tie.at("row").get<int>(), tie.at("position").get<int>(), tie.at("layer").get<int>()});
  }
  // Layer 4 is the draft layer, after the model's four.
  const std::set<std::vector<int>> expected = {
      {0, 0, 1}, {0, 1, 1}, {0, 2, 1}, {0, 0, 4}, {0, 1, 4}, {1, 0, 1}, {1, 1, 1}, {1, 0, 4}};
  EXPECT_EQ(found, expected);
}

TEST_F(MtpCommands, RefusalsSayWhy) {
  const std::string plain = bundled_model("tiny-qwen3");
  refused(3, {"generate", plain, "--prompt", "a", "--speculative", "mtp"}, "found none");
  write_file(at("ids.json"), "[[5, 6, 7]]");
  refused(
      3, {"logits", plain, "--ids", at("ids.json"), "-o", at("x.safetensors"), "--mtp"}, "mtp.*");
  EXPECT_FALSE(fs::exists(at("x.safetensors")));
  const std::string model = model_.string();
  refused(2, {"generate", model, "--prompt", "a", "--speculative", "eagle"}, "eagle");
  refused(2, {"generate", model, "--prompt", "a", "--draft-tokens", "2"}, "--speculative");
  for (const char* drafts : {"0", "-1", "17", "two"}) {
    refused(
        2,
        {"generate", model, "--prompt", "a", "--speculative", "mtp", "--draft-tokens", drafts},
        "--draft-tokens");
  }
}

TEST_F(MtpCommands, QuantizeWritesTheTensorsAsTheyAre) {
  const EditedModel source(bundled_model("tiny-qwen2.5"), [](EditedTensors& tensors) {
    const auto& norm = tensors.at("model.norm.weight");
    tensors["mtp.norm.weight"] = norm;
    tensors["mtp.fc.weight"] = tensors.at("model.layers.0.mlp.up_proj.weight");
    tensors["mtp.layers.0.self_attn.q_proj.weight"] =
        tensors.at("model.layers.0.self_attn.q_proj.weight");
  });
  const std::string model = source.path().string();
  for (const char* format : {"gptq", "compressed-tensors", "quern"}) {
    const std::string out = at(format);
    const RunResult result = run_quern(
        {"quantize",
         model,
         "-o",
         out,
         "--method",
         "rtn",
         "--group-size",
         "32",
         "--format",
         format});
    ASSERT_EQ(result.code, 0) << result.err;
    EXPECT_EQ(run_quern({"verify", out, "--against", model}).code, 0);
    const auto before = SafetensorsStore::open(source.path());
    const auto after = SafetensorsStore::open(out);
    for (const char* name :
         {"mtp.norm.weight", "mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight"}) {
      ASSERT_NE(after->find(name), nullptr) << format;
      EXPECT_EQ(after->find(name)->dtype, DType::kBF16);
      EXPECT_TRUE(std::ranges::equal(after->find(name)->bytes, before->find(name)->bytes));
    }
  }
}

TEST_F(MtpCommands, InspectSaysThatThereIsOne) {
  const RunResult result = run_quern({"inspect", model_.string(), "--json"});
  ASSERT_EQ(result.code, 0) << result.err;
  int seen = 0;
  const Json document = result.json();
  for (const Json& hazard : document["hazards"]) {
    if (hazard["id"] == "mtp") {
      ++seen;
      EXPECT_EQ(hazard["facts"]["quern_runs_it"], true);
      EXPECT_GT(hazard["facts"]["bytes"], 100000);
    }
  }
  EXPECT_EQ(seen, 1);
}

}  // namespace
}  // namespace quern
