// SPDX-License-Identifier: Apache-2.0
// Drafts change how fast tokens come, and nothing else.
#include "base/error.h"
#include "edited_model.h"
#include "nn/generate.h"
#include "nn/linear.h"
#include "packed_model.h"
#include "running_model.h"
#include "scratch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

namespace quern {
namespace {

using testing::EditedModel;
using testing::EditedTensors;
using testing::Ids;
using testing::PackedModel;
using testing::RunningModel;
using testing::ScratchDirectory;
using testing::test_model;

Ids random_ids(std::size_t count, std::int64_t vocab, std::uint32_t seed) {
  std::mt19937 random(seed);
  Ids ids(count);
  for (std::int32_t& id : ids) {
    id = static_cast<std::int32_t>(random() % static_cast<std::uint32_t>(vocab));
  }
  return ids;
}

std::vector<float> logits_of(Decoder& decoder, std::span<const float> hidden) {
  std::vector<float> all;
  decoder.for_logits(hidden, [&](std::int64_t, std::int64_t rows, const float* logits) {
    all.insert(all.end(), logits, logits + rows * decoder.model().graph.config.vocab_size);
  });
  return all;
}

// Bits, so that a NaN is equal to itself and 0 is not -0.
void expect_same_bits(const std::vector<float>& found, const std::vector<float>& expected) {
  ASSERT_EQ(found.size(), expected.size());
  EXPECT_EQ(std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)), 0);
}

void expect_same_state(const Sequence& found, const Sequence& expected) {
  ASSERT_EQ(found.layers.size(), expected.layers.size());
  for (std::size_t i = 0; i < found.layers.size(); ++i) {
    SCOPED_TRACE("layer " + std::to_string(i));
    EXPECT_EQ(found.layers[i].tokens, expected.layers[i].tokens);
    expect_same_bits(found.layers[i].keys, expected.layers[i].keys);
    expect_same_bits(found.layers[i].values, expected.layers[i].values);
    expect_same_bits(found.layers[i].convolved, expected.layers[i].convolved);
    expect_same_bits(found.layers[i].state, expected.layers[i].state);
  }
}

// Every way in which rows could depend on how many there are: logits and what is kept, token by
// token and together, and after all but some were taken back.
void expect_rows_alone(RunningModel& model) {
  Decoder& decoder = model.decoder();
  const std::int64_t vocab = model.config().vocab_size;
  for (const std::size_t prompt : {1, 20, 70}) {
    Sequence start;
    (void)decoder.forward(random_ids(prompt, vocab, 1), start);
    const Ids ids = random_ids(kFewTokens, vocab, 2);
    // after[k]: the state after k tokens, one at a time
    std::vector<Sequence> after = {start};
    std::vector<float> alone;
    std::vector<float> alone_logits;
    for (const std::int32_t& id : ids) {
      after.push_back(after.back());
      const std::vector<float> row = decoder.forward({&id, 1}, after.back());
      alone.insert(alone.end(), row.begin(), row.end());
      const std::vector<float> scores = logits_of(decoder, row);
      alone_logits.insert(alone_logits.end(), scores.begin(), scores.end());
    }
    for (std::size_t count = 1; count <= ids.size(); ++count) {
      SCOPED_TRACE(std::to_string(prompt) + " + " + std::to_string(count));
      for (std::size_t kept = 0; kept <= count; ++kept) {
        Sequence sequence = start;
        const std::vector<float> rows =
            decoder.forward_tentative(std::span(ids).first(count), sequence);
        expect_same_bits(rows, {alone.begin(), alone.begin() + rows.size()});
        const std::vector<float> scores = logits_of(decoder, rows);
        expect_same_bits(scores, {alone_logits.begin(), alone_logits.begin() + scores.size()});
        expect_same_state(sequence, after[count]);
        if (kept < count) {
          decoder.rewind(sequence, static_cast<std::int64_t>(prompt + kept));
        }
        expect_same_state(sequence, after[kept]);
      }
    }
  }
}

class RowsAlone : public ::testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(
    Models,
    RowsAlone,
    ::testing::Values(
        "models/tiny-qwen3",
        "models/tiny-qwen2.5",
        "models/stories260K",
        "random-models/mistral-window",
        "random-models/llama3-tied",
        "random-models/qwen3-moe",
        "random-models/qwen2-moe",
        "random-models/qwen3-next",
        "random-models/qwen3.5",
        "random-models/qwen3.5-moe"),
    [](const auto& model) { return testing::test_name(model.param); });

