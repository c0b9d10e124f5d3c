// SPDX-License-Identifier: Apache-2.0
#include "format/safetensors.h"
#include "format/safetensors_writer.h"
#include "quant/mixed_rows.h"
#include "run_binary.h"
#include "running_model.h"
#include "scratch.h"
#include "tokenizer/tokenizer.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

// What makes Qwen models hard to quantize: the damage, and the cure.
namespace quern {
namespace {

namespace fs = std::filesystem;

using testing::bundled_model;
using testing::error_of;
using testing::run_quern;
using testing::RunningModel;
using testing::RunResult;
using testing::ScratchDirectory;

using Words = std::vector<std::string>;

class Hazards : public ::testing::Test {
 protected:
  [[nodiscard]] std::string at(const std::string& name) const {
    return (scratch_.path() / name).string();
  }
  static Json json_of(Words words) {
    words.emplace_back("--json");
    const RunResult result = run_quern(words);
    EXPECT_EQ(result.code, 0) << result.err;
    return result.json();
  }
  [[nodiscard]] Json quantize(
      const std::string& model, const std::string& name, const Words& more) const {
    Words words = {"quantize", bundled_model(model), "-o", at(name)};
    words.insert(words.end(), more.begin(), more.end());
    return json_of(words);
  }
  [[nodiscard]] double divergence(const std::string& model, const std::string& name) const {
    return json_of({"compare", bundled_model(model), at(name), "--windows", "4"})["end_to_end"]
                                                                                 ["kl_mean"]
                                                                                     .get<double>();
  }
  // A plan in which the embedding table is all that is rounded.
  [[nodiscard]] std::string table_only(
      const std::string& model, const std::string& embedding_bits) const {
    Json plan = json_of(
        {"plan",
         bundled_model(model),
         "--method",
         "rtn",
         "--format",
         "quern",
         "--group-size",
         "128",
         "--embedding-bits",
         embedding_bits,
         "--force"});
    for (Json& linear : plan["linears"]) {
      if (linear["role"] != "embedding") {
        linear["method"] = "keep";
      } else if (embedding_bits == "3") {
        linear["bits"] = 3;  // below the floor of a table that is tied
      }
    }
    write_file(at("plan.json"), plan.dump());
    return at("plan.json");
  }

