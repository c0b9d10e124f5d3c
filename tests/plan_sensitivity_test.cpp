// SPDX-License-Identifier: Apache-2.0
#include "plan/sensitivity.h"
#include "quant_fixture.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>
#include <vector>

namespace quern {
namespace {

using testing::TestContext;

constexpr std::int64_t kOut = 48;
constexpr std::int64_t kIn = 64;
constexpr std::int64_t kTokens = 20000;

// A linear with independent inputs of uneven size and gradients delta_ti = a_t b_i g_ti, which is
// what the formula supposes.
struct Sampled {
  std::vector<float> W;
  std::vector<float> X;  // [tokens, in]
  std::vector<float> delta;  // [tokens, out]
  SiteStats H;
  std::vector<double> delta_square;

  explicit Sampled(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    W.resize(kOut * kIn);
    for (float& w : W) {
      w = normal(random);
    }
    X.resize(kTokens * kIn);
    delta.resize(kTokens * kOut);
    H.width = kIn;
    H.H.assign(kIn * kIn, 0.0);
    H.abs_max.assign(kIn, 1.0F);
    H.rows = kTokens;
    delta_square.assign(kOut, 0.0);
    for (std::int64_t t = 0; t < kTokens; ++t) {
      const float a = 0.5F + static_cast<float>(t % 4);
      double weight = 0;
      for (std::int64_t i = 0; i < kOut; ++i) {
        float& d = delta[t * kOut + i];
        d = a * (1.0F + static_cast<float>(i % 5)) * normal(random);
        delta_square[i] += static_cast<double>(d) * d;
        weight += static_cast<double>(d) * d / kOut;
      }
      float* x = &X[t * kIn];
      for (std::int64_t j = 0; j < kIn; ++j) {
        x[j] = a * (1.0F + static_cast<float>(j % 3)) * normal(random);
      }
      for (std::int64_t j = 0; j < kIn; ++j) {
        for (std::int64_t k = 0; k < kIn; ++k) {
          H.H[j * kIn + k] += weight * x[j] * x[k] / kTokens;
        }
      }
    }
  }