TEST_P(RowsAlone, AreTheRowsOfFewTokensTogether) {
  for (const char* isa : {"", "scalar"}) {
    RunningModel model(test_model(GetParam()), 2, isa);
    expect_rows_alone(model);
  }
}

TEST(RowsAlone, OfQuantizedLinears) {
  const ScratchDirectory scratch;
  for (const char* format : {"gptq", "quern"}) {
    PackedModel::uniform({4, true, 32}).write(scratch.path() / format, format);
    RunningModel model(scratch.path() / format);
    expect_rows_alone(model);
  }
  PackedModel rounded = PackedModel::uniform({8, true, 0});
  rounded.activation.bits = 8;
  rounded.write(scratch.path() / "w8a8", "compressed-tensors");
  RunningModel model(scratch.path() / "w8a8");
  expect_rows_alone(model);
}

// Less of each layer, and a draft layer that says what a model without layers would: drafts hold
// now and then.
void make_agreeing(EditedTensors& tensors) {
  // With a tied head the likeliest token after any is that token again, unless layers say
  // otherwise.
  const float share = tensors.contains("lm_head.weight") ? 0.05F : 0.4F;
  for (auto& [name, tensor] : tensors) {
    const bool is_output = name.find("o_proj") != std::string::npos ||
                           name.find("out_proj") != std::string::npos ||
                           name.find("down_proj") != std::string::npos;
    for (float& value : tensor.values) {
      value *= !is_output ? 1.0F : name.starts_with("mtp.") ? 0.05F : share;
    }
  }
  auto& projection = tensors.at("mtp.fc.weight");
  const auto width = static_cast<std::size_t>(projection.shape.front());
  std::fill(projection.values.begin(), projection.values.end(), 0.0F);
  for (std::size_t i = 0; i < width; ++i) {
    projection.values[i * 2 * width + i] = 1;
  }
  auto& norm = tensors.at("mtp.pre_fc_norm_embedding.weight").values;
  std::fill(norm.begin(), norm.end(), 0.0F);  // a gain of 1
  tensors.at("mtp.norm.weight").values = tensors.at("model.norm.weight").values;
}

class Speculative : public ::testing::TestWithParam<const char*> {
 protected:
  GenerateResult run(
      RunningModel& model,
      const Ids& prompt,
      GenerateOptions options,
      std::int64_t drafts,  // 0: none
      const SamplingOptions& sampling = {}) {
    Drafter drafter(model.context(), model.decoder().model());
    if (drafts > 0) {
      options.drafter = &drafter;
      options.draft_tokens = drafts;
    }
    Sampler sampler(sampling, 11);
    return generate(model.context(), model.decoder(), prompt, sampler, options);
  }
  static GenerateOptions at_most(std::int64_t tokens, Ids stop_ids = {}) {
    GenerateOptions options;
    options.max_tokens = tokens;
    options.stop_ids = std::move(stop_ids);
    return options;
  }
  static void expect_same(const GenerateResult& found, const GenerateResult& plain) {
    EXPECT_EQ(found.ids, plain.ids);
    EXPECT_EQ(found.finish_reason, plain.finish_reason);
    EXPECT_LE(found.accepted_draft_tokens, found.drafted_tokens);
    EXPECT_EQ(plain.drafted_tokens, 0);
  }

  RunningModel random_{test_model(GetParam())};
  EditedModel edited_{test_model(GetParam()), make_agreeing};
  RunningModel agreeing_{edited_.path()};
};

INSTANTIATE_TEST_SUITE_P(
    Models,
    Speculative,
    ::testing::Values(
        "random-models/qwen3-next", "random-models/qwen3.5", "random-models/qwen3.5-moe"),
    [](const auto& model) { return testing::test_name(model.param); });

TEST_P(Speculative, GivesTheTokensOfPlainDecoding) {
  std::int64_t accepted = 0;
  std::int64_t drafted = 0;
  for (std::uint32_t seed = 0; seed < 4; ++seed) {
    const Ids prompt = random_ids(1 + 9 * seed, 307, seed);
    for (RunningModel* model : {&random_, &agreeing_}) {
      const GenerateResult plain = run(*model, prompt, at_most(40), 0);
      for (const std::int64_t drafts : {1, 2, 3, 4, 5, 9}) {
        SCOPED_TRACE(std::to_string(seed) + ", drafts " + std::to_string(drafts));
        const GenerateResult found = run(*model, prompt, at_most(40), drafts);
        expect_same(found, plain);
        EXPECT_GT(found.drafted_tokens, 0);
        if (model == &agreeing_) {
          accepted += found.accepted_draft_tokens;
          drafted += found.drafted_tokens;
        }
      }
    }
  }
  // Both ways are walked.
  EXPECT_GT(accepted, drafted / 20);
  EXPECT_LT(accepted, drafted * 19 / 20);
}

