// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "quant/curvature.h"
#include "quant/gptaq.h"
#include "quant/gptq.h"
#include "quant/method.h"
#include "quant_fixture.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

namespace quern {
namespace {

using testing::packed_of;
using testing::TestContext;

using Matrix = std::vector<double>;  // row-major

// Tokens of both models, kept, so that nothing has to be taken from second moments.
struct TwoStreams {
  std::size_t tokens;
  std::size_t n;
  std::size_t m;
  Matrix X;  // [tokens, n] inputs of the quantized model
  Matrix reference;  // of the original
  std::vector<float> W;  // [m, n]
  SiteStats stats;

  [[nodiscard]] LinearProblem problem(const QuantScheme& scheme) const {
    return {W, static_cast<std::int64_t>(m), static_cast<std::int64_t>(n), &stats, scheme};
  }
  // sum |X~ W^T - X Q^T|^2 over sum |X~ W^T|^2.
  [[nodiscard]] double mismatch(const std::vector<float>& Q) const {
    double error = 0;
    double total = 0;
    for (std::size_t t = 0; t < tokens; ++t) {
      for (std::size_t r = 0; r < m; ++r) {
        double wanted = 0;
        double found = 0;
        for (std::size_t j = 0; j < n; ++j) {
          wanted += reference[t * n + j] * static_cast<double>(W[r * n + j]);
          found += X[t * n + j] * static_cast<double>(Q[r * n + j]);
        }
        error += (wanted - found) * (wanted - found);
        total += wanted * wanted;
      }
    }
    return error / total;
  }
};

Matrix moment(const Matrix& A, const Matrix& B, std::size_t tokens, std::size_t n) {
  Matrix product(n * n);
  for (std::size_t t = 0; t < tokens; ++t) {
    for (std::size_t i = 0; i < n; ++i) {
      for (std::size_t j = 0; j < n; ++j) {
        product[i * n + j] += A[t * n + i] * B[t * n + j] / static_cast<double>(tokens);
      }
    }
  }
  return product;
}

// Correlated inputs of uneven size, and the same with a systematic and a random disturbance.
TwoStreams make_streams(
    std::size_t tokens, std::size_t n, std::size_t m, double disturbance, std::uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> normal;
  TwoStreams made{tokens, n, m, Matrix(tokens * n), Matrix(tokens * n), {}, {}};
  Matrix drift(n * n);
  for (double& value : drift) {
    value = disturbance * normal(generator) / std::sqrt(static_cast<double>(n));
  }
  for (std::size_t t = 0; t < tokens; ++t) {
    const double shared = normal(generator);
    for (std::size_t j = 0; j < n; ++j) {
      const double size = 1.0 + 0.1 * static_cast<double>((j * 7) % n);
      made.reference[t * n + j] = size * (0.8 * shared + normal(generator));
    }
    for (std::size_t j = 0; j < n; ++j) {
      made.X[t * n + j] = made.reference[t * n + j] + 0.3 * disturbance * normal(generator);
      for (std::size_t i = 0; i < n; ++i) {
        made.X[t * n + j] += drift[i * n + j] * made.reference[t * n + i];
      }
    }
  }
  made.W.resize(m * n);
  for (float& w : made.W) {
    w = static_cast<float>(0.02 * normal(generator));
  }
  made.stats.width = static_cast<std::int64_t>(n);
  made.stats.rows = static_cast<std::int64_t>(tokens);
  made.stats.H = moment(made.X, made.X, tokens, n);
  made.stats.G = moment(made.X, made.reference, tokens, n);
  return made;
}

MethodOptions recursion_only(double alpha, ColumnOrder order) {
  MethodOptions options;
  options.order = order;
  options.range = RangeSearch::kMinMax;
  options.descent_sweeps = 0;
  options.refit_rounds = 0;
  options.shrinkage = 0;
  options.asymmetry = alpha;
  return options;
}

// argmin over d of |A d - b|^2 + ridge |d|^2 for A = the columns `which` of X: normal equations
// from the tokens, by Gaussian elimination.
Matrix least_squares(
    const TwoStreams& streams,
    const std::vector<std::size_t>& which,
    const Matrix& b,
    double ridge) {
  const std::size_t k = which.size();
  Matrix A(k * (k + 1));
  for (std::size_t t = 0; t < streams.tokens; ++t) {
    for (std::size_t i = 0; i < k; ++i) {
      const double x = streams.X[t * streams.n + which[i]];
      for (std::size_t j = 0; j < k; ++j) {
        A[i * (k + 1) + j] += x * streams.X[t * streams.n + which[j]];
      }
      A[i * (k + 1) + k] += x * b[t];
    }
  }
  for (std::size_t i = 0; i < k; ++i) {
    A[i * (k + 1) + i] += ridge;
  }
  for (std::size_t c = 0; c < k; ++c) {
    for (std::size_t i = 0; i < k; ++i) {
      const double factor = i == c ? 0.0 : A[i * (k + 1) + c] / A[c * (k + 1) + c];
      for (std::size_t j = c; j <= k; ++j) {
        A[i * (k + 1) + j] -= factor * A[c * (k + 1) + j];
      }
    }
  }
  Matrix d(k);
  for (std::size_t i = 0; i < k; ++i) {
    d[i] = A[i * (k + 1) + k] / A[i * (k + 1) + i];
  }
  return d;
}

// The paper's step, token by token: when column p is rounded to q, the columns that are left move
// so that X_left d makes up for x_p (w_p - q) and for alpha w_p (x~_p - x_p), in least squares.
std::vector<int> brute_force_codes(
    const TwoStreams& streams,
    const PackedLinear& ranges,
    const std::vector<std::int32_t>& order,
    double alpha,
    double lambda) {
  const std::size_t n = streams.n;
  double trace = 0;
  for (std::size_t j = 0; j < n; ++j) {
    trace += streams.stats.H[j * (n + 1)];
  }
  const double ridge =
      lambda * trace / static_cast<double>(n) * static_cast<double>(streams.tokens);
  const int zero = ranges.scheme.symmetric_zero();
  std::vector<int> codes(streams.m * n);
  for (std::size_t r = 0; r < streams.m; ++r) {
    Matrix w(
        streams.W.begin() + static_cast<std::ptrdiff_t>(r * n),
        streams.W.begin() + static_cast<std::ptrdiff_t>((r + 1) * n));
    for (std::size_t p = 0; p < n; ++p) {
      const auto column = static_cast<std::size_t>(order[p]);
      const double scale =
          static_cast<double>(ranges.scales
                                  [r * static_cast<std::size_t>(ranges.groups()) +
                                   column / static_cast<std::size_t>(ranges.scheme.group_width(
                                                static_cast<std::int64_t>(n)))]);
      const double v =
          std::clamp(
              std::nearbyint(w[column] / scale) + zero, 0.0, 1.0 * ranges.scheme.max_code()) -
          zero;
      codes[r * n + column] = static_cast<int>(v) + zero;
      const std::vector<std::size_t> left(
          order.begin() + static_cast<std::ptrdiff_t>(p) + 1, order.end());
      Matrix missing(streams.tokens);
      for (std::size_t t = 0; t < streams.tokens; ++t) {
        const double x = streams.X[t * n + column];
        missing[t] = x * (w[column] - scale * v) +
                     alpha * w[column] * (streams.reference[t * n + column] - x);
      }
      const Matrix moved = least_squares(streams, left, missing, ridge);
      for (std::size_t i = 0; i < left.size(); ++i) {
        w[left[i]] += moved[i];
      }
    }
  }
  return codes;
}

std::vector<int> all_codes(const Context& ctx, const PackedLinear& packed) {
  std::vector<int> codes;
  std::vector<std::uint8_t> row(static_cast<std::size_t>(packed.in_features));
  for (std::int64_t r = 0; r < packed.out_features; ++r) {
    packed.get_row_codes(ctx.kernels, r, row);
    codes.insert(codes.end(), row.begin(), row.end());
  }
  return codes;
}

TEST(Gptaq, CodesAreThoseOfTheTokenWiseRecursion) {
  const TestContext context;
  const TwoStreams streams = make_streams(240, 40, 6, 0.3, 3);
  for (const ColumnOrder order : {ColumnOrder::kActivation, ColumnOrder::kGroupAware}) {
    for (const double alpha : {0.0, 0.25, 1.0}) {
      const MethodOptions options = recursion_only(alpha, order);
      const LinearResult result = quantize_gptaq(*context, streams.problem({4, true, 16}), options);
      ASSERT_EQ(result.report.method, "gptaq");
      ASSERT_FALSE(result.report.fallback.has_value());
      const Curvature curvature = make_curvature(streams.stats);
      EXPECT_EQ(
          all_codes(*context, packed_of(result)),
          brute_force_codes(
              streams,
              packed_of(result),
              column_order(order, curvature.importance, 16),
              alpha,
              options.damping))
          << order_name(order) << ", alpha " << alpha;
    }
  }
}

TEST(Gptaq, WithoutAsymmetryItIsGptq) {
  const TestContext context;
  const TwoStreams streams = make_streams(400, 64, 8, 0.2, 5);
  MethodOptions options;
  options.asymmetry = 0;
  const LinearResult gptaq = quantize_gptaq(*context, streams.problem({3, false, 32}), options);
  const LinearResult gptq = quantize_gptq(*context, streams.problem({3, false, 32}), options);
  EXPECT_EQ(packed_of(gptaq).codes, packed_of(gptq).codes);
  EXPECT_EQ(packed_of(gptaq).scales, packed_of(gptq).scales);
}

TEST(Gptaq, ComesCloserToTheUnquantizedModelThanGptqAndRtn) {
  const TestContext context;
  for (const int bits : {2, 3, 4}) {
    double before = std::numeric_limits<double>::infinity();
    const TwoStreams streams = make_streams(1500, 96, 24, 0.3, 7);
    for (const double alpha : {0.0, 0.25, 1.0}) {
      const LinearResult recursion = quantize_gptaq(
          *context,
          streams.problem({bits, true, 32}),
          recursion_only(alpha, ColumnOrder::kActivation));
      const double error = streams.mismatch(packed_of(recursion).dequantize((*context).kernels));
      EXPECT_LT(error, before) << bits << " bits, alpha " << alpha;
      before = error;
      MethodOptions all;
      all.asymmetry = alpha;
      const LinearResult descended =
          quantize_gptaq(*context, streams.problem({bits, true, 32}), all);
      EXPECT_LT(streams.mismatch(packed_of(descended).dequantize((*context).kernels)), error)
          << bits << " bits, alpha " << alpha;
    }
    const LinearResult rtn =
        find_method("rtn")->quantize(*context, streams.problem({bits, true, 32}), {});
    EXPECT_LT(before, streams.mismatch(packed_of(rtn).dequantize((*context).kernels)));
  }
}

TEST(Gptaq, SameBytesForAnyThreadCount) {
  const TwoStreams streams = make_streams(600, 150, 140, 0.2, 9);
  const TestContext one(1);
  const LinearResult expected = quantize_gptaq(*one, streams.problem({3, false, 32}), {});
  for (const int threads : {2, 5}) {
    const TestContext many(threads);
    const LinearResult result = quantize_gptaq(*many, streams.problem({3, false, 32}), {});
    EXPECT_EQ(packed_of(result).codes, packed_of(expected).codes);
    EXPECT_EQ(packed_of(result).scales, packed_of(expected).scales);
    EXPECT_EQ(result.report.relative_error, expected.report.relative_error);
  }
}

TEST(Gptaq, DeadInputsOfOneStreamDoNoHarm) {
  const TestContext context;
  TwoStreams streams = make_streams(300, 32, 8, 0.2, 4);
  for (std::size_t t = 0; t < streams.tokens; ++t) {
    streams.X[t * 32 + 5] = 0;
    streams.reference[t * 32 + 9] = 0;
  }
  streams.stats.H = moment(streams.X, streams.X, streams.tokens, 32);
  streams.stats.G = moment(streams.X, streams.reference, streams.tokens, 32);
  MethodOptions options;
  options.asymmetry = 1;
  const LinearResult result = quantize_gptaq(*context, streams.problem({4, true, 16}), options);
  EXPECT_EQ(result.report.method, "gptaq");
  EXPECT_EQ(result.report.dead_columns, 1);
  for (const float q : packed_of(result).dequantize((*context).kernels)) {
    EXPECT_TRUE(std::isfinite(q));
    EXPECT_LT(std::abs(q), 1.0F);
  }
}

TEST(Gptaq, WithoutASecondStreamItSaysSoAndIsGptq) {
  const TestContext context;
  TwoStreams streams = make_streams(300, 32, 8, 0.2, 4);
  const auto quantize = [&](const SiteStats* stats) {
    LinearProblem problem = streams.problem({4, true, 16});
    problem.stats = stats;
    return quantize_gptaq(*context, problem, {});
  };
  SiteStats without = streams.stats;
  without.G.clear();
  const LinearResult gptq = quantize(&without);
  EXPECT_EQ(gptq.report.method, "gptq");
  EXPECT_NE(gptq.report.fallback.value_or("").find("unquantized"), std::string::npos);
  SiteStats broken = streams.stats;
  broken.G[3] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_NE(quantize(&broken).report.fallback.value_or("").find("NaN"), std::string::npos);
  EXPECT_EQ(quantize(nullptr).report.method, "rtn");
  EXPECT_NE(
      quantize(nullptr).report.fallback.value_or("").find("no calibration statistics"),
      std::string::npos);
}

TEST(Gptaq, RefusesAlphaOutOfRange) {
  const TestContext context;
  const TwoStreams streams = make_streams(50, 16, 4, 0.2, 4);
  for (const double alpha : {-0.1, 1.5, std::numeric_limits<double>::quiet_NaN()}) {
    MethodOptions options;
    options.asymmetry = alpha;
    EXPECT_THROW(
        (void)quantize_gptaq(*context, streams.problem({4, true, 16}), options), UsageError)
        << alpha;
  }
}

}  // namespace
}  // namespace quern
