// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/half.h"
#include "format/safetensors.h"
#include "golden.h"
#include "quant/billm.h"
#include "quant/billm_matrix.h"
#include "quant/method.h"
#include "quant_fixture.h"
#include "synthetic_layer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace quern {
namespace {

using testing::make_layer;
using testing::SyntheticLayer;
using testing::SyntheticOptions;
using testing::TestContext;
using testing::values_of;

constexpr QuantScheme kBinary = {1, true, 128};

const BillmMatrix& billm_of(const LinearResult& result) {
  return dynamic_cast<const BillmMatrix&>(*result.matrix);
}

// --- against the published algorithm ------------------------------------------------------------

// scripts/make_billm_golden.py: 24 x 176, so a block of 128 columns and one of 48.
struct Reference {
  std::vector<float> W;
  std::vector<float> plain;
  std::vector<float> fed;
  SiteStats stats;

  Reference() {
    const auto store =
        SafetensorsStore::open(std::string(QUERN_TESTDATA) + "/golden/billm/reference.safetensors");
    const auto load = [&](const char* name) { return values_of<float>(*store->find(name)); };
    W = load("W");
    plain = load("plain");
    fed = load("fed");
    const std::vector<float> H = load("H");
    stats.width = kColumns;
    stats.rows = 1'000'000;  // H is taken as it is
    stats.H.assign(H.begin(), H.end());
  }
  static constexpr std::int64_t kRows = 24;
  static constexpr std::int64_t kColumns = 176;

  [[nodiscard]] LinearProblem problem() const { return {W, kRows, kColumns, &stats, kBinary}; }
  // sum H_jj (w - q)^2 over columns [begin, end).
  [[nodiscard]] double weighted_error(
      const std::vector<float>& Q, std::int64_t begin, std::int64_t end) const {
    double error = 0;
    for (std::int64_t i = 0; i < kRows * kColumns; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const std::int64_t j = i % kColumns;
      const double d = static_cast<double>(Q[at]) - static_cast<double>(W[at]);
      error += j >= begin && j < end ? stats.H[static_cast<std::size_t>(j * (kColumns + 1))] * d * d
                                     : 0.0;
    }
    return error;
  }
  // tr(D H D^T).
  [[nodiscard]] double output_error(const std::vector<float>& Q) const {
    double error = 0;
    for (std::int64_t r = 0; r < kRows; ++r) {
      const auto d = [&](std::int64_t j) {
        const auto at = static_cast<std::size_t>(r * kColumns + j);
        return static_cast<double>(Q[at]) - static_cast<double>(W[at]);
      };
      for (std::int64_t i = 0; i < kColumns; ++i) {
        for (std::int64_t j = 0; j < kColumns; ++j) {
          error += d(i) * stats.H[static_cast<std::size_t>(i * kColumns + j)] * d(j);
        }
      }
    }
    return error;
  }
};

MethodOptions as_published() {
  MethodOptions options;
  options.shrinkage = 0;
  options.damping = 0.01;
  return options;
}

TEST(Billm, IsAheadOfThePublishedAlgorithm) {
  const TestContext context;
  const Reference reference;
  const LinearResult result = quantize_billm(*context, reference.problem(), as_published());
  EXPECT_EQ(result.report.method, "billm");
  EXPECT_FALSE(result.report.fallback.has_value()) << *result.report.fallback;
  const std::vector<float> fed = result.matrix->dequantize((*context).kernels);
  EXPECT_LT(reference.output_error(fed), 0.9 * reference.output_error(reference.fed));

  // Without error feedback every block stands for itself: structure, threshold and levels must be
  // at least as good as the published ones in each.
  LinearProblem without = reference.problem();
  SiteStats diagonal = reference.stats;
  for (std::size_t i = 0; i < diagonal.H.size(); ++i) {
    diagonal.H[i] = i % (Reference::kColumns + 1) == 0 ? diagonal.H[i] : 0.0;
  }
  without.stats = &diagonal;
  const std::vector<float> plain =
      quantize_billm(*context, without, as_published()).matrix->dequantize((*context).kernels);
  for (const auto& [begin, end] : {std::pair(0, 128), std::pair(128, 176)}) {
    EXPECT_LT(
        reference.weighted_error(plain, begin, end),
        reference.weighted_error(reference.plain, begin, end))
        << "block at " << begin;
  }
}

TEST(Billm, EveryRowOfABlockHasFourLevelsForEachKindOfColumn) {
  const TestContext context;
  const Reference reference;
  const LinearResult result = quantize_billm(*context, reference.problem(), as_published());
  const BillmMatrix& matrix = billm_of(result);
  const std::vector<float> Q = matrix.dequantize((*context).kernels);
  ASSERT_EQ(matrix.blocks(), 2);
  for (std::int64_t b = 0; b < 2; ++b) {
    const std::int64_t end = std::min<std::int64_t>((b + 1) * 128, 176);
    std::int64_t salient = 0;
    for (std::int64_t j = b * 128; j < end; ++j) {
      salient += matrix.is_salient(j) ? 1 : 0;
    }
    EXPECT_GE(salient, 1);
    EXPECT_LE(salient, 49);
    for (std::int64_t r = 0; r < Reference::kRows; ++r) {
      std::map<bool, std::set<float>> seen;
      for (std::int64_t j = b * 128; j < end; ++j) {
        seen[matrix.is_salient(j)].insert(Q[static_cast<std::size_t>(r * 176 + j)]);
      }
      EXPECT_LE(seen[false].size(), 4U);
      EXPECT_LE(seen[true].size(), 4U);
    }
  }
}

// --- quality ------------------------------------------------------------------------------------

TEST(Billm, FeedbackBeatsPlainBinarisationAndTwoBitsBeatBoth) {
  const TestContext context;
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    const SyntheticLayer layer = make_layer({}, seed);
    const LinearResult result = quantize_billm(*context, layer.problem(kBinary), {});
    EXPECT_LT(result.report.relative_error, 0.8 * *result.report.rtn_error);
    EXPECT_GT(result.report.relative_error, 0.01);
    const double gptq = find_method("gptq")
                            ->quantize(*context, layer.problem({3, true, 128}), {})
                            .report.relative_error;
    EXPECT_LT(gptq, result.report.relative_error);  // at nearly the same size
  }
}