  // 1/2 E_t sum_i delta_ti^2 (dW_i x_t)^2, token by token.
  [[nodiscard]] double loss(const std::vector<float>& D) const {
    double sum = 0;
    for (std::int64_t t = 0; t < kTokens; ++t) {
      for (std::int64_t i = 0; i < kOut; ++i) {
        const double error = std::inner_product(&D[i * kIn], &D[i * kIn] + kIn, &X[t * kIn], 0.0);
        const double d = delta[t * kOut + i];
        sum += 0.5 * d * d * error * error / kTokens;
      }
    }
    return sum;
  }
};

Block one_linear() {
  Block block;
  block.linears = {{"linear", Role::kOutput, kOut, kIn, false}};
  block.sites = {{"site", kIn, {0}, -1, {}}};
  return block;
}

TEST(Sensitivity, IsTheSecondOrderLossOfRounding) {
  const TestContext context;
  const Sampled linear(3);
  std::vector<PlanOption> options;
  for (const int bits : {2, 3, 4, 6}) {
    options.push_back({"rtn", {bits, false, 32, {}}, static_cast<std::uint64_t>(bits), 0});
  }
  const LinearEvidence evidence{rows_of(linear.W), &linear.H, linear.delta_square, options};
  MethodOptions method;
  method.range = RangeSearch::kMinMax;
  const std::vector<LinearScore> scores =
      score_site(*context, one_linear(), 0, {&evidence, 1}, nullptr, method);
  ASSERT_EQ(scores.size(), 1U);
  EXPECT_TRUE(scores[0].factors.empty());
  for (std::size_t o = 0; o < options.size(); ++o) {
    const LinearProblem problem{linear.W, kOut, kIn, nullptr, options[o].scheme};
    std::vector<float> D = find_method("rtn")
                               ->quantize(*context, problem, method)
                               .matrix->dequantize((*context).kernels);
    for (std::size_t i = 0; i < D.size(); ++i) {
      D[i] -= linear.W[i];
    }
    // The sums over 20000 tokens stand for expectations; delta^2 x^2 has a relative standard
    // deviation of about 5, 48 x 64 nearly independent terms average it: 5 / sqrt(20000) = 3.5 % at
    // the very worst, were all terms the same.
    EXPECT_NEAR(scores[0].losses[o], linear.loss(D), 0.05 * linear.loss(D)) << o;
  }
}

TEST(Sensitivity, FeedbackAndFactorsLowerTheLoss) {
  const TestContext context;
  Sampled linear(4);
  // Inputs that share a direction: error feedback can move errors out of it.
  for (std::int64_t j = 0; j < kIn; ++j) {
    for (std::int64_t k = 0; k < kIn; ++k) {
      linear.H.H[j * kIn + k] +=
          10 * std::sqrt(linear.H.H[j * kIn + j] * linear.H.H[k * kIn + k]) * (j == k ? 0 : 1);
    }
  }
  for (std::int64_t j = 0; j < kIn; ++j) {
    linear.H.H[j * kIn + j] *= 11;
    linear.H.H[j * kIn + j] += 1;
  }
  // One column in four is large where its input is small, as folded channels are.
  for (std::int64_t i = 0; i < kOut * kIn; ++i) {
    linear.W[i] *= i % 4 == 0 ? 8.0F : 1.0F;
  }
  for (std::int64_t j = 0; j < kIn; ++j) {
    for (std::int64_t k = 0; k < kIn; ++k) {
      linear.H.H[j * kIn + k] /= (j % 4 == 0 ? 8.0 : 1.0) * (k % 4 == 0 ? 8.0 : 1.0);
    }
  }
  const auto loss = [&](const std::string& method, const std::string& transform) {
    const std::vector<PlanOption> options = {{method, {3, true, 32, {}}, 1, 0}};
    const LinearEvidence evidence{rows_of(linear.W), &linear.H, linear.delta_square, options};
    return score_site(*context, one_linear(), 0, {&evidence, 1}, find_transform(transform), {})[0]
        .losses[0];
  };
  EXPECT_LT(loss("gptq", ""), 0.7 * loss("rtn", ""));
  EXPECT_LT(loss("gptq", "scale"), 0.7 * loss("gptq", ""));
}

// 1/2 sum_j g_j mean_v dE_vj^2, from the table itself.
TEST(Sensitivity, OfALookedUpTable) {
  const TestContext context;
  const Sampled table(6);  // its weights as 48 rows of 64
  std::vector<double> squares(kIn);
  for (std::size_t j = 0; j < squares.size(); ++j) {
    squares[j] = static_cast<double>(j % 5);
  }
  const std::vector<PlanOption> options = {{"rtn", {4, true, 32, {}}, 1, 0}, {"keep", {}, 2, 0}};
  MethodOptions method;
  method.range = RangeSearch::kMinMax;
  const std::vector<double> losses =
      score_lookup(*context, rows_of(table.W), kOut, squares, options, method);
  ASSERT_EQ(losses.size(), 2U);
  EXPECT_EQ(losses[1], 0.0);
  const LinearProblem problem{table.W, kOut, kIn, nullptr, options[0].scheme};
  const std::vector<float> Q = find_method("rtn")
                                   ->quantize(*context, problem, method)
                                   .matrix->dequantize((*context).kernels);
  double expected = 0;
  for (std::size_t i = 0; i < Q.size(); ++i) {
    const double d = static_cast<double>(Q[i]) - table.W[i];
    expected += 0.5 * squares[i % kIn] * d * d / kOut;
  }
  EXPECT_NEAR(losses[0], expected, 1e-5 * expected);  // floats against doubles
}

TEST(Sensitivity, NothingIsLostWhereNothingComesThrough) {
  const TestContext context;
  Sampled linear(5);
  const std::vector<PlanOption> options = {{"gptq", {2, true, 32, {}}, 1, 0}};
  linear.delta_square.assign(kOut, 0.0);
  linear.H.H.assign(kIn * kIn, 0.0);
  const LinearEvidence evidence{rows_of(linear.W), &linear.H, linear.delta_square, options};
  const std::vector<LinearScore> scores =
      score_site(*context, one_linear(), 0, {&evidence, 1}, find_transform("scale"), {});
  EXPECT_TRUE(std::isfinite(scores[0].losses[0]));
}

}  // namespace
}  // namespace quern
