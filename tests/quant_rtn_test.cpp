// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/half.h"
#include "quant/grid.h"
#include "quant/method.h"
#include "quant_fixture.h"
#include "synthetic_layer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace quern {
namespace {

using testing::packed_of;
using testing::TestContext;

struct Case {
  std::vector<float> W;
  LinearProblem problem;
};

std::vector<float> random_weights(std::int64_t rows, std::int64_t columns, std::uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<float> normal(0.0F, 0.02F);
  std::vector<float> W(static_cast<std::size_t>(rows * columns));
  for (float& w : W) {
    w = normal(generator);
  }
  return W;
}

LinearResult rtn(
    const std::vector<float>& W,
    std::int64_t rows,
    const QuantScheme& scheme,
    const MethodOptions& options,
    const SiteStats* stats = nullptr) {
  const TestContext context;
  const std::int64_t columns = static_cast<std::int64_t>(W.size()) / rows;
  return find_method("rtn")->quantize(*context, {W, rows, columns, stats, scheme}, options);
}

MethodOptions with_range(RangeSearch range) {
  MethodOptions options;
  options.range = range;
  return options;
}

std::vector<std::uint8_t> row_codes(const PackedLinear& packed, std::int64_t row) {
  const KernelTable kernels = make_kernel_table(detect_cpu(), "");
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(packed.in_features));
  packed.get_row_codes(kernels, row, codes);
  return codes;
}

// methods.md 1.1, written again: GPTQ's symmetric and asymmetric grids with the scale in half.
void expect_formula(const std::vector<float>& W, std::int64_t rows, const QuantScheme& scheme) {
  const PackedLinear packed = packed_of(rtn(W, rows, scheme, with_range(RangeSearch::kMinMax)));
  const std::int64_t columns = packed.in_features;
  const std::int64_t width = scheme.group_width(columns);
  const auto M = static_cast<float>(scheme.max_code());
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::vector<std::uint8_t> codes = row_codes(packed, r);
    for (std::int64_t k = 0; k < packed.groups(); ++k) {
      const std::int64_t end = std::min((k + 1) * width, columns);
      float low = 0;
      float high = 0;
      for (std::int64_t j = k * width; j < end; ++j) {
        low = std::min(low, W[static_cast<std::size_t>(r * columns + j)]);
        high = std::max(high, W[static_cast<std::size_t>(r * columns + j)]);
      }
      const float range = scheme.symmetric ? 2.0F * std::max(-low, high) : high - low;
      const float s = f16_to_float(float_to_f16(range / M));
      const float z =
          scheme.symmetric ? static_cast<float>(scheme.symmetric_zero()) : std::nearbyint(-low / s);
      ASSERT_NEAR(packed.scales[static_cast<std::size_t>(r * packed.groups() + k)], s, s * 1e-3F);
      ASSERT_EQ(packed.zero(r, k), static_cast<int>(z));
      for (std::int64_t j = k * width; j < end; ++j) {
        const float w = W[static_cast<std::size_t>(r * columns + j)];
        const float expected = std::clamp(std::nearbyint(w / s) + z, 0.0F, M);
        ASSERT_EQ(codes[static_cast<std::size_t>(j)], static_cast<std::uint8_t>(expected))
            << scheme.bits << " bits, row " << r << ", column " << j;
      }
    }
  }
}

TEST(Rtn, CodesFollowTheFormula) {
  for (const int bits : {2, 3, 4, 5, 6, 7, 8}) {
    for (const bool symmetric : {true, false}) {
      for (const std::int64_t group : {16, 32, 128, 0}) {
        expect_formula(random_weights(7, 150, 5), 7, {bits, symmetric, group});
      }
    }
  }
}

