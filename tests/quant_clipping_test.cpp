// SPDX-License-Identifier: Apache-2.0
#include "quant/clipping.h"
#include "quant/curvature.h"
#include "quant/grid.h"
#include "quant/method.h"
#include "quant/row_block.h"
#include "quant/rtn.h"
#include "quant_fixture.h"
#include "synthetic_layer.h"

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

using testing::make_layer;
using testing::packed_of;
using testing::SyntheticLayer;
using testing::SyntheticOptions;
using testing::TestContext;

MethodOptions with_range(RangeSearch range) {
  MethodOptions options;
  options.range = range;
  return options;
}

// sum over groups of delta^T H_gg delta of one row, from the whole H in double.
double output_error(
    const SyntheticLayer& layer,
    const std::vector<float>& Q,
    std::int64_t row,
    std::int64_t width) {
  const std::int64_t n = layer.in_features;
  double error = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = i / width * width; j < std::min(i / width * width + width, n); ++j) {
      const auto at = [&](std::int64_t column) {
        const auto index = static_cast<std::size_t>(row * n + column);
        return static_cast<double>(Q[index]) - static_cast<double>(layer.W[index]);
      };
      error += at(i) * layer.stats.H[static_cast<std::size_t>(i * n + j)] * at(j);
    }
  }
  return error;
}

SyntheticLayer small_layer(std::uint64_t seed) {
  SyntheticOptions shape;
  shape.out_features = 24;
  shape.in_features = 150;  // the last group is shorter
  shape.rows = 500;
  shape.test_rows = 0;
  shape.channel_sigma = 1.5;
  return make_layer(shape, seed);
}

TEST(Clipping, IsNeverBehindWeightedOrMinMaxInAnyRow) {
  const TestContext context;
  const SyntheticLayer layer = small_layer(2);
  for (const int bits : {2, 3, 4, 8}) {
    for (const bool symmetric : {true, false}) {
      for (const std::int64_t group : {32, 64, 0}) {
        const QuantScheme scheme = {bits, symmetric, group};
        const auto values = [&](RangeSearch range) {
          return packed_of(quantize_rtn(*context, layer.problem(scheme), with_range(range)))
              .dequantize((*context).kernels);
        };
        const std::vector<float> output = values(RangeSearch::kOutput);
        const std::vector<float> weighted = values(RangeSearch::kWeighted);
        const std::vector<float> minmax = values(RangeSearch::kMinMax);
        double sum = 0;
        double weighted_sum = 0;
        const std::int64_t width = scheme.group_width(150);
        for (std::int64_t r = 0; r < 24; ++r) {
          const double error = output_error(layer, output, r, width);
          const double before = output_error(layer, weighted, r, width);
          // The search sums products in float, this test in double: n eps of the error's parts.
          EXPECT_LE(error, before * (1 + 1e-4)) << bits << symmetric << group << " row " << r;
          EXPECT_LE(error, output_error(layer, minmax, r, width) * (1 + 1e-4));
          sum += error;
          weighted_sum += before;
        }
        EXPECT_LT(sum, weighted_sum) << bits << symmetric << group;
      }
    }
  }
}

// Against the best of a dense scan of scales and all zero points, on groups of eight columns.
TEST(Clipping, IsCloseToExhaustiveOnTinyGroups) {
  const TestContext context;
  constexpr std::int64_t kColumns = 8;
  SyntheticOptions shape;
  shape.out_features = 32;
  shape.in_features = kColumns;
  shape.rows = 200;
  shape.test_rows = 0;
  shape.channel_sigma = 1.0;
  const SyntheticLayer layer = make_layer(shape, 3);
  for (const int bits : {2, 3, 4}) {
    for (const bool symmetric : {true, false}) {
      const QuantScheme scheme = {bits, symmetric, kColumns};
      const std::vector<float> Q =
          packed_of(quantize_rtn(*context, layer.problem(scheme), with_range(RangeSearch::kOutput)))
              .dequantize((*context).kernels);
      double found = 0;
      double best = 0;
      double weighted = 0;
      const std::vector<float> other =
          packed_of(
              quantize_rtn(*context, layer.problem(scheme), with_range(RangeSearch::kWeighted)))
              .dequantize((*context).kernels);
      for (std::int64_t r = 0; r < 32; ++r) {
        double lowest = std::numeric_limits<double>::infinity();
        std::vector<float> row(layer.W.size());
        for (int zero = 0; zero <= scheme.max_code(); ++zero) {
          if (symmetric && zero != scheme.symmetric_zero()) {
            continue;
          }
          for (int step = 0; step < 1700; ++step) {
            const float scale =
                storable_scale(0.0004F * std::pow(1.003F, static_cast<float>(step)), DType::kF16);
            for (std::int64_t j = 0; j < kColumns; ++j) {
              const auto at = static_cast<std::size_t>(r * kColumns + j);
              const auto z = static_cast<float>(zero);
              row[at] =
                  scale * std::nearbyint(std::clamp(
                              layer.W[at] / scale, -z, static_cast<float>(scheme.max_code()) - z));
            }
            lowest = std::min(lowest, output_error(layer, row, r, kColumns));
          }
        }
        best += lowest;
        found += output_error(layer, Q, r, kColumns);
        weighted += output_error(layer, other, r, kColumns);
      }
      // With eight columns the error jumps with every code: a search along the scale misses some of
      // the jumps, but takes most of what there is to take.
      EXPECT_LT(found - best, 0.5 * (weighted - best)) << bits << symmetric;
    }
  }
}

