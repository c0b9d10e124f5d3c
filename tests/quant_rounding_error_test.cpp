// SPDX-License-Identifier: Apache-2.0
#include "quant/rounding_error.h"
#include "quant_fixture.h"
#include "synthetic_layer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

namespace quern {
namespace {

using testing::make_layer;
using testing::SyntheticLayer;
using testing::TestContext;

// Inverse of a small positive definite matrix by Gauss-Jordan elimination.
std::vector<double> inverse_of(std::vector<double> A, std::size_t n) {
  std::vector<double> B(n * n, 0.0);
  for (std::size_t i = 0; i < n; ++i) {
    B[i * n + i] = 1;
  }
  for (std::size_t k = 0; k < n; ++k) {
    const double pivot = A[k * n + k];
    for (std::size_t j = 0; j < n; ++j) {
      A[k * n + j] /= pivot;
      B[k * n + j] /= pivot;
    }
    for (std::size_t i = 0; i < n; ++i) {
      const double f = A[i * n + k];
      for (std::size_t j = 0; j < n && i != k; ++j) {
        A[i * n + j] -= f * A[k * n + j];
        B[i * n + j] -= f * B[k * n + j];
      }
    }
  }
  return B;
}

TEST(RoundingError, SampledRowsStandForAll) {
  std::vector<float> W(100 * 4);
  std::vector<double> weights(100);
  for (std::size_t i = 0; i < 100; ++i) {
    weights[i] = static_cast<double>(i) * static_cast<double>(i);
    for (std::size_t j = 0; j < 4; ++j) {
      W[i * 4 + j] = static_cast<float>(10 * i + j);
    }
  }
  for (const std::int64_t most : {1, 7, 50, 100, 1000}) {
    const RowSample sample = sample_rows(rows_of(W), 100, 4, weights, most);
    ASSERT_EQ(sample.rows, std::min<std::int64_t>(most, 100));
    ASSERT_EQ(sample.W.size(), static_cast<std::size_t>(sample.rows * 4));
    double sum = 0;
    for (std::size_t r = 0; r < sample.weights.size(); ++r) {
      sum += sample.weights[r];
      EXPECT_EQ(sample.W[4 * r + 3], sample.W[4 * r] + 3);  // whole rows
    }
    // The first row alone counts for nothing, so nothing can be made of it.
    EXPECT_NEAR(sum, most == 1 ? 0.0 : 328350.0, 1e-6) << most;
    const RowSample alike = sample_rows(rows_of(W), 100, 4, {}, most);
    EXPECT_NEAR(alike.weights.front(), 100.0 / static_cast<double>(sample.rows), 1e-12);
  }
}

// Against the error of what plain rounding returns, through another path.
TEST(RoundingError, IsThatOfPlainRounding) {
  const TestContext context;
  const SyntheticLayer layer = make_layer({.out_features = 70, .in_features = 96}, 5);
  std::mt19937_64 random(6);
  std::vector<double> rows(70);
  for (double& row : rows) {
    row = static_cast<double>(random() % 100);
  }
  std::vector<float> factors(96);
  std::vector<double> importance(96);
  for (std::size_t j = 0; j < 96; ++j) {
    factors[j] = std::exp2(static_cast<float>(random() % 5) - 2.0F);
    importance[j] = 1.0 + static_cast<double>(random() % 10);
  }
  for (const QuantScheme& scheme : {QuantScheme{2, true, 32, {}}, QuantScheme{4, false, 0, {}}}) {
    MethodOptions options;
    options.range = RangeSearch::kMinMax;  // plain rounding is not told the importance
    std::vector<float> scaled = layer.W;
    for (std::size_t i = 0; i < scaled.size(); ++i) {
      scaled[i] *= factors[i % 96];
    }
    LinearProblem problem{scaled, 70, 96, nullptr, scheme};
    const std::vector<float> Q = find_method("rtn")
                                     ->quantize(*context, problem, options)
                                     .matrix->dequantize((*context).kernels);
    double expected = 0;
    for (std::size_t i = 0; i < Q.size(); ++i) {
      const double d = (static_cast<double>(Q[i]) - scaled[i]) / factors[i % 96];
      expected += rows[i / 96] * importance[i % 96] * d * d;
    }
    const RowSample sample = sample_rows(rows_of(layer.W), 70, 96, rows, 1000);
    const double found = rounding_error(*context, sample, scheme, importance, factors, options);
    // Differences of floats that agree in about 4 leading bits: 2^-24 / 2^-4 each way.
    EXPECT_NEAR(found, expected, 1e-5 * expected);
    const double once = rounding_error(*context, sample, scheme, importance, {}, options);
    EXPECT_NE(once, found);
  }
}

TEST(RoundingError, DoesNotDependOnThreads) {
  const SyntheticLayer layer = make_layer({.out_features = 200, .in_features = 64}, 7);
  const RowSample sample = sample_rows(rows_of(layer.W), 200, 64, {}, 200);
  const std::vector<double> importance(64, 1.0);
  const auto with = [&](int threads) {
    const TestContext context(threads);
    return rounding_error(*context, sample, {3, false, 32, {}}, importance, {}, {});
  };
  EXPECT_EQ(with(1), with(3));
}

// 1 / (H[S, S]^-1)_jj with S the columns from j on in the order of rounding: by definition.
TEST(RoundingError, FeedbackLeavesTheConditionalVariances) {
  const TestContext context;
  const std::size_t n = 24;
  const SyntheticLayer layer =
      make_layer({.out_features = 8, .in_features = static_cast<std::int64_t>(n)}, 8);
  MethodOptions options;
  options.damping = 0;
  options.shrinkage = 0;
  const std::vector<double> found = conditional_variances(*context, layer.stats, options);
  const std::vector<double> variances = input_variances(layer.stats);
  std::vector<std::size_t> order(n);
  for (std::size_t j = 0; j < n; ++j) {
    order[j] = j;
    EXPECT_NEAR(variances[j], layer.stats.H[j * n + j], 1e-6 * variances[j]);
  }
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return variances[a] > variances[b];
  });
  for (std::size_t p = 0; p < n; ++p) {
    const std::size_t m = n - p;
    std::vector<double> rest(m * m);
    for (std::size_t i = 0; i < m; ++i) {
      for (std::size_t k = 0; k < m; ++k) {
        rest[i * m + k] = layer.stats.H[order[p + i] * n + order[p + k]];
      }
    }
    const double expected = 1 / inverse_of(rest, m)[0];
    // The factorisation takes the diagonal as floats: 2^-24, times the condition of H.
    EXPECT_NEAR(found[order[p]], expected, 1e-4 * expected) << p;
    EXPECT_LE(found[order[p]], variances[order[p]] * (1 + 1e-6));
  }
}

}  // namespace
}  // namespace quern
