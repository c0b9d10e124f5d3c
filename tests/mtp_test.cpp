// SPDX-License-Identifier: Apache-2.0
// The draft layer against transformers' (testdata/random-models/README.md).
#include "nn/mtp.h"

#include "base/error.h"
#include "edited_model.h"
#include "model/mtp.h"
#include "running_model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace quern {
namespace {

using testing::EditedModel;
using testing::EditedTensors;
using testing::golden_texts;
using testing::GoldenText;
using testing::Ids;
using testing::relative_difference;
using testing::RunningModel;
using testing::test_model;
using testing::values_of;

// Of the largest logit. The hidden states come with what the model itself may differ by
// (model_golden_test.cpp), and a layer adds to that.
constexpr double kTolerance = 1e-4;

class Mtp : public ::testing::TestWithParam<const char*> {
 protected:
  // The draft layer's rows for a whole text, `chunk` slots at a time.
  std::vector<float> rows(const Ids& ids, std::size_t chunk, LayerCache& cache) {
    const std::vector<float> hidden = model_.decoder().forward(ids);
    const std::size_t width = this->width();
    std::vector<float> all;
    for (std::size_t begin = 0; begin + 1 < ids.size(); begin += chunk) {
      const std::size_t count = std::min(chunk, ids.size() - 1 - begin);
      const std::vector<float> some = drafter_.forward(
          std::span(hidden).subspan(begin * width, count * width),
          std::span(ids).subspan(begin + 1, count),
          cache);
      all.insert(all.end(), some.begin(), some.end());
    }
    return all;
  }
  std::vector<float> logits(std::span<const float> rows) {
    std::vector<float> all;
    model_.decoder().for_logits(rows, [&](std::int64_t, std::int64_t n, const float* logits) {
      all.insert(all.end(), logits, logits + n * model_.config().vocab_size);
    });
    return all;
  }
  [[nodiscard]] std::size_t width() const {
    return static_cast<std::size_t>(model_.config().hidden_size);
  }
  // A tensor of golden/mtp.safetensors for a text of golden/logits.safetensors, if it is there.
  [[nodiscard]] std::optional<std::vector<float>> golden(
      const std::string& kind, const GoldenText& text) const {
    const std::string name = kind + text.name.substr(text.name.find('.'));
    const TensorView* view = golden_->find(name);
    return view == nullptr ? std::nullopt : std::optional(values_of<float>(*view));
  }