TEST(Rtn, AsymmetricErrorIsAtMostHalfAStep) {
  const std::vector<float> W = random_weights(5, 96, 1);
  const TestContext context;
  for (const int bits : {2, 4, 8}) {
    const PackedLinear packed =
        packed_of(rtn(W, 5, {bits, false, 32}, with_range(RangeSearch::kMinMax)));
    const std::vector<float> Q = packed.dequantize((*context).kernels);
    for (std::size_t i = 0; i < W.size(); ++i) {
      const float scale = packed.scales[i / 32];
      // The zero point is rounded too, so an end of the range may be clipped by half a step; the
      // half-precision scale shortens the range by up to 2^-11 of it.
      EXPECT_LE(std::abs(Q[i] - W[i]), scale * (0.5F + 0x1p-11F * 256.0F)) << bits;
    }
  }
}

TEST(Rtn, OneRowAndOneColumn) {
  for (const RangeSearch range :
       {RangeSearch::kMinMax, RangeSearch::kPower24, RangeSearch::kWeighted}) {
    const LinearResult one = rtn({0.25F}, 1, {4, false, 128}, with_range(range));
    EXPECT_LT(one.report.relative_error, 1e-5);
    const LinearResult row = rtn(random_weights(1, 33, 2), 1, {4, true, 16}, with_range(range));
    EXPECT_EQ(packed_of(row).groups(), 3);
    EXPECT_LT(row.report.relative_error, 0.02);
  }
}

TEST(Rtn, ZeroGroupsGiveZeroPoints) {
  for (const RangeSearch range :
       {RangeSearch::kMinMax, RangeSearch::kPower24, RangeSearch::kWeighted}) {
    for (const bool symmetric : {true, false}) {
      const LinearResult result =
          rtn(std::vector<float>(64, 0.0F), 2, {3, symmetric, 16}, with_range(range));
      for (const std::uint8_t code : row_codes(packed_of(result), 1)) {
        EXPECT_EQ(code, packed_of(result).zero(1, 0));
      }
      EXPECT_EQ(result.report.relative_error, 0.0);
    }
  }
}

TEST(Rtn, ScalesStayNormalHalves) {
  for (const RangeSearch range :
       {RangeSearch::kMinMax, RangeSearch::kPower24, RangeSearch::kWeighted}) {
    for (const float size : {1e-30F, 1e-6F, 1.0F, 1e6F, 3e38F}) {
      const LinearResult result =
          rtn({size, -size, 0.5F * size, 0.0F}, 1, {4, false, 0}, with_range(range));
      const float scale = packed_of(result).scales[0];
      EXPECT_GE(scale, kSmallestNormalHalf) << size;
      EXPECT_LE(scale, 65504.0F) << size;
    }
  }
}

TEST(Rtn, RefusesWhatIsNotFinite) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    std::vector<float> W = random_weights(2, 8, 1);
    W[11] = bad;
    try {
      (void)rtn(W, 2, {}, {});
      FAIL() << "accepted " << bad;
    } catch (const ParseError& error) {
      EXPECT_EQ(error.where(), "row 1, column 3");
    }
  }
}

TEST(Rtn, RefusesBadRequests) {
  const std::vector<float> W = random_weights(2, 8, 1);
  EXPECT_THROW((void)rtn(W, 2, {1, true, 8}, {}), UsageError);
  EXPECT_THROW((void)rtn(W, 2, {9, true, 8}, {}), UsageError);
  EXPECT_THROW((void)rtn(W, 2, {4, true, -1}, {}), UsageError);
  MethodOptions options;
  options.damping = -1;
  EXPECT_THROW((void)rtn(W, 2, {}, options), UsageError);
  const TestContext context;
  EXPECT_THROW((void)find_method("rtn")->quantize(*context, {W, 3, 8, nullptr, {}}, {}), Error);
}

TEST(Rtn, MinimumZeroOneIsKept) {
  std::vector<float> W = random_weights(4, 64, 3);
  for (std::size_t i = 0; i < 64; ++i) {
    W[i] = std::abs(W[i]);  // a row that would like zero point 0
  }
  for (const RangeSearch range :
       {RangeSearch::kMinMax, RangeSearch::kPower24, RangeSearch::kWeighted}) {
    MethodOptions options = with_range(range);
    options.storage.minimum_zero_one = true;
    const LinearResult result = rtn(W, 4, {4, false, 32}, options);
    for (std::int64_t r = 0; r < 4; ++r) {
      for (std::int64_t k = 0; k < 2; ++k) {
        EXPECT_GE(packed_of(result).zero(r, k), 1);
        EXPECT_LE(packed_of(result).zero(r, k), 15);
      }
    }
    EXPECT_LT(result.report.relative_error, 0.02);
  }
}

