// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/file.h"
#include "eval/perplexity.h"
#include "running_model.h"
#include "scratch.h"
#include "tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>

namespace quern {
namespace {

using testing::Ids;
using testing::RunningModel;
using testing::test_model;

PerplexityOptions options_of(
    Protocol protocol, std::int64_t context, std::int64_t max_windows = 0) {
  PerplexityOptions options;
  options.protocol = protocol;
  options.context = context;
  options.max_windows = max_windows;
  return options;
}

class GoldenPerplexity : public ::testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(
    Trained,
    GoldenPerplexity,
    ::testing::Values("models/tiny-qwen3", "models/tiny-qwen2.5", "models/tiny-llama3"),
    [](const auto& model) { return testing::test_name(model.param); });

TEST_P(GoldenPerplexity, FirstWindowsOfBothProtocols) {
  constexpr std::int64_t kWindows = 3;
  const auto directory = test_model(GetParam());
  RunningModel model(directory);
  const Tokenizer tokenizer = load_tokenizer(directory);
  ASSERT_FALSE(tokenizer.adds_bos());
  const Ids ids =
      tokenizer.encode(read_file(std::filesystem::path(QUERN_TESTDATA) / "text/wiki.test.raw"));
  int compared = 0;
  for (const Json& entry : read_json(directory / "golden/perplexity.json")) {
    if (entry.at("text") != "the bytes of wiki.test.raw, tokenized as one string") {
      continue;  // the other text is the rows joined by two newlines
    }
    EXPECT_EQ(static_cast<std::int64_t>(ids.size()), entry.at("tokens_in_text"));
    const Protocol protocol =
        entry.at("protocol") == "gptq" ? Protocol::kGptq : Protocol::kLlamaCpp;
    EXPECT_EQ(protocol_name(protocol), entry.at("protocol"));
    const auto context = entry.at("context").get<std::int64_t>();
    const PerplexityResult result = evaluate_text(
                                        model.context(),
                                        model.decoder(),
                                        nullptr,
                                        ids,
                                        options_of(protocol, context, kWindows),
                                        nullptr)
                                        .model;
    ASSERT_EQ(result.windows, kWindows);
    EXPECT_EQ(
        result.tokens * entry.at("windows").get<std::int64_t>(),
        entry.at("predictions").get<std::int64_t>() * kWindows);
    for (std::size_t w = 0; w < kWindows; ++w) {
      const auto expected = entry.at("nll_per_window").at(w).get<double>();
      EXPECT_NEAR(result.window_nll[w], expected, 1e-4 * expected) << entry.at("protocol") << w;
    }
    ++compared;
  }
  EXPECT_EQ(compared, 2);
}

// What the header promises, in double from the logits, as plainly as it can be said.
struct Expected {
  std::vector<double> nll;  // of counted predictions, window after window
  std::vector<double> reference_nll;
  std::vector<double> kl;
  double agreement = 0;
};

std::vector<double> log_softmax(const float* logits, std::int64_t n) {
  std::vector<double> values(logits, logits + n);
  const double highest = *std::max_element(values.begin(), values.end());
  double sum = 0;
  for (const double value : values) {
    sum += std::exp(value - highest);
  }
  for (double& value : values) {
    value -= highest + std::log(sum);
  }
  return values;
}

Expected expected_of(
    RunningModel& model,
    RunningModel& reference,
    const Ids& ids,
    std::int64_t context,
    bool llama_cpp,
    std::int32_t bos) {
  Expected expected;
  const std::int64_t vocab = model.config().vocab_size;
  for (std::int64_t begin = 0; begin + context <= static_cast<std::int64_t>(ids.size());
       begin += context) {
    Ids window(ids.begin() + begin, ids.begin() + begin + context);
    if (llama_cpp) {
      window[0] = bos;
    }
    const std::vector<float> a = reference.logits(window);
    const std::vector<float> b = model.logits(window);
    for (std::int64_t t = llama_cpp ? context / 2 : 0; t < context; ++t) {
      const bool last = t == context - 1;
      if (last && llama_cpp) {
        continue;
      }
      const std::vector<double> p = log_softmax(a.data() + t * vocab, vocab);
      const std::vector<double> q = log_softmax(b.data() + t * vocab, vocab);
      if (!last) {
        const auto next = static_cast<std::size_t>(window[static_cast<std::size_t>(t) + 1]);
        expected.nll.push_back(-q[next]);
        expected.reference_nll.push_back(-p[next]);
      }
      double kl = 0;
      for (std::size_t i = 0; i < p.size(); ++i) {
        kl += std::exp(p[i]) * (p[i] - q[i]);
      }
      expected.kl.push_back(kl);
      const auto top = [](const std::vector<double>& x) {
        return std::max_element(x.begin(), x.end()) - x.begin();
      };
      expected.agreement += top(p) == top(q) ? 1 : 0;
    }
  }
  expected.agreement /= static_cast<double>(expected.kl.size());
  return expected;
}

double mean(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double standard_error(const std::vector<double>& values) {
  const double m = mean(values);
  double sum = 0;
  for (const double value : values) {
    sum += (value - m) * (value - m);
  }
  const auto n = static_cast<double>(values.size());
  return std::sqrt(sum / (n - 1) / n);
}

std::vector<double> window_means(const std::vector<double>& values, std::size_t per_window) {
  std::vector<double> means;
  for (std::size_t begin = 0; begin < values.size(); begin += per_window) {
    means.push_back(mean(
        {values.begin() + static_cast<std::ptrdiff_t>(begin),
         values.begin() + static_cast<std::ptrdiff_t>(begin + per_window)}));
  }
  return means;
}

class TwoModels : public ::testing::Test {
 protected:
  TextResult evaluate(const PerplexityOptions& options) {
    return evaluate_text(
        model_.context(), model_.decoder(), &reference_.decoder(), ids_, options, nullptr);
  }

  RunningModel model_{test_model("models/tiny-qwen2.5")};
  RunningModel reference_{test_model("models/tiny-qwen3")};
  // 41 tokens; windows of 13 leave two over.
  Ids ids_ = read_json(test_model("models/tiny-qwen3") / "golden/ids.json").at(2).get<Ids>();
};

// Shares are floats on the way to the sum; everything else is in double.
constexpr double kRelative = 1e-5;

TEST_F(TwoModels, GptqProtocolIsWhatItSays) {
  const Expected expected = expected_of(model_, reference_, ids_, 13, false, 0);
  const TextResult result = evaluate(options_of(Protocol::kGptq, 13));
  EXPECT_EQ(result.model.windows, 3);
  EXPECT_EQ(result.model.tokens, 36);
  EXPECT_EQ(result.model.context, 13);
  EXPECT_NEAR(result.model.nll_mean, mean(expected.nll), kRelative * mean(expected.nll));
  EXPECT_NEAR(result.model.ppl, std::exp(mean(expected.nll)), kRelative * 10 * result.model.ppl);
  const double error = standard_error(window_means(expected.nll, 12));
  EXPECT_NEAR(result.model.nll_stderr, error, kRelative * mean(expected.nll));
  EXPECT_NEAR(
      result.reference->nll_mean,
      mean(expected.reference_nll),
      kRelative * mean(expected.reference_nll));
  const DivergenceResult& divergence = *result.divergence;
  EXPECT_EQ(divergence.tokens, 39);
  const double kl = mean(expected.kl);
  EXPECT_GT(kl, 0.1);  // they are different models
  EXPECT_NEAR(divergence.kl_mean, kl, kRelative * kl);
  EXPECT_NEAR(divergence.kl_stderr, standard_error(window_means(expected.kl, 13)), kRelative * kl);
  EXPECT_DOUBLE_EQ(divergence.top1_agreement, expected.agreement);
  EXPECT_LT(expected.agreement, 1);
  EXPECT_NEAR(
      divergence.ppl_ratio,
      std::exp(mean(expected.nll) - mean(expected.reference_nll)),
      kRelative * 10 * divergence.ppl_ratio);
  std::vector<double> sorted = expected.kl;
  std::sort(sorted.begin(), sorted.end());
  EXPECT_NEAR(divergence.kl_median, sorted[19], kRelative * kl);
  // 0.99 * 38 = 37.62 between the last two.
  EXPECT_NEAR(divergence.kl_p99, 0.38 * sorted[37] + 0.62 * sorted[38], kRelative * sorted[38]);
}

TEST_F(TwoModels, LlamaCppProtocolCountsTheSecondHalf) {
  PerplexityOptions options = options_of(Protocol::kLlamaCpp, 13);
  options.bos_id = 4082;
  const Expected expected = expected_of(model_, reference_, ids_, 13, true, 4082);
  const TextResult result = evaluate(options);
  EXPECT_EQ(result.model.tokens, 3 * 6);  // positions 6 … 11
  EXPECT_NEAR(result.model.nll_mean, mean(expected.nll), kRelative * mean(expected.nll));
  EXPECT_NEAR(
      result.model.nll_stderr, standard_error(expected.nll), kRelative * mean(expected.nll));
  EXPECT_EQ(result.divergence->tokens, 18);
  const double kl = mean(expected.kl);
  EXPECT_NEAR(result.divergence->kl_mean, kl, kRelative * kl);
  EXPECT_NEAR(result.divergence->kl_stderr, standard_error(expected.kl), kRelative * kl);
  EXPECT_DOUBLE_EQ(result.divergence->top1_agreement, expected.agreement);
  // Without a BOS token the text's own first token stays.
  options.bos_id.reset();
  EXPECT_NE(evaluate(options).model.nll_mean, result.model.nll_mean);
}

TEST_F(TwoModels, WithAReferenceThePerplexityIsTheSame) {
  const PerplexityOptions options = options_of(Protocol::kGptq, 13, 2);
  const TextResult both = evaluate(options);
  std::vector<std::int64_t> steps;
  const TextResult alone = evaluate_text(
      model_.context(),
      model_.decoder(),
      nullptr,
      ids_,
      options,
      [&](std::int64_t done, std::int64_t total) {
        steps.push_back(done);
        EXPECT_EQ(total, 2);
      });
  EXPECT_EQ(alone.model.window_nll, both.model.window_nll);
  EXPECT_FALSE(alone.reference);
  EXPECT_FALSE(alone.divergence);
  EXPECT_EQ(steps, (std::vector<std::int64_t>{1, 2}));
}

TEST_F(TwoModels, AModelDoesNotDivergeFromItself) {
  for (const Protocol protocol : {Protocol::kGptq, Protocol::kLlamaCpp}) {
    RunningModel again(test_model("models/tiny-qwen2.5"), 2);
    const TextResult result = evaluate_text(
        model_.context(),
        model_.decoder(),
        &again.decoder(),
        ids_,
        options_of(protocol, 20),
        nullptr);
    EXPECT_EQ(result.divergence->kl_mean, 0);
    EXPECT_EQ(result.divergence->kl_stderr, 0);
    EXPECT_EQ(result.divergence->kl_median, 0);
    EXPECT_EQ(result.divergence->kl_p99, 0);
    EXPECT_EQ(result.divergence->top1_agreement, 1);
    EXPECT_EQ(result.divergence->ppl_ratio, 1);
  }
}

TEST_F(TwoModels, MisuseIsRefused) {
  // Too short a context; the llama.cpp protocol has nothing to count in two tokens.
  for (const std::int64_t context :
       {INT64_MIN, std::int64_t{-1}, std::int64_t{0}, std::int64_t{1}}) {
    EXPECT_THROW((void)evaluate(options_of(Protocol::kGptq, context)), UsageError) << context;
    EXPECT_THROW((void)evaluate(options_of(Protocol::kLlamaCpp, context)), UsageError) << context;
  }
  EXPECT_THROW((void)evaluate(options_of(Protocol::kLlamaCpp, 2)), UsageError);
  EXPECT_EQ(evaluate(options_of(Protocol::kGptq, 2)).model.tokens, 20);
  EXPECT_EQ(evaluate(options_of(Protocol::kLlamaCpp, 3)).model.tokens, 13);
  // Too short a text.
  EXPECT_NO_THROW((void)evaluate(options_of(Protocol::kGptq, 41)));
  EXPECT_THROW((void)evaluate(options_of(Protocol::kGptq, 42)), UsageError);
  EXPECT_THROW((void)evaluate(options_of(Protocol::kGptq, INT64_MAX)), UsageError);
  // Ids of another vocabulary.
  ids_[40] = 4096;
  EXPECT_THROW((void)evaluate(options_of(Protocol::kGptq, 41)), UsageError);
  ids_[40] = 0;
  PerplexityOptions options = options_of(Protocol::kLlamaCpp, 41);
  options.bos_id = 4096;
  EXPECT_THROW((void)evaluate(options), UsageError);
  RunningModel stories(test_model("models/stories260K"));
  EXPECT_THROW(
      (void)evaluate_text(
          model_.context(),
          model_.decoder(),
          &stories.decoder(),
          ids_,
          options_of(Protocol::kGptq, 20),
          nullptr),
      UsageError);
}

TEST_F(TwoModels, AnInterruptIsAnswered) {
  std::atomic<int> interrupts = 0;
  Context context = model_.context();
  context.interrupts = &interrupts;
  EXPECT_THROW(
      (void)evaluate_text(
          context,
          model_.decoder(),
          nullptr,
          ids_,
          options_of(Protocol::kGptq, 10),
          [&](std::int64_t, std::int64_t) { ++interrupts; }),
      InterruptedError);
  EXPECT_EQ(interrupts.load(), 1);
}

// A broken model must not look like a perfect one.
TEST(Divergence, OfAModelThatGivesNaNIsAnError) {
  testing::ScratchDirectory scratch;
  const auto source = test_model("random-models/llama3-tied");
  std::filesystem::copy_file(source / "config.json", scratch.path() / "config.json");
  std::string weights = read_file(source / "model.safetensors");
  const auto parsed = parse_safetensors(std::as_bytes(std::span(weights)), "model");
  const TensorView& gain = parsed.tensors.at("model.norm.weight");
  ASSERT_EQ(gain.dtype, DType::kF32);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto offset =
      static_cast<std::size_t>(gain.bytes.data() - std::as_bytes(std::span(weights)).data());
  std::memcpy(weights.data() + offset, &nan, sizeof nan);
  write_file(scratch.path() / "model.safetensors", weights);

  for (const char* isa : {"", "scalar"}) {
    RunningModel reference(source, 1, isa);
    RunningModel broken(scratch.path(), 1, isa);
    Ids ids(64);
    std::iota(ids.begin(), ids.end(), 0);
    EXPECT_THROW(
        (void)evaluate_text(
            broken.context(),
            broken.decoder(),
            &reference.decoder(),
            ids,
            options_of(Protocol::kGptq, 32),
            nullptr),
        Error)
        << isa;
  }
}

}  // namespace
}  // namespace quern
