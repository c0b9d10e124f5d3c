// SPDX-License-Identifier: Apache-2.0
#include "pipeline/additivity.h"

#include "base/error.h"
#include "eval/perplexity.h"
#include "plan/sensitivity.h"
#include "running_model.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <string>
#include <vector>

namespace quern {
namespace {

using testing::Ids;
using testing::test_model;
using testing::TestContext;

AdditivityCheck check_of(std::vector<double> predicted, std::vector<double> measured) {
  return {std::move(predicted), std::move(measured)};
}

TEST(Additivity, CorrelationAndSlope) {
  EXPECT_NEAR(check_of({1, 2, 3}, {2, 4, 6}).correlation(), 1.0, 1e-12);
  EXPECT_NEAR(check_of({1, 2, 3}, {2, 4, 6}).slope(), 2.0, 1e-12);
  EXPECT_NEAR(check_of({1, 2, 3}, {3, 2, 1}).correlation(), -1.0, 1e-12);
  // By hand: deviations (-1, 0, 1) and (-1, 1, 0); 1 / sqrt(2 * 2).
  EXPECT_NEAR(check_of({1, 2, 3}, {1, 3, 2}).correlation(), 0.5, 1e-12);
  EXPECT_NEAR(check_of({1, 2, 3}, {1, 3, 2}).slope(), 13.0 / 14.0, 1e-12);
  EXPECT_EQ(check_of({2, 2}, {1, 3}).correlation(), 0.0);
  EXPECT_EQ(check_of({0, 0}, {1, 3}).slope(), 1.0);
}

class Variants : public ::testing::Test {
 protected:
  Variants() : checkpoint_(open_checkpoint(test_model("models/tiny-qwen2.5"))) {
    graph_ = build_graph(checkpoint_->config(), "config.json");
    for (std::size_t i = 0; i < 2; ++i) {
      Ids ids;
      for (std::int32_t t = 0; t < 60; ++t) {
        ids.push_back((t * t * 31 + 17 * static_cast<std::int32_t>(i)) % 4000);
      }
      sequences_.push_back(std::move(ids));
    }
  }

  [[nodiscard]] std::vector<double> measure(int variants, const VariantWeights& weights_of) const {
    double done = 0;
    const std::vector<double> means = measure_variants(
        *context_, graph_, *checkpoint_, sequences_, variants, weights_of, [&](double work) {
          done += work;
        });
    EXPECT_NEAR(done, variants_work(graph_, sequences_, variants), 1e-6 * done);
    return means;
  }

  TestContext context_;
  std::unique_ptr<Checkpoint> checkpoint_;
  ModelGraph graph_;
  std::vector<Ids> sequences_;
};

// Weights of layer 1's down_proj with its first row doubled.
BlockWeights changed(const Block& block, const BlockWeights& original) {
  BlockWeights weights = original;
  if (block.index == 1) {
    LinearWeights& down = weights.linears[kDownProj];
    std::vector<float> W = to_float(down.dense);
    for (std::int64_t j = 0; j < down.in_features; ++j) {
      W[static_cast<std::size_t>(j)] *= 2;
    }
    down.aligned_copy = std::make_shared<const std::vector<std::byte>>(from_float(W, DType::kF32));
    down.dense.dtype = DType::kF32;
    down.dense.bytes = *down.aligned_copy;
  }
  return weights;
}

// Evaluation of two loaded models says the same.
TEST_F(Variants, DivergeAsInEvaluation) {
  const std::vector<double> found =
      measure(2, [](const Block& block, const BlockWeights& original, int variant) {
        return variant == 0 ? original : changed(block, original);
      });
  ASSERT_EQ(found.size(), 2U);
  // The same products twice: exactly nothing, but for the rounding of sums over 4096 tokens.
  EXPECT_LT(found[0], 1e-6);

  const Model reference = load_model(open_checkpoint(test_model("models/tiny-qwen2.5")));
  Model model = load_model(open_checkpoint(test_model("models/tiny-qwen2.5")));
  model.blocks[1] = changed(graph_.blocks[1], model.blocks[1]);
  Decoder decoder(*context_, model);
  Decoder reference_decoder(*context_, reference);
  Ids all = sequences_[0];
  all.insert(all.end(), sequences_[1].begin(), sequences_[1].end());
  PerplexityOptions options;
  options.context = 60;
  const TextResult expected =
      evaluate_text(*context_, decoder, &reference_decoder, all, options, nullptr);
  EXPECT_GT(found[1], 1e-4);
  EXPECT_NEAR(found[1], expected.divergence->kl_mean, 1e-6 + 1e-4 * found[1]);
}

TEST_F(Variants, RoundingErrorsHaveTheLossThatIsAskedFor) {
  const Block& block = graph_.blocks[0];
  const BlockWeights weights = load_block_weights(block, *checkpoint_);
  const LinearWeights& down = weights.linears[kDownProj];
  LinearScore score;
  for (std::int64_t i = 0; i < down.out_features; ++i) {
    score.row_weights.push_back(static_cast<double>(1 + i % 3));
  }
  for (std::int64_t j = 0; j < down.in_features; ++j) {
    score.variances.push_back(0.1 * static_cast<double>(1 + j % 7));
    score.factors.push_back(j % 2 == 0 ? 1.0F : 4.0F);
  }
  const std::vector<float> W = to_float(down.dense);
  for (const double loss : {0.0, 0.01, 3.0}) {
    const LinearWeights changed =
        with_rounding_errors(*context_, down, {3, true, 64, {}}, score, loss);
    const std::vector<float> Q = to_float(changed.dense);
    double found = 0;
    for (std::size_t i = 0; i < W.size(); ++i) {
      const double d = static_cast<double>(Q[i]) - W[i];
      found += 0.5 * score.row_weights[i / score.variances.size()] *
               score.variances[i % score.variances.size()] * d * d;
    }
    // The sum W + d is rounded to 24 bits, d is about 2^-4 of W or more.
    EXPECT_NEAR(found, loss, 1e-4 * loss) << loss;
  }
}

TEST_F(Variants, AreInterrupted) {
  const std::atomic<int> interrupts = 1;
  const Context& own = *context_;
  const Context ctx{
      own.pool, own.kernels, own.blas, own.log, own.memory_budget, own.seed, &interrupts};
  EXPECT_THROW(
      (void)measure_variants(
          ctx,
          graph_,
          *checkpoint_,
          sequences_,
          1,
          [](const Block&, const BlockWeights& original, int) { return original; },
          [](double) {}),
      InterruptedError);
}

}  // namespace
}  // namespace quern