TEST(Billm, ReportsItsTrueSize) {
  const TestContext context;
  const SyntheticLayer layer = make_layer({}, 4);
  const LinearResult result = quantize_billm(*context, layer.problem(kBinary), {});
  // 256 columns: two bits a weight, seven halves a row and block, and one bit a column.
  EXPECT_EQ(result.matrix->stored_bytes(), 128U * (2 * 256 / 8 + 2 * 7 * 2) + 256 / 8);
}

TEST(Billm, SameBytesForAnyThreadCount) {
  SyntheticOptions shape;
  shape.out_features = 200;
  shape.in_features = 300;
  shape.rows = 500;
  shape.holdout_rows = 100;
  const SyntheticLayer layer = make_layer(shape, 2);
  const TestContext one(1);
  const LinearResult expected = quantize_billm(*one, layer.problem(kBinary), {});
  for (const int threads : {2, 5}) {
    const TestContext many(threads);
    const LinearResult result = quantize_billm(*many, layer.problem(kBinary), {});
    EXPECT_EQ(billm_of(result).signs, billm_of(expected).signs);
    EXPECT_EQ(billm_of(result).seconds, billm_of(expected).seconds);
    EXPECT_EQ(billm_of(result).salient, billm_of(expected).salient);
    EXPECT_EQ(result.report.relative_error, expected.report.relative_error);
    EXPECT_EQ(result.report.holdout_error, expected.report.holdout_error);
  }
}

TEST(Billm, TakesWhateverShapeAndGroup) {
  const TestContext context;
  for (const auto& [rows, columns, group] :
       {std::tuple(1, 1, 128),
        std::tuple(1, 2, 128),
        std::tuple(3, 129, 128),
        std::tuple(5, 40, 16),
        std::tuple(4, 60, 0)}) {
    SyntheticOptions shape;
    shape.out_features = rows;
    shape.in_features = columns;
    shape.rows = 300;
    shape.test_rows = 0;
    const SyntheticLayer layer = make_layer(shape, 6);
    const LinearResult result = quantize_billm(*context, layer.problem({1, true, group}), {});
    EXPECT_EQ(billm_of(result).block, group == 0 ? columns : group);
    EXPECT_LT(result.report.relative_error, 0.6) << rows << " x " << columns;
  }
  const std::vector<float> zeros(64, 0.0F);
  const LinearResult nothing = quantize_billm(*context, {zeros, 2, 32, nullptr, kBinary}, {});
  EXPECT_EQ(nothing.matrix->dequantize((*context).kernels), zeros);
}

TEST(Billm, WithoutUsableStatisticsThereIsNoFeedback) {
  const TestContext context;
  const SyntheticLayer layer = make_layer({}, 5);
  LinearProblem problem = layer.problem(kBinary);
  problem.stats = nullptr;
  const LinearResult result = quantize_billm(*context, problem, {});
  EXPECT_EQ(result.report.method, "billm");
  EXPECT_NE(
      result.report.fallback.value_or("").find("no calibration statistics"), std::string::npos);
  EXPECT_LT(result.report.relative_error, 0.35);
  SiteStats indefinite = layer.stats;
  for (std::size_t i = 0; i < indefinite.H.size(); ++i) {
    indefinite.H[i] = i % 257 == 0 ? 1.0 : -0.5;
  }
  problem.stats = &indefinite;
  EXPECT_NE(
      quantize_billm(*context, problem, {}).report.fallback.value_or("").find("positive definite"),
      std::string::npos);
}