// With groups in another order of columns the same columns get the same ranges.
TEST(Clipping, MomentsFollowTheOrder) {
  const SyntheticLayer layer = small_layer(4);
  std::vector<std::int32_t> order(150);
  std::iota(order.rbegin(), order.rend(), 0);
  const GroupMoments moments(layer.stats, order, 64);
  for (const std::int64_t begin : {0, 64, 128}) {
    const std::int64_t columns = std::min<std::int64_t>(64, 150 - begin);
    for (std::int64_t i = 0; i < columns; ++i) {
      for (std::int64_t j = 0; j < columns; ++j) {
        EXPECT_EQ(
            moments.at(begin)[i * columns + j],
            static_cast<float>(layer.stats.H[static_cast<std::size_t>(
                (149 - begin - i) * 150 + 149 - begin - j)]));
      }
    }
  }
}

TEST(Clipping, WorksWithErrorFeedbackInEveryOrder) {
  const TestContext context;
  const SyntheticLayer layer = small_layer(5);
  for (const ColumnOrder order :
       {ColumnOrder::kNatural, ColumnOrder::kActivation, ColumnOrder::kGroupAware}) {
    MethodOptions options = with_range(RangeSearch::kOutput);
    options.order = order;
    const LinearResult result =
        find_method("gptq")->quantize(*context, layer.problem({3, false, 64}), options);
    EXPECT_EQ(result.report.method, "gptq");
    EXPECT_LT(result.report.relative_error, *result.report.rtn_error);
  }
}

TEST(Clipping, WithoutStatisticsItIsTheWeightedSearch) {
  const TestContext context;
  const SyntheticLayer layer = small_layer(6);
  LinearProblem problem = layer.problem({4, false, 64});
  problem.stats = nullptr;
  const LinearResult output = quantize_rtn(*context, problem, with_range(RangeSearch::kOutput));
  const LinearResult weighted = quantize_rtn(*context, problem, with_range(RangeSearch::kWeighted));
  EXPECT_EQ(packed_of(output).codes, packed_of(weighted).codes);
  EXPECT_EQ(packed_of(output).scales, packed_of(weighted).scales);
}

TEST(Clipping, TheProblemsRangeGoesBeforeTheOptions) {
  const TestContext context;
  const SyntheticLayer layer = small_layer(6);
  LinearProblem problem = layer.problem({4, false, 64});
  const LinearResult expected = quantize_rtn(*context, problem, with_range(RangeSearch::kMinMax));
  problem.range = RangeSearch::kMinMax;
  const LinearResult result = quantize_rtn(*context, problem, with_range(RangeSearch::kOutput));
  EXPECT_EQ(packed_of(result).codes, packed_of(expected).codes);
}

TEST(Clipping, SameBytesForAnyThreadCount) {
  SyntheticOptions shape;
  shape.out_features = 200;
  shape.in_features = 96;
  shape.rows = 300;
  shape.test_rows = 0;
  const SyntheticLayer layer = make_layer(shape, 2);
  const TestContext one(1);
  const TestContext many(3);
  const MethodOptions options = with_range(RangeSearch::kOutput);
  const LinearResult a = quantize_rtn(*one, layer.problem({3, false, 32}), options);
  const LinearResult b = quantize_rtn(*many, layer.problem({3, false, 32}), options);
  EXPECT_EQ(packed_of(a).codes, packed_of(b).codes);
  EXPECT_EQ(packed_of(a).scales, packed_of(b).scales);
}