  ScratchDirectory scratch_;
};

TEST_F(Hazards, BiasesThatAreLost) {
  (void)quantize("tiny-qwen2.5", "whole", {"--method", "rtn", "--bits", "8"});
  const double intact = divergence("tiny-qwen2.5", "whole");
  const std::string file = read_file(at("whole") + "/model.safetensors");
  std::uint64_t header = 0;
  std::memcpy(&header, file.data(), sizeof(header));
  const Json entries = Json::parse(file.substr(8, header));

  // Zeros in their place: every check passes, and the model is another one.
  std::string zeroed = file;
  int biases = 0;
  for (const auto& [name, entry] : entries.items()) {
    if (name.ends_with("_proj.bias")) {
      const std::size_t begin = entry["data_offsets"][0];
      const std::size_t end = entry["data_offsets"][1];
      zeroed.replace(8 + header + begin, end - begin, end - begin, '\0');
      ++biases;
    }
  }
  EXPECT_EQ(biases, 12);
  fs::copy(at("whole"), at("zeroed"));
  write_file(at("zeroed") + "/model.safetensors", zeroed);
  EXPECT_GT(divergence("tiny-qwen2.5", "zeroed"), 20 * intact);
  // …which the census and the hashes find.
  EXPECT_EQ(
      run_quern({"verify", at("zeroed"), "--against", bundled_model("tiny-qwen2.5")}).code, 1);

  // Without the tensors it does not open.
  std::string dropped = file;
  const std::size_t place = dropped.find("layers.1.self_attn.q_proj.bias");
  ASSERT_NE(place, std::string::npos);
  dropped.replace(place, 30, "layers.1.self_attn.q_proj.bi_s");
  fs::copy(at("whole"), at("dropped"));
  write_file(at("dropped") + "/model.safetensors", dropped);
  const RunResult result = run_quern(
      {"eval", at("dropped"), "--perplexity", bundled_model("tiny-qwen2.5") + "/config.json"});
  EXPECT_EQ(result.code, 3) << result.err;
  EXPECT_NE(error_of(result).find("q_proj.bias"), std::string::npos) << result.err;
}

// log softmax in double.
std::vector<double> log_probabilities(const float* logits, std::size_t n) {
  double largest = logits[0];
  for (std::size_t i = 1; i < n; ++i) {
    largest = std::max(largest, static_cast<double>(logits[i]));
  }
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    sum += std::exp(logits[i] - largest);
  }
  std::vector<double> result(n);
  for (std::size_t i = 0; i < n; ++i) {
    result[i] = logits[i] - largest - std::log(sum);
  }
  return result;
}

// Mean KL at the positions whose token is one of `tail`.
double divergence_after(
    RunningModel& original,
    RunningModel& other,
    const std::vector<std::int32_t>& ids,
    const std::vector<bool>& tail) {
  constexpr std::size_t kWindow = 128;
  constexpr std::size_t kStep = 8 * kWindow;  // some of every script
  const auto vocab = static_cast<std::size_t>(original.config().vocab_size);
  double sum = 0;
  int count = 0;
  for (std::size_t begin = 0; begin + kWindow <= ids.size(); begin += kStep) {
    const std::span<const std::int32_t> window(ids.data() + begin, kWindow);
    const std::vector<float> a = original.logits(window);
    const std::vector<float> b = other.logits(window);
    for (std::size_t t = 0; t < kWindow; ++t) {
      if (!tail[static_cast<std::size_t>(window[t])]) {
        continue;
      }
      const std::vector<double> p = log_probabilities(a.data() + t * vocab, vocab);
      const std::vector<double> q = log_probabilities(b.data() + t * vocab, vocab);
      for (std::size_t i = 0; i < vocab; ++i) {
        sum += std::exp(p[i]) * (p[i] - q[i]);
      }
      ++count;
    }
  }
  EXPECT_GT(count, 50);  // others are single bytes, which count as frequent
  return sum / count;
}

// Text of many scripts, whose tokens calibration hardly saw: what 3 bits do to the tail of the
// vocabulary, and that 4 (6 where the table is the head too) under 8 for the frequent ones do not.
TEST_F(Hazards, TheTailOfTheVocabulary) {
  for (const std::string model : {"tiny-llama3", "tiny-qwen2.5"}) {
    SCOPED_TRACE(model);
    for (const std::string bits : {"3", "mixed:1000", "8"}) {
      (void)quantize(model, model + bits, {"--format", "quern", "--plan", table_only(model, bits)});
    }
    const auto checkpoint = open_checkpoint(at(model + "mixed:1000"));
    const ModelGraph graph = build_graph(checkpoint->config(), checkpoint->config_place());
    const Linear& table = graph.embedding;
    const StoredLinear stored =
        checkpoint->load_linear(table.module, table.out_features, table.in_features);
    const auto* mixed = dynamic_cast<const MixedRows*>(stored.quantized.get());
    ASSERT_NE(mixed, nullptr);
    EXPECT_EQ(mixed->cold.scheme.bits, graph.head_tied ? 6 : 4);
    std::vector<bool> tail;
    for (const std::uint32_t row : mixed->row_map) {
      tail.push_back((row & MixedRows::kHotBit) == 0);
    }
    const std::string text = read_file(testing::test_model("text/udhr.txt"));
    const std::vector<std::int32_t> ids =
        load_tokenizer(bundled_model(model)).encode(text, EncodeOptions());
    RunningModel original(bundled_model(model));
    const auto lost = [&](const std::string& bits) {
      RunningModel other(at(model + bits));
      return divergence_after(original, other, ids, tail);
    };
    const double three = lost("3");
    const double mixture = lost("mixed:1000");
    const double eight = lost("8");
    RecordProperty(model, fmt::format("3 bits {}, mixed {}, 8 bits {}", three, mixture, eight));
    // A bit less doubles the step and quadruples the error, on the table's part of what is lost.
    EXPECT_GT(three, 3 * mixture);
    EXPECT_LT(eight, mixture);
    EXPECT_LT(
        fs::file_size(at(model + "mixed:1000") + "/model.safetensors"),
        fs::file_size(at(model + "8") + "/model.safetensors"));
  }
  const RunResult refused = run_quern(
      {"plan", bundled_model("tiny-llama3"), "--embedding-bits", "3", "--format", "quern"});
  EXPECT_EQ(refused.code, 2);
  EXPECT_NE(refused.err.find("--force"), std::string::npos);
}

// Ranges of down_proj, whose inputs have the outliers of SwiGLU.
TEST_F(Hazards, RangesOfDownProjections) {
  for (const std::string model : {"tiny-qwen3", "tiny-qwen2.5"}) {
    SCOPED_TRACE(model);
    const Json made = quantize(model, model, {"--bits", "3", "--samples", "16"});
    int seen = 0;
    for (const Json& linear : made["linears"]) {
      if (linear["role"] != "down") {
        continue;
      }
      const Json& errors = linear["range_errors"];
      EXPECT_LT(linear["clip_threshold"].get<double>(), 1);
      EXPECT_LT(errors["weighted"].get<double>(), 0.9 * errors["minmax"].get<double>());
      EXPECT_LT(errors["weighted"].get<double>(), 1.02 * errors["power-2.4"].get<double>());
      EXPECT_LT(errors["output"].get<double>(), 1.02 * errors["weighted"].get<double>());
      ++seen;
    }
    EXPECT_EQ(seen, model == "tiny-qwen3" ? 6 : 4);
    // And end to end, by plain rounding, which has nothing but its ranges.
    const Words rtn = {"--method", "rtn", "--bits", "3", "--samples", "16", "--range"};
    const auto with = [&](const std::string& range) {
      Words words = rtn;
      words.push_back(range);
      (void)quantize(model, model + range, words);
      return divergence(model, model + range);
    };
    EXPECT_LT(with("output"), 0.7 * with("minmax"));
  }
}

TEST_F(Hazards, ATableThatServesTwoEnds) {
  const auto table = [&](const Words& more) {
    Words words = {"plan", bundled_model("tiny-qwen2.5"), "--method", "rtn", "--format", "quern"};
    words.insert(words.end(), more.begin(), more.end());
    return json_of(words)["linears"].back();
  };
  const Json stricter = table({"--embedding-bits", "4", "--head-bits", "8"});
  EXPECT_EQ(stricter["role"], "embedding");
  EXPECT_EQ(stricter["bits"], 8);
  EXPECT_EQ(table({"--embedding-bits", "4"})["bits"], 6);
  EXPECT_EQ(table({"--embedding-bits", "8", "--head-bits", "4"})["bits"], 8);
}

// Some releases hold the tied table a second time, as the head (Qwen3-0.6B): the quantized table
// stands for both, wherever it is quantized.
TEST_F(Hazards, ACopyOfTheTiedTable) {
  const std::string with_copy = at("with-copy");
  fs::copy(bundled_model("tiny-qwen2.5"), with_copy, fs::copy_options::recursive);
  const auto store = SafetensorsStore::open(with_copy + "/model.safetensors");
  std::vector<TensorDeclaration> declarations;
  for (const auto& [name, view] : store->tensors()) {
    declarations.push_back({name, view.dtype, view.shape});
  }
  const TensorView* table = store->find("model.embed_tokens.weight");
  declarations.push_back({"lm_head.weight", table->dtype, table->shape});
  {
    fs::create_directories(at("written"));
    SafetensorsWriter writer(at("written"), plan_safetensors(declarations, {}));
    for (const auto& [name, view] : store->tensors()) {
      writer.write(name, view.bytes);
    }
    writer.write("lm_head.weight", table->bytes);
    writer.finish();
  }
  fs::rename(at("written") + "/model.safetensors", with_copy + "/model.safetensors");
  for (const std::string format : {"quern", "compressed-tensors"}) {
    SCOPED_TRACE(format);
    const Json made = json_of(
        {"quantize",
         with_copy,
         "-o",
         at(format),
         "--method",
         "rtn",
         "--embedding-bits",
         "8",
         "--format",
         format});
    EXPECT_EQ(made["predicted"]["bytes"], made["bytes"]);
    const auto written = SafetensorsStore::open(at(format) + "/model.safetensors");
    EXPECT_EQ(written->find("lm_head.weight"), nullptr);
    EXPECT_EQ(run_quern({"verify", at(format), "--against", with_copy}).code, 0);
    EXPECT_LT(divergence("tiny-qwen2.5", format), 0.3);
  }
  // A table that keeps its floats keeps its copy.
  (void)json_of({"quantize", with_copy, "-o", at("gptq"), "--method", "rtn"});
  EXPECT_NE(
      SafetensorsStore::open(at("gptq") + "/model.safetensors")->find("lm_head.weight"), nullptr);
}

// compressed-tensors cannot tie a packed table: it is written twice, and config.json says so.
TEST_F(Hazards, ATableIsUntiedOnlyWhereTheFormatForcesIt) {
  const Words eight = {"--method", "rtn", "--embedding-bits", "8"};
  const auto with = [&](const std::string& format) {
    Words words = eight;
    words.insert(words.end(), {"--format", format});
    const Json made = quantize("tiny-qwen2.5", format, words);
    EXPECT_EQ(made["predicted"]["bytes"], made["bytes"]);
    return read_json(at(format) + "/config.json")["tie_word_embeddings"].get<bool>();
  };
  EXPECT_TRUE(with("quern"));
  EXPECT_FALSE(with("compressed-tensors"));
  const Json exported =
      json_of({"export", at("quern"), "-o", at("exported"), "--format", "compressed-tensors"});
  EXPECT_FALSE(read_json(at("exported") + "/config.json")["tie_word_embeddings"].get<bool>());
  for (const std::string other : {"compressed-tensors", "exported"}) {
    EXPECT_EQ(run_quern({"verify", at(other), "--engine", "vllm"}).code, 0) << other;
    const Json seen = json_of({"inspect", at(other)});
    EXPECT_EQ(seen["hazards"][0]["facts"]["embedding"], seen["hazards"][0]["facts"]["head"]);
  }
  // The same table at both ends: the same quality as the tied one, scales apart (F16, BF16).
  const double tied = divergence("tiny-qwen2.5", "quern");
  EXPECT_NEAR(divergence("tiny-qwen2.5", "compressed-tensors"), tied, 0.02 * tied);
  const Json same = json_of({"compare", at("quern"), at("exported"), "--windows", "2"});
  EXPECT_EQ(same["end_to_end"]["kl_mean"], 0.0);
  EXPECT_EQ(
      run_quern({"eval",
                 at("exported"),
                 "--perplexity",
                 at("exported") + "/config.json",
                 "--context",
                 "64"})
          .code,
      0);
}

TEST_F(Hazards, AreShown) {
  const Json seen = json_of({"inspect", bundled_model("tiny-qwen2.5")});
  std::vector<std::string> ids;
  for (const Json& hazard : seen["hazards"]) {
    ids.push_back(hazard["id"]);
    EXPECT_FALSE(hazard["advice"].get<std::string>().empty());
  }
  EXPECT_EQ(ids, (Words{"vocabulary", "qkv_bias", "swiglu_outliers", "tied_embeddings"}));
  const Json made = quantize(
      "tiny-qwen2.5",
      "out",
      {"--method",
       "rtn",
       "--format",
       "quern",
       "--embedding-bits",
       "mixed:500",
       "--report",
       at("report.html")});
  ASSERT_EQ(made["hazards"].size(), 4U);
  EXPECT_NE(
      made["hazards"][0]["handled"].get<std::string>().find("at 8 bits, the others at 6"),
      std::string::npos);
  EXPECT_NE(read_file(at("report.html")).find("Hazards of the model"), std::string::npos);
  const Json after = json_of({"inspect", at("out")});
  EXPECT_NE(
      after["hazards"][0]["facts"]["embedding"].get<std::string>(),
      seen["hazards"][0]["facts"]["embedding"].get<std::string>());
}

}  // namespace
}  // namespace quern
