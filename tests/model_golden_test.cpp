// SPDX-License-Identifier: Apache-2.0
// Logits and continuations against transformers in float32 (testdata/README.md).
#include "base/error.h"
#include "nn/generate.h"
#include "running_model.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <random>

namespace quern {
namespace {

using testing::golden_texts;
using testing::GoldenText;
using testing::Ids;
using testing::relative_difference;
using testing::RunningModel;
using testing::test_model;

// Of the largest logit. Both sides compute in float; the order of sums is what differs.
constexpr double kTolerance = 2e-5;

// DeltaNet passes every value through a long product of decays.
double tolerance_of(const RunningModel& model) {
  return model.config().delta_net ? 5e-5 : kTolerance;
}

class GoldenModel : public ::testing::TestWithParam<const char*> {
 protected:
  std::filesystem::path directory_ = test_model(GetParam());
};

INSTANTIATE_TEST_SUITE_P(
    Trained,
    GoldenModel,
    ::testing::Values(
        "models/tiny-qwen3", "models/tiny-qwen2.5", "models/tiny-llama3", "models/stories260K"),
    [](const auto& model) { return testing::test_name(model.param); });
INSTANTIATE_TEST_SUITE_P(
    Random,
    GoldenModel,
    ::testing::Values(
        "random-models/mistral-window",
        "random-models/llama3-tied",
        "random-models/qwen2-untied",
        "random-models/qwen2-yarn",
        "random-models/qwen3-wide-heads",
        "random-models/qwen3-moe",
        "random-models/qwen2-moe",
        "random-models/qwen3-next",
        "random-models/qwen3.5",
        "random-models/qwen3.5-moe",
        "random-models/qwen3-fp8",
        "random-models/qwen3-moe-fp8"),
    [](const auto& model) { return testing::test_name(model.param); });

TEST_P(GoldenModel, LogitsAtEveryPosition) {
  RunningModel model(directory_);
  const std::vector<GoldenText> texts = golden_texts(directory_);
  ASSERT_GE(texts.size(), 3U);
  for (const GoldenText& text : texts) {
    EXPECT_LE(relative_difference(model.logits(text.ids), text.logits), tolerance_of(model))
        << text.name;
  }
}

TEST_P(GoldenModel, CachedDecodingIsTheWholePrompt) {
  RunningModel model(directory_);
  for (const GoldenText& text : golden_texts(directory_)) {
    const std::vector<float> whole = model.logits(text.ids);
    for (const std::size_t chunk : {1, 7, 20}) {
      const std::vector<float> cached = model.logits_in_chunks(text.ids, chunk);
      EXPECT_LE(relative_difference(cached, whole), tolerance_of(model))
          << text.name << " by " << chunk;
      EXPECT_LE(relative_difference(cached, text.logits), 2 * tolerance_of(model)) << text.name;
    }
  }
}

TEST_P(GoldenModel, ThreadsDoNotChangeABit) {
  RunningModel one(directory_, 1);
  RunningModel two(directory_, 2);
  RunningModel five(directory_, 5);
  for (const GoldenText& text : golden_texts(directory_)) {
    const std::vector<float> expected = one.logits(text.ids);
    EXPECT_EQ(two.logits(text.ids), expected) << text.name;
    EXPECT_EQ(five.logits(text.ids), expected) << text.name;
    EXPECT_EQ(two.logits_in_chunks(text.ids, 7), one.logits_in_chunks(text.ids, 7)) << text.name;
  }
}

class GreedyModel : public GoldenModel {};

INSTANTIATE_TEST_SUITE_P(
    Trained,
    GreedyModel,
    ::testing::Values(
        "models/tiny-qwen3", "models/tiny-qwen2.5", "models/tiny-llama3", "models/stories260K"),
    [](const auto& model) { return testing::test_name(model.param); });

TEST_P(GreedyModel, ContinuesAsTheReference) {
  RunningModel model(directory_);
  const Json golden = read_json(directory_ / "golden/generate.json");
  ASSERT_GE(golden.size(), 3U);
  for (const Json& entry : golden) {
    const auto expected = entry.at("ids").get<Ids>();
    const auto margin = entry.at("top_margin").get<std::vector<double>>();
    GenerateOptions options;
    options.max_tokens = static_cast<std::int64_t>(expected.size());
    Sampler sampler({}, 0);
    const GenerateResult result = generate(
        model.context(), model.decoder(), entry.at("prompt_ids").get<Ids>(), sampler, options);
    EXPECT_EQ(result.finish_reason, "length");
    ASSERT_EQ(result.ids.size(), expected.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      if (result.ids[i] != expected[i]) {
        // Two logits as close as rounding; what follows is another text.
        EXPECT_LE(margin[i], 1e-3) << "token " << i;
        break;
      }
    }
  }
}

TEST(ScalarKernels, AgreeWithTheGoldenLogits) {
  const auto directory = test_model("models/stories260K");
  RunningModel model(directory, 1, "scalar");
  for (const GoldenText& text : golden_texts(directory)) {
    EXPECT_LE(relative_difference(model.logits(text.ids), text.logits), kTolerance) << text.name;
  }
}

// Attention walks 256 queries at a time; the golden texts are shorter.
TEST(Decoder, LongTextsAreTheSameInAnyChunks) {
  for (const char* name : {"random-models/mistral-window", "random-models/qwen3-wide-heads"}) {
    RunningModel model(test_model(name), 2);
    std::mt19937 random(7);
    Ids ids(601);
    for (std::int32_t& id : ids) {
      id = static_cast<std::int32_t>(random() % 307);
    }
    const std::vector<float> whole = model.logits(ids);
    for (const std::size_t chunk : {1, 100, 300, 512}) {
      EXPECT_LE(relative_difference(model.logits_in_chunks(ids, chunk), whole), kTolerance)
          << name << " by " << chunk;
    }
  }
}

// Two layers with a window of 16: what a position sees ends 30 tokens before it.
TEST(Decoder, NothingBeforeTheSlidingWindowCounts) {
  RunningModel model(test_model("random-models/mistral-window"));
  Ids ids = golden_texts(test_model("random-models/mistral-window")).front().ids;
  ASSERT_EQ(ids.size(), 48U);
  const std::vector<float> before = model.logits(ids);
  ids[10] = (ids[10] + 1) % 307;
  const std::vector<float> after = model.logits(ids);
  const auto same = [&](std::size_t position) {
    return std::equal(
        before.begin() + position * 307,
        before.begin() + (position + 1) * 307,
        after.begin() + position * 307);
  };
  EXPECT_TRUE(same(9));
  EXPECT_FALSE(same(10));
  EXPECT_FALSE(same(40));
  for (std::size_t position = 41; position < 48; ++position) {
    EXPECT_TRUE(same(position)) << position;
  }
}

TEST(Decoder, ObserverSeesTheResidualStreamBeforeEveryBlockAndAtTheEnd) {
  RunningModel model(test_model("random-models/llama3-tied"));
  const Ids ids = {3, 1, 4, 1, 5};
  std::vector<int> layers;
  std::vector<float> last;
  const auto observer = [&](int layer, std::span<const float> x) {
    layers.push_back(layer);
    EXPECT_EQ(x.size(), 5U * 64U);
    last.assign(x.begin(), x.end());
  };
  const std::vector<float> alone = model.decoder().forward(ids, observer);
  EXPECT_EQ(layers, (std::vector<int>{0, 1, 2}));
  EXPECT_NE(last, alone);  // the final norm comes after
  layers.clear();
  Sequence sequence;
  EXPECT_EQ(model.decoder().forward(ids, sequence, observer), alone);
  EXPECT_EQ(layers, (std::vector<int>{0, 1, 2}));
  EXPECT_EQ(sequence.tokens(), 5);
}

TEST(Decoder, RefusesIdsOutsideTheVocabulary) {
  RunningModel model(test_model("random-models/llama3-tied"));
  for (const std::int32_t bad : {-1, 307, INT32_MAX, INT32_MIN}) {
    EXPECT_THROW((void)model.decoder().forward(Ids{0, bad}), UsageError) << bad;
  }
}

class EditedModel : public ::testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::copy(test_model("random-models/llama3-tied"), scratch_.path());
    weights_ = read_file(scratch_.path() / "model.safetensors");
  }
  void write_weights(const std::string& weights) {
    std::filesystem::remove(scratch_.path() / "model.safetensors");
    write_file(scratch_.path() / "model.safetensors", weights);
  }
  void write_config(const std::string& key, const Json& value) {
    Json config = read_json(scratch_.path() / "config.json");
    config[key] = value;
    std::filesystem::remove(scratch_.path() / "config.json");
    write_file(scratch_.path() / "config.json", config.dump());
  }

