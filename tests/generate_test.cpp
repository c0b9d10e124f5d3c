// SPDX-License-Identifier: Apache-2.0
#include "nn/generate.h"

#include "base/error.h"
#include "running_model.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <set>
#include <utility>

namespace quern {
namespace {

using testing::Ids;
using testing::RunningModel;
using testing::test_model;

const std::vector<float> kLogits = {0.5F, 2.0F, -1.0F, 2.0F, 1.0F, 0.0F};

std::vector<std::int32_t> drawn(
    const SamplingOptions& options, std::uint64_t seed, int count = 1000) {
  Sampler sampler(options, seed);
  std::vector<std::int32_t> ids;
  for (int i = 0; i < count; ++i) {
    ids.push_back(sampler.next(kLogits));
  }
  return ids;
}

std::set<std::int32_t> seen(const SamplingOptions& options) {
  const auto ids = drawn(options, 1, 5000);
  return {ids.begin(), ids.end()};
}

TEST(Sampler, OfEqualsTheLowestIdIsTheGreedyOne) {
  EXPECT_EQ(seen({}), (std::set<std::int32_t>{1}));
  EXPECT_EQ(seen({.temperature = 1, .top_k = 1}), (std::set<std::int32_t>{1}));
  EXPECT_EQ(seen({.temperature = 5, .top_p = 1e-9}), (std::set<std::int32_t>{1}));
  EXPECT_EQ(seen({.temperature = 5, .top_p = 0}), (std::set<std::int32_t>{1}));
}

TEST(Sampler, CutsKeepTheLikeliest) {
  EXPECT_EQ(seen({.temperature = 2, .top_k = 3}), (std::set<std::int32_t>{1, 3, 4}));
  EXPECT_EQ(seen({.temperature = 2, .top_k = 100}).size(), kLogits.size());
  // Shares at temperature 1: 0.360 twice, 0.133, 0.080, 0.049, 0.018. The smallest set that
  // reaches 0.71 has two tokens, 0.73 three.
  EXPECT_EQ(seen({.temperature = 1, .top_p = 0.71}), (std::set<std::int32_t>{1, 3}));
  EXPECT_EQ(seen({.temperature = 1, .top_p = 0.73}), (std::set<std::int32_t>{1, 3, 4}));
  // Relative to the likeliest: 1, 1, 0.368, 0.223, 0.135, 0.0498.
  EXPECT_EQ(seen({.temperature = 1, .min_p = 0.36}), (std::set<std::int32_t>{1, 3, 4}));
  EXPECT_EQ(seen({.temperature = 1, .min_p = 0.05}), (std::set<std::int32_t>{0, 1, 3, 4, 5}));
  EXPECT_EQ(seen({.temperature = 1, .min_p = 1}), (std::set<std::int32_t>{1, 3}));
  // The temperature comes before min_p: halved, the differences double.
  EXPECT_EQ(seen({.temperature = 0.5, .min_p = 0.1}), (std::set<std::int32_t>{1, 3, 4}));
}

TEST(Sampler, SeedDecides) {
  EXPECT_EQ(drawn({.temperature = 1}, 42), drawn({.temperature = 1}, 42));
  EXPECT_NE(drawn({.temperature = 1}, 42), drawn({.temperature = 1}, 43));
}

// Pearson's statistic of `draws` draws is chi-squared with cells - 1 degrees of freedom, of mean
// k and variance 2 k; it exceeds k + 2 sqrt(k x) + 2 x with probability at most exp(-x)
// (Laurent and Massart 2000). x = 20: two in a thousand million.
void expect_distribution(const SamplingOptions& options, const std::vector<double>& shares) {
  constexpr int kDraws = 100000;
  std::vector<int> counts(kLogits.size());
  for (const std::int32_t id : drawn(options, 20260101, kDraws)) {
    ++counts.at(static_cast<std::size_t>(id));
  }
  double statistic = 0;
  int cells = 0;
  for (std::size_t i = 0; i < shares.size(); ++i) {
    if (shares[i] == 0) {
      EXPECT_EQ(counts[i], 0) << i;
      continue;
    }
    const double expected = shares[i] * kDraws;
    statistic += (counts[i] - expected) * (counts[i] - expected) / expected;
    ++cells;
  }
  const double k = cells - 1;
  EXPECT_LT(statistic, k + 2 * std::sqrt(k * 20) + 2 * 20.0);
}

std::vector<double> softmax_shares(double temperature, const std::set<std::int32_t>& kept) {
  std::vector<double> shares(kLogits.size());
  double total = 0;
  for (const std::int32_t id : kept) {
    const auto i = static_cast<std::size_t>(id);
    shares[i] = std::exp(static_cast<double>(kLogits[i]) / temperature);
    total += shares[i];
  }
  for (double& share : shares) {
    share /= total;
  }
  return shares;
}

TEST(Sampler, DrawsFromTheSoftmax) {
  expect_distribution({.temperature = 1}, softmax_shares(1, {0, 1, 2, 3, 4, 5}));
  expect_distribution({.temperature = 0.7}, softmax_shares(0.7, {0, 1, 2, 3, 4, 5}));
  expect_distribution({.temperature = 3}, softmax_shares(3, {0, 1, 2, 3, 4, 5}));
  expect_distribution({.temperature = 1, .top_k = 4}, softmax_shares(1, {0, 1, 3, 4}));
  expect_distribution({.temperature = 1, .top_p = 0.73}, softmax_shares(1, {1, 3, 4}));
}

TEST(Sampler, EveryTokenIsOneThatExistsWhateverTheLogits) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const double temperature : {0.0, 1.0, 1e-300, 1e300}) {
    for (const float odd : {inf, -inf, nan, 3e38F}) {
      // Long enough that a comparison that is no order would lead a sort astray.
      std::vector<float> logits(1000, 0.0F);
      for (std::size_t i = 0; i < logits.size(); i += 3) {
        logits[i] = odd;
      }
      Sampler sampler({.temperature = temperature}, 5);
      for (int i = 0; i < 20; ++i) {
        const std::int32_t id = sampler.next(logits);
        ASSERT_GE(id, 0);
        ASSERT_LT(id, 1000);
      }
    }
  }
  // A token that cannot be told is never preferred to one that can.
  for (const double temperature : {0.0, 1.0}) {
    Sampler sampler({.temperature = temperature}, 5);
    EXPECT_EQ(sampler.next(std::vector<float>{nan, 1.0F, -inf, nan}), 1) << temperature;
  }
}