// With one draft a step gives one token, or two when it holds; after the first, 39 are wanted.
TEST_P(Speculative, CountsWhatItDraftsAndAccepts) {
  const Ids prompt = random_ids(12, 307, 5);
  const GenerateResult found = run(agreeing_, prompt, at_most(40), 1);
  const std::int64_t steps = found.drafted_tokens;
  const std::int64_t tokens = 1 + steps + found.accepted_draft_tokens;
  EXPECT_TRUE(tokens == 40 || tokens == 39) << tokens;  // a last token needs no draft
}

TEST_P(Speculative, EndsWhereverTheLimitIs) {
  const Ids prompt = random_ids(15, 307, 3);
  const GenerateResult plain = run(agreeing_, prompt, at_most(12), 0);
  for (std::int64_t tokens = 0; tokens <= 12; ++tokens) {
    for (const std::int64_t drafts : {1, 4}) {
      const GenerateResult found = run(agreeing_, prompt, at_most(tokens), drafts);
      EXPECT_EQ(found.ids, Ids(plain.ids.begin(), plain.ids.begin() + tokens));
      EXPECT_EQ(found.finish_reason, "length");
    }
  }
}

// Every token of the text as the one that ends it, so that stops lie inside accepted drafts too.
TEST_P(Speculative, StopsInsideADraft) {
  const Ids prompt = random_ids(15, 307, 4);
  const GenerateResult free = run(agreeing_, prompt, at_most(24), 3);
  ASSERT_GT(free.accepted_draft_tokens, 0);
  for (const std::int32_t stop : free.ids) {
    const GenerateResult plain = run(agreeing_, prompt, at_most(24, {stop}), 0);
    ASSERT_EQ(plain.finish_reason, "stop");
    for (const std::int64_t drafts : {1, 2, 4}) {
      expect_same(run(agreeing_, prompt, at_most(24, {stop}), drafts), plain);
    }
  }
}

// A draw needs one random number a token, so that a seed gives the same tokens with drafts. That
// is rejection sampling for a draft that is certain of itself: it is taken with the probability
// that the model gives it.
TEST_P(Speculative, DrawsTheTokensOfPlainDecoding) {
  std::int64_t accepted = 0;
  for (const SamplingOptions& sampling :
       {SamplingOptions{.temperature = 0.5},
        SamplingOptions{.temperature = 1, .top_p = 0.8, .top_k = 20},
        SamplingOptions{.temperature = 1, .min_p = 0.1}}) {
    const Ids prompt = random_ids(15, 307, 6);
    const GenerateResult plain = run(agreeing_, prompt, at_most(40), 0, sampling);
    for (const std::int64_t drafts : {1, 3, 6}) {
      const GenerateResult found = run(agreeing_, prompt, at_most(40), drafts, sampling);
      expect_same(found, plain);
      accepted += found.accepted_draft_tokens;
    }
  }
  EXPECT_GT(accepted, 0);
}

TEST_P(Speculative, OnlyDrawableTokensAreDrawn) {
  const Ids prompt = random_ids(15, 100, 7);
  GenerateOptions options = at_most(30);
  options.drawable = 100;
  const GenerateResult found = run(agreeing_, prompt, options, 3);
  expect_same(found, run(agreeing_, prompt, options, 0));
  EXPECT_TRUE(std::all_of(found.ids.begin(), found.ids.end(), [](auto id) { return id < 100; }));
}

TEST_P(Speculative, TheObserverSeesEveryTokenAndMayEndIt) {
  Drafter drafter(agreeing_.context(), agreeing_.decoder().model());
  const Ids prompt = random_ids(15, 307, 4);
  const GenerateResult plain = run(agreeing_, prompt, at_most(24), 0);
  for (std::size_t end = 1; end < 12; ++end) {
    GenerateOptions options = at_most(24);
    options.drafter = &drafter;
    Sampler sampler({}, 0);
    Ids seen;
    const GenerateResult found = generate(
        agreeing_.context(), agreeing_.decoder(), prompt, sampler, options, [&](std::int32_t id) {
          seen.push_back(id);
          return seen.size() < end;
        });
    EXPECT_EQ(seen, Ids(plain.ids.begin(), plain.ids.begin() + static_cast<std::ptrdiff_t>(end)));
    EXPECT_EQ(found.ids, seen);
    EXPECT_EQ(found.finish_reason, "stop");
  }
}

}  // namespace
}  // namespace quern