  testing::ScratchDirectory scratch_;
  std::string weights_;
};

// One more space in the header moves every tensor to an odd address.
TEST_F(EditedModel, WeightsMayStartAtAnyByte) {
  const Ids ids = {3, 1, 4, 1, 5, 9, 2, 6};
  const std::vector<float> expected = RunningModel(scratch_.path()).logits(ids);
  std::uint64_t header = 0;
  std::memcpy(&header, weights_.data(), 8);
  weights_.insert(8 + header, " ");
  ++header;
  std::memcpy(weights_.data(), &header, 8);
  write_weights(weights_);
  EXPECT_EQ(RunningModel(scratch_.path()).logits(ids), expected);
}

TEST_F(EditedModel, MissingTensorsAndOtherShapesAreNamed) {
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  std::string renamed = weights_;
  renamed[renamed.find(name)] = 'M';
  write_weights(renamed);
  try {
    RunningModel model(scratch_.path());
    FAIL();
  } catch (const ParseError& error) {
    EXPECT_NE(error.three_lines().find("model.layers.1.mlp.up_proj"), std::string::npos);
  }
  write_weights(weights_);
  write_config("intermediate_size", 129);
  EXPECT_THROW(RunningModel model(scratch_.path()), ParseError);
}

TEST_F(EditedModel, MoreLayersThanWeightsAreRefused) {
  write_config("num_hidden_layers", 3);
  EXPECT_THROW(RunningModel model(scratch_.path()), ParseError);
}

TEST_F(EditedModel, UntiedHeadNeedsItsWeights) {
  write_config("tie_word_embeddings", false);
  EXPECT_THROW(RunningModel model(scratch_.path()), ParseError);
}

}  // namespace
}  // namespace quern