GenerateOptions at_most(std::int64_t tokens, Ids stop_ids = {}, std::int64_t drawable = 0) {
  GenerateOptions options;
  options.max_tokens = tokens;
  options.stop_ids = std::move(stop_ids);
  options.drawable = drawable;
  return options;
}

class Generate : public ::testing::Test {
 protected:
  GenerateResult run(const GenerateOptions& options, const TokenObserver& observer = nullptr) {
    Sampler sampler({}, 0);
    return generate(model_.context(), model_.decoder(), prompt_, sampler, options, observer);
  }

  RunningModel model_{test_model("models/stories260K")};
  Ids prompt_ = {1, 403, 407, 261};
};

TEST_F(Generate, StopIdsEndItAndAreNotGivenOut) {
  const GenerateResult free = run(at_most(20));
  ASSERT_EQ(free.ids.size(), 20U);
  EXPECT_EQ(free.finish_reason, "length");
  const std::int32_t stop = free.ids[9];
  const auto first = std::find(free.ids.begin(), free.ids.end(), stop);
  const GenerateResult stopped = run(at_most(20, {511, stop}));
  EXPECT_EQ(stopped.finish_reason, "stop");
  EXPECT_EQ(stopped.ids, Ids(free.ids.begin(), first));
}

TEST_F(Generate, TheObserverSeesEveryTokenAndMayEndIt) {
  const GenerateResult free = run(at_most(20));
  Ids seen_ids;
  const GenerateResult ended = run(at_most(20), [&](std::int32_t id) {
    seen_ids.push_back(id);
    return seen_ids.size() < 5;
  });
  EXPECT_EQ(ended.finish_reason, "stop");
  EXPECT_EQ(ended.ids, seen_ids);
  EXPECT_EQ(ended.ids, Ids(free.ids.begin(), free.ids.begin() + 5));
}

TEST_F(Generate, OnlyDrawableTokensAreDrawn) {
  const GenerateResult result = run(at_most(20, {}, 300));
  for (const std::int32_t id : result.ids) {
    EXPECT_LT(id, 300);
  }
  EXPECT_EQ(run(at_most(20, {}, 100000)).ids, run(at_most(20)).ids);
}

TEST_F(Generate, NothingAskedIsNothingDone) {
  EXPECT_TRUE(run(at_most(0)).ids.empty());
  prompt_.clear();
  EXPECT_THROW((void)run(at_most(3)), UsageError);
}

TEST_F(Generate, AnInterruptEndsItWithWhatThereIs) {
  std::atomic<int> interrupts = 0;
  Context context = model_.context();
  context.interrupts = &interrupts;
  Sampler sampler({}, 0);
  const GenerateResult result =
      generate(context, model_.decoder(), prompt_, sampler, at_most(20), [&](std::int32_t) {
        ++interrupts;
        return true;
      });
  EXPECT_EQ(result.finish_reason, "interrupted");
  EXPECT_EQ(result.ids.size(), 1U);
}

}  // namespace
}  // namespace quern