TEST(Rtn, SearchIsNeverWorseThanMinMaxInItsOwnMeasure) {
  const std::vector<float> W = random_weights(32, 128, 9);
  for (const int bits : {2, 3, 4, 5, 6, 7, 8}) {
    for (const bool symmetric : {true, false}) {
      const QuantScheme scheme = {bits, symmetric, 64};
      const double plain =
          rtn(W, 32, scheme, with_range(RangeSearch::kMinMax)).report.relative_error;
      const double searched =
          rtn(W, 32, scheme, with_range(RangeSearch::kWeighted)).report.relative_error;
      EXPECT_LT(searched, plain) << bits << symmetric;
    }
  }
}

// The weighted search against the best of a dense scan of scales and all zero points, per group.
TEST(Grid, WeightedSearchIsCloseToExhaustive) {
  const KernelTable kernels = make_kernel_table(detect_cpu(), "");
  std::mt19937_64 generator(4);
  std::normal_distribution<float> normal(0.0F, 1.0F);
  constexpr std::int64_t kColumns = 64;
  for (const int bits : {2, 3, 4}) {
    for (const bool symmetric : {true, false}) {
      std::vector<float> W(kColumns * kRowLanes);
      std::vector<float> d(kColumns);
      for (float& w : W) {
        w = normal(generator);
      }
      for (float& weight : d) {
        weight = std::exp(2.0F * normal(generator));
      }
      std::vector<float> scales(kRowLanes);
      std::vector<float> zeros(kRowLanes);
      const GridRules rules = {bits, symmetric, {}, RangeSearch::kWeighted};
      find_ranges(
          kernels, rules, W.data(), kRowLanes, d.data(), kColumns, scales.data(), zeros.data());
      double found = 0;
      double best = 0;
      for (std::int64_t r = 0; r < kRowLanes; ++r) {
        const auto error = [&](float scale, float zero) {
          double sum = 0;
          for (std::int64_t j = 0; j < kColumns; ++j) {
            const float w = W[static_cast<std::size_t>(j * kRowLanes + r)];
            const float v = std::nearbyint(std::clamp(w / scale, -zero, rules.max_code() - zero));
            sum += static_cast<double>(d[static_cast<std::size_t>(j)]) *
                   std::pow(static_cast<double>(scale * v - w), 2);
          }
          return sum;
        };
        double lowest = std::numeric_limits<double>::infinity();
        for (int zero = 0; zero < (1 << bits); ++zero) {
          if (symmetric && zero != 1 << (bits - 1)) {
            continue;
          }
          for (int step = 0; step < 1700; ++step) {
            const float scale =
                storable_scale(0.02F * std::pow(1.003F, static_cast<float>(step)), DType::kF16);
            lowest = std::min(lowest, error(scale, static_cast<float>(zero)));
          }
        }
        best += lowest;
        found += error(scales[static_cast<std::size_t>(r)], zeros[static_cast<std::size_t>(r)]);
      }
      EXPECT_LT(found, best * 1.05) << bits << (symmetric ? " symmetric" : " asymmetric");
    }
  }
}

TEST(Methods, TableIsComplete) {
  ASSERT_NE(find_method("rtn"), nullptr);
  ASSERT_NE(find_method("gptq"), nullptr);
  EXPECT_EQ(find_method("awq2"), nullptr);
  for (const Method& method : methods()) {
    EXPECT_EQ(find_method(method.name), &method);
    EXPECT_LE(method.min_bits, method.max_bits);
    EXPECT_EQ(method.needs_reference, method.name == "gptaq") << method.name;
  }
  EXPECT_TRUE(find_method("gptq")->needs_statistics);
  EXPECT_EQ(order_name(ColumnOrder::kGroupAware), "group-aware");
  EXPECT_EQ(range_name(RangeSearch::kWeighted), "weighted");
}

}  // namespace
}  // namespace quern