TEST(Billm, FeedbackThatFailsOnHeldOutRowsIsDropped) {
  const TestContext context;
  SyntheticLayer layer = make_layer({}, 5);
  // Held-out rows whose inputs are independent: what the feedback spends on is not there.
  layer.stats.holdout_rows = 100'000;
  layer.stats.H_holdout = layer.stats.H;
  for (std::size_t i = 0; i < layer.stats.H.size(); ++i) {
    layer.stats.H_holdout[i] *= i % 257 == 0 ? 1.0 : -0.9;
  }
  MethodOptions options;
  options.shrinkage = 0;
  const LinearResult result = quantize_billm(*context, layer.problem(kBinary), options);
  EXPECT_NE(result.report.fallback.value_or("").find("held-out"), std::string::npos);
  EXPECT_EQ(result.report.relative_error, *result.report.rtn_error);
}

TEST(Billm, RefusesBadRequests) {
  const TestContext context;
  const SyntheticLayer layer = make_layer({}, 5);
  for (const int bits : {0, 2, 4}) {
    EXPECT_THROW((void)quantize_billm(*context, layer.problem({bits, true, 128}), {}), UsageError);
  }
  EXPECT_THROW((void)quantize_billm(*context, layer.problem({1, true, -1}), {}), UsageError);
  SyntheticLayer broken = layer;
  broken.W[3] = std::numeric_limits<float>::infinity();
  EXPECT_THROW((void)quantize_billm(*context, broken.problem(kBinary), {}), ParseError);
}

// --- the stored form ----------------------------------------------------------------------------

TEST(BillmMatrix, BitsMeanWhatTheHeaderSays) {
  const TestContext context;
  BillmMatrix matrix = BillmMatrix::make(1, 10, 8);
  matrix.levels[0].values = {1, 0.5F, 10, 2, 100, 20, 3};
  matrix.levels[1].values = {-1, 0.25F, 7, 1, 0, 0, 0};
  matrix.salient = {0b0011'0000, 0};
  matrix.signs = {0b0001'0101, 0b01};
  matrix.seconds = {0b0010'1100, 0b10};
  EXPECT_EQ(
      matrix.dequantize((*context).kernels),
      (std::vector<float>{1.5F, 0.5F, 12, 8, 117, 83, 0.5F, 0.5F, -0.75F, 6}));
}

// Parts as a file would give them, which a test may spoil.
class StoredBillm : public ::testing::Test {
 protected:
  StoredBillm() : parts_(matrix_.parts()) {}

  static BillmMatrix make() {
    const TestContext context;
    const SyntheticLayer layer =
        make_layer({.out_features = 5, .in_features = 140, .rows = 300}, 3);
    return billm_of(quantize_billm(*context, layer.problem(kBinary), {}));
  }
  MatrixPart& part(const std::string& name) {
    return *std::find_if(
        parts_.begin(), parts_.end(), [&](const MatrixPart& each) { return each.name == name; });
  }
  std::shared_ptr<const QuantizedMatrix> restore(const Json& parameters) {
    views_.clear();
    for (const MatrixPart& each : parts_) {
      views_.emplace(each.name, TensorView{each.dtype, each.shape, each.bytes});
    }
    return restore_matrix(
        "billm",
        5,
        140,
        JsonReader(parameters, "test"),
        [&](const std::string& name) {
          const auto found = views_.find(name);
          return found == views_.end() ? nullptr : &found->second;
        },
        "test");
  }

  BillmMatrix matrix_ = make();
  std::vector<MatrixPart> parts_;
  std::map<std::string, TensorView> views_;
};

TEST_F(StoredBillm, RoundTripsExactly) {
  const TestContext context;
  const auto restored = restore(matrix_.parameters());
  EXPECT_EQ(restored->kind(), "billm");
  EXPECT_EQ(restored->dequantize((*context).kernels), matrix_.dequantize((*context).kernels));
  EXPECT_EQ(restored->stored_bytes(), matrix_.stored_bytes());
}

TEST_F(StoredBillm, RefusesWhatDoesNotFit) {
  const Json good = matrix_.parameters();
  for (const Json& bad :
       {Json{{"block", 0}},
        Json{{"block", -1}},
        Json{{"block", INT64_MAX}},
        Json{{"block", "128"}},
        Json::object(),
        Json{{"block", 64}}}) {
    EXPECT_THROW((void)restore(bad), ParseError) << bad;
  }
  const std::vector<MatrixPart> kept = parts_;
  const auto spoiled = [&](const std::function<void()>& spoil) {
    parts_ = kept;
    spoil();
    EXPECT_THROW((void)restore(good), ParseError);
  };
  for (const char* name : {"salient", "signs", "seconds", "levels"}) {
    spoiled([&] { part(name).name = "other"; });
    spoiled([&] { part(name).shape.back() += 1; });
    spoiled([&] { part(name).dtype = DType::kF32; });
  }
  spoiled([&] {  // infinity
    part("levels").bytes[1] = std::byte{0x7C};
    part("levels").bytes[0] = std::byte{0};
  });
}

}  // namespace
}  // namespace quern