TEST(Clipping, ThresholdIsOneForMinMaxAndLowerWhereOutliersAreClipped) {
  const TestContext context;
  SyntheticOptions shape;
  shape.out_features = 16;
  shape.in_features = 128;
  shape.rows = 400;
  shape.test_rows = 0;
  SyntheticLayer layer = make_layer(shape, 8);
  for (std::size_t r = 0; r < 16; ++r) {
    layer.W[r * 128 + 7] = 0.5F;  // 25 sigma, on an input that hardly matters
  }
  for (std::size_t j = 0; j < 128; ++j) {
    layer.stats.H[7 * 128 + j] *= 1e-3;
    layer.stats.H[j * 128 + 7] *= 1e-3;
  }
  for (const bool symmetric : {true, false}) {
    const LinearProblem problem = layer.problem({4, symmetric, 128});
    const auto threshold = [&](RangeSearch range) {
      return clip_threshold(layer.W, packed_of(quantize_rtn(*context, problem, with_range(range))));
    };
    // Asymmetric: the zero point is rounded, the scale is not.
    EXPECT_NEAR(threshold(RangeSearch::kMinMax), 1.0, 1e-6);
    EXPECT_LT(threshold(RangeSearch::kOutput), 0.4);
  }
  EXPECT_NEAR(
      clip_threshold(
          layer.W,
          packed_of(quantize_rtn(
              *context, layer.problem({4, true, 128}), with_range(RangeSearch::kAbsMax)))),
      15.0 / 14.0,
      1e-3);
  const std::vector<float> zeros(16 * 128, 0.0F);
  const LinearProblem nothing = {zeros, 16, 128, nullptr, {4, true, 128}};
  EXPECT_EQ(clip_threshold(zeros, packed_of(quantize_rtn(*context, nothing, {}))), 1.0);
}

TEST(Clipping, ComparesAllRanges) {
  const TestContext context;
  const SyntheticLayer layer = small_layer(9);
  const std::vector<RangeError> errors =
      compare_ranges(*context, layer.problem({3, false, 32}), {});
  ASSERT_EQ(errors.size(), 4U);
  for (const RangeError& each : errors) {
    const LinearResult result =
        quantize_rtn(*context, layer.problem({3, false, 32}), with_range(each.range));
    EXPECT_NEAR(each.error, result.report.relative_error, 1e-9) << range_name(each.range);
  }
  EXPECT_EQ(errors.back().range, RangeSearch::kOutput);
  EXPECT_LT(errors.back().error, errors.front().error);
  LinearProblem without = layer.problem({3, false, 32});
  without.stats = nullptr;
  EXPECT_TRUE(compare_ranges(*context, without, {}).empty());
}

TEST(Grid, AbsMaxHoldsBothExtremes) {
  const TestContext context;
  const std::vector<float> W = {0.7F, -0.7F, 0.1F, -0.35F, 0.7F, 0.2F, 0.3F, -0.1F};
  for (const int bits : {4, 8}) {
    const LinearResult result = quantize_rtn(
        *context, {W, 2, 4, nullptr, {bits, true, 0}}, with_range(RangeSearch::kAbsMax));
    const PackedLinear& packed = packed_of(result);
    const float expected =
        storable_scale(0.7F / static_cast<float>((1 << (bits - 1)) - 1), DType::kF16);
    EXPECT_NEAR(packed.scales[0], expected, 1e-3F * expected);
    const std::vector<float> Q = packed.dequantize((*context).kernels);
    EXPECT_NEAR(Q[0], 0.7F, 1e-3F);
    EXPECT_NEAR(Q[1], -0.7F, 1e-3F);
  }
}

TEST(Ranges, NamesRoundTrip) {
  for (const RangeSearch range :
       {RangeSearch::kMinMax,
        RangeSearch::kPower24,
        RangeSearch::kWeighted,
        RangeSearch::kOutput,
        RangeSearch::kAbsMax}) {
    EXPECT_EQ(range_from_name(range_name(range)), range);
  }
  EXPECT_FALSE(range_from_name("").has_value());
  EXPECT_FALSE(range_from_name("best").has_value());
}

}  // namespace
}  // namespace quern