  std::filesystem::path directory_ = test_model(GetParam());
  RunningModel model_{directory_};
  Drafter drafter_{model_.context(), model_.decoder().model()};
  std::unique_ptr<TensorStore> golden_ =
      SafetensorsStore::open(directory_ / "golden/mtp.safetensors");
};

INSTANTIATE_TEST_SUITE_P(
    Random,
    Mtp,
    ::testing::Values(
        "random-models/qwen3-next", "random-models/qwen3.5", "random-models/qwen3.5-moe"),
    [](const auto& model) { return testing::test_name(model.param); });

TEST_P(Mtp, LogitsAtEveryPosition) {
  int compared = 0;
  for (const GoldenText& text : golden_texts(directory_)) {
    if (const auto expected = golden("draft_logits", text)) {
      LayerCache cache;
      EXPECT_LE(relative_difference(logits(rows(text.ids, 1000, cache)), *expected), kTolerance)
          << text.name;
      ++compared;
    }
  }
  EXPECT_EQ(compared, 2);
}

TEST_P(Mtp, CachedSlotsAreTheWholeText) {
  for (const GoldenText& text : golden_texts(directory_)) {
    if (const auto expected = golden("draft_logits", text)) {
      for (const std::size_t chunk : {1, 3, 7}) {
        LayerCache cache;
        EXPECT_LE(
            relative_difference(logits(rows(text.ids, chunk, cache)), *expected), 2 * kTolerance)
            << text.name << " by " << chunk;
        EXPECT_EQ(cache.tokens, static_cast<std::int64_t>(text.ids.size()) - 1);
      }
    }
  }
}

TEST_P(Mtp, DraftsAfterDraftsAndTakesThemBack) {
  for (const GoldenText& text : golden_texts(directory_)) {
    const auto expected = golden("chained_logits", text);
    if (!expected) {
      continue;
    }
    LayerCache cache;
    std::vector<float> row = rows(text.ids, 1000, cache);
    row.erase(row.begin(), row.end() - static_cast<std::ptrdiff_t>(width()));
    const LayerCache before = cache;
    std::vector<float> chained;
    for (int i = 0; i < 4; ++i) {
      const std::vector<float> scores = logits(row);
      const auto best = static_cast<std::int32_t>(
          std::max_element(scores.begin(), scores.end()) - scores.begin());
      row = drafter_.forward(row, {&best, 1}, cache);
      const std::vector<float> next = logits(row);
      chained.insert(chained.end(), next.begin(), next.end());
    }
    EXPECT_LE(relative_difference(chained, *expected), 2 * kTolerance) << text.name;
    drafter_.rewind(cache, before.tokens);
    EXPECT_EQ(cache.tokens, before.tokens);
    EXPECT_EQ(cache.keys, before.keys);
    EXPECT_EQ(cache.values, before.values);
  }
}

// Each thing that the draft layer sees changes what it says: the token, the hidden state, the order
// of the two, those before them.
TEST_P(Mtp, EverythingSeenCounts) {
  const Ids ids = golden_texts(directory_).front().ids;
  LayerCache cache;
  const std::vector<float> hidden = model_.decoder().forward(std::span(ids).first(3));
  const auto last_of = [&](const std::vector<float>& states, const Ids& next) {
    LayerCache fresh;
    std::vector<float> all = drafter_.forward(states, next, fresh);
    return std::vector<float>(all.end() - static_cast<std::ptrdiff_t>(width()), all.end());
  };
  const std::vector<float> row = last_of(hidden, {1, 2, 3});
  EXPECT_NE(last_of(hidden, {1, 2, 4}), row);
  EXPECT_NE(last_of(hidden, {4, 2, 3}), row);
  std::vector<float> other = hidden;
  other.back() += 1;
  EXPECT_NE(last_of(other, {1, 2, 3}), row);
  other = hidden;
  other.front() += 1;
  EXPECT_NE(last_of(other, {1, 2, 3}), row);
}

TEST(MtpGraph, HoldsTheLinearsWithTheirRoles) {
  RunningModel model(test_model("random-models/qwen3-next"));
  const ModelGraph& graph = model.decoder().model().graph;
  ASSERT_TRUE(graph.mtp.has_value());
  EXPECT_EQ(graph.mtp->projection.module, "mtp.fc");
  EXPECT_EQ(graph.mtp->projection.role, Role::kDraftInput);
  EXPECT_EQ(graph.mtp->projection.in_features, 2 * graph.config.hidden_size);
  ASSERT_TRUE(graph.mtp->block.mixture.has_value());
  EXPECT_FALSE(graph.mtp->block.delta_net.has_value());
  EXPECT_EQ(graph.mtp->block.linears.at(kQ).module, "mtp.layers.0.self_attn.q_proj");
  EXPECT_EQ(graph.mtp->block.sites.size(), 3U);
}

// What the checkpoint has instead of a draft layer that runs: the model runs without, and says why
// when it is asked for.
void expect_refused(const std::filesystem::path& directory, const std::string& part) {
  RunningModel model(directory);
  EXPECT_EQ(model.logits(Ids{1, 2, 3}).size(), 3U * 307U);
  try {
    const Drafter drafter(model.context(), model.decoder().model());
    FAIL() << part;
  } catch (const UnsupportedError& error) {
    EXPECT_NE(error.three_lines().find(part), std::string::npos) << error.three_lines();
  }
}

TEST(MtpRefused, ModelsWithoutOne) {
  expect_refused(test_model("random-models/qwen3-moe"), "found none");
  expect_refused(test_model("random-models/llama3-tied"), "found none");
  const EditedModel without(test_model("random-models/qwen3.5"), [](EditedTensors& tensors) {
    std::erase_if(tensors, [](const auto& entry) { return entry.first.starts_with("mtp."); });
  });
  expect_refused(without.path(), "found none");
}

TEST(MtpRefused, OtherFamiliesAndLayouts) {
  const auto source = test_model("random-models/qwen3.5");
  const EditedModel family(test_model("random-models/llama3-tied"), [](EditedTensors& tensors) {
    tensors["mtp.fc.weight"] = {DType::kF32, {1}, {0}};
  });
  expect_refused(family.path(), "found llama");
  const EditedModel second(source, [](EditedTensors& tensors) {
    tensors["mtp.layers.1.input_layernorm.weight"] = tensors.at("mtp.norm.weight");
  });
  expect_refused(second.path(), "mtp.layers.1.input_layernorm.weight");
  const EditedModel table(source, [](EditedTensors& tensors) {
    tensors["mtp.embed_tokens.weight"] = tensors.at("model.embed_tokens.weight");
  });
  expect_refused(table.path(), "mtp.embed_tokens.weight");
  const EditedModel delta(source, [](EditedTensors& tensors) {
    tensors["mtp.layers.0.linear_attn.norm.weight"] = tensors.at("mtp.norm.weight");
  });
  expect_refused(delta.path(), "linear_attn");
}

TEST(MtpRefused, OtherConfigurations) {
  const auto source = test_model("random-models/qwen3.5");
  const std::vector<std::pair<std::string, Json>> others = {
      {"mtp_num_hidden_layers", 2},
      {"mtp_num_hidden_layers", 0},
      {"mtp_num_hidden_layers", "many"},
      {"num_nextn_predict_layers", 3},
      {"mtp_use_dedicated_embeddings", true}};
  for (const auto& other : others) {
    const std::string& key = other.first;
    const EditedModel edited(source, nullptr, [&](Json& config) { config[key] = other.second; });
    expect_refused(edited.path(), key);
  }
  // Not said, and said to be nothing.
  const EditedModel silent(source, nullptr, [](Json& config) {
    config.erase("mtp_num_hidden_layers");
    config["mtp_use_dedicated_embeddings"] = nullptr;
  });
  RunningModel model(silent.path());
  EXPECT_TRUE(model.decoder().model().graph.mtp.has_value());
}

// The model itself runs; asked for drafts, it names the tensor.
void expect_malformed(const std::string& tensor, const std::function<void(EditedTensors&)>& edit) {
  const EditedModel edited(test_model("random-models/qwen3.5"), edit);
  RunningModel model(edited.path());
  EXPECT_EQ(model.logits(Ids{1, 2, 3}).size(), 3U * 307U);
  try {
    const Drafter drafter(model.context(), model.decoder().model());
    FAIL() << tensor;
  } catch (const ParseError& error) {
    EXPECT_NE(error.three_lines().find(tensor), std::string::npos) << error.three_lines();
  }
}

TEST(MtpMalformed, EveryTensorMustBeThereInItsShape) {
  for (const std::string name :
       {"fc.weight",
        "norm.weight",
        "pre_fc_norm_embedding.weight",
        "pre_fc_norm_hidden.weight",
        "layers.0.input_layernorm.weight",
        "layers.0.post_attention_layernorm.weight",
        "layers.0.self_attn.q_proj.weight",
        "layers.0.self_attn.q_norm.weight",
        "layers.0.mlp.down_proj.weight"}) {
    const std::string tensor = "mtp." + name;
    expect_malformed(tensor, [&](EditedTensors& tensors) { tensors.erase(tensor); });
    expect_malformed(tensor, [&](EditedTensors& tensors) {
      auto& [dtype, shape, values] = tensors.at(tensor);
      const std::size_t row = values.size() / static_cast<std::size_t>(shape.front());
      values.resize(values.size() - row);
      shape.front() -= 1;
    });
  }
}

}  // namespace
}  // namespace quern
