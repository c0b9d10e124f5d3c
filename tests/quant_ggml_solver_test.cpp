// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "kernels/kernels.h"
#include "quant/descent.h"
#include "quant/ggml_matrix.h"
#include "quant/gptq.h"
#include "quant/mixed_rows.h"
#include "quant/quadratic_error.h"
#include "quant/row_block.h"
#include "quant/rtn.h"
#include "quant_fixture.h"
#include "synthetic_layer.h"

#include <gtest/gtest.h>

#include <array>
#include <map>
#include <numeric>
#include <string>
#include <vector>

// Error feedback, descent and fitted super-scales on the block types of ggml.
namespace quern {
namespace {

using testing::make_layer;
using testing::SyntheticLayer;
using testing::SyntheticOptions;
using testing::TestContext;

constexpr std::array kLinearTypes = {
    GgmlType::kQ40,
    GgmlType::kQ41,
    GgmlType::kQ50,
    GgmlType::kQ51,
    GgmlType::kQ80,
    GgmlType::kQ2K,
    GgmlType::kQ3K,
    GgmlType::kQ4K,
    GgmlType::kQ5K,
    GgmlType::kQ6K};

SyntheticLayer layer_of(std::int64_t rows) {
  SyntheticOptions options;
  options.in_features = 512;
  options.out_features = rows;
  return make_layer(options, 21);
}

double error_of(
    const Context& ctx,
    const SyntheticLayer& layer,
    const std::vector<double>& H,
    const LinearResult& result) {
  const std::array<const QuantizedMatrix*, 1> candidates = {result.matrix.get()};
  return quadratic_errors(ctx, layer.W, layer.out_features, layer.in_features, H, candidates)
      .relative(0);
}

TEST(GgmlSolver, BeatsPlainRoundingOnUnseenRowsForEveryLinearType) {
  const TestContext context;
  const SyntheticLayer layer = layer_of(40);
  for (const GgmlType type : kLinearTypes) {
    const LinearProblem problem = layer.problem(ggml_scheme(type));
    const LinearResult plain = quantize_rtn(*context, problem, {});
    const LinearResult solved = quantize_gptq(*context, problem, {});
    EXPECT_EQ(solved.report.method, "gptq");
    ASSERT_EQ(dynamic_cast<const GgmlMatrix&>(*solved.matrix).type, type);
    const double before = error_of(*context, layer, layer.unseen, plain);
    const double after = error_of(*context, layer, layer.unseen, solved);
    EXPECT_LT(after, 0.75 * before) << ggml_type_info(type).name;
  }
}

TEST(GgmlSolver, TypesWithUnevenStepsAreRoundedPlainlyAndSaySo) {
  const TestContext context;
  const SyntheticLayer layer = layer_of(16);
  const LinearResult result =
      quantize_gptq(*context, layer.problem(ggml_scheme(GgmlType::kIQ4XS)), {});
  EXPECT_EQ(result.report.method, "rtn");
  ASSERT_TRUE(result.report.fallback.has_value());
  EXPECT_NE(result.report.fallback->find("IQ4_XS"), std::string::npos);
}

TEST(GgmlSolver, BlocksStayConsistentAndStepsNeverRaiseTheError) {
  const TestContext context;
  const SyntheticLayer layer = layer_of(16);
  const std::vector<float> H(layer.stats.H.begin(), layer.stats.H.end());
  std::vector<float> importance;
  for (std::size_t j = 0; j < 512; ++j) {
    importance.push_back(H[j * 513]);
  }
  for (const GgmlType type : kLinearTypes) {
    const QuantScheme scheme = ggml_scheme(type);
    const LinearProblem problem = layer.problem(scheme);
    const Descent descent(*context, scheme, DType::kF16, H);
    RowBlock block = RowBlock::load(problem, 0, 16);
    block.find_all_ranges((*context).kernels, scheme, grid_rules(problem, {}), importance.data());
    block.round_all((*context).kernels, scheme);
    const auto total = [&] {
      const std::vector<double> errors = descent.errors(block);
      return std::accumulate(errors.begin(), errors.end(), 0.0);
    };
    double before = total();
    for (int round = 0; round < 2; ++round) {
      for (const bool refit : {false, true}) {
        if (refit) {
          descent.refit_super_scales(block);
        } else {
          descent.sweep(block);
        }
        const double after = total();
        EXPECT_LE(after, before * (1 + 1e-5)) << ggml_type_info(type).name;
        before = after;
      }
    }
    // D, which the steps go by, is what the stored bytes differ from W by. W + D and Q are the same
    // sum in another order: a few roundings of values up to 0.2.
    const std::shared_ptr<QuantizedMatrix> matrix = make_matrix(problem, {});
    block.store(*matrix);
    const std::vector<float> Q = matrix->dequantize((*context).kernels);
    for (std::int64_t r = 0; r < 16; ++r) {
      for (std::int64_t j = 0; j < 512; ++j) {
        const auto at = static_cast<std::size_t>(r * 512 + j);
        ASSERT_NEAR(
            Q[at] - layer.W[at], block.D[static_cast<std::size_t>(j * block.lanes + r)], 1e-6F)
            << ggml_type_info(type).name << " row " << r << " column " << j;
      }
    }
  }
}

TEST(GgmlSolver, GivesTheSameBytesAtOneAndTwoThreads) {
  const TestContext one(1);
  const TestContext two(2);
  const SyntheticLayer layer = layer_of(96);
  const LinearProblem problem = layer.problem(ggml_scheme(GgmlType::kQ4K));
  EXPECT_EQ(
      quantize_gptq(*one, problem, {}).matrix->parts().front().bytes,
      quantize_gptq(*two, problem, {}).matrix->parts().front().bytes);
}

// Rows of two widths, saved and restored.
TEST(MixedRows, AreRestoredAndRefuseMapsThatPointOutside) {
  const TestContext context;
  const SyntheticLayer layer = layer_of(12);
  const auto rounded = [&](int bits, std::int64_t rows) {
    LinearProblem problem = layer.problem({bits, true, 128});
    problem.out_features = rows;
    problem.W = problem.W.first(static_cast<std::size_t>(rows * 512));
    return as_packed(*quantize_rtn(*context, problem, {}).matrix, "m");
  };
  MixedRows mixed;
  mixed.out_features = 12;
  mixed.in_features = 512;
  mixed.hot = rounded(8, 4);
  mixed.cold = rounded(4, 8);
  for (std::uint32_t i = 0; i < 12; ++i) {
    mixed.row_map.push_back(i % 3 == 0 ? (i / 3) | MixedRows::kHotBit : i - i / 3 - 1);
  }
  const Json parameters = mixed.parameters();
  std::vector<MatrixPart> parts = mixed.parts();
  const auto restore = [&] {
    std::map<std::string, TensorView> views;
    for (const MatrixPart& part : parts) {
      views[part.name] = {part.dtype, part.shape, part.bytes};
    }
    return restore_matrix(
        "mixed_rows",
        12,
        512,
        JsonReader(parameters, "m"),
        [&](const std::string& name) -> const TensorView* {
          const auto found = views.find(name);
          return found == views.end() ? nullptr : &found->second;
        },
        "m");
  };
  const KernelTable& kernels = (*context).kernels;
  EXPECT_EQ(restore()->dequantize(kernels), mixed.dequantize(kernels));
  // Row 3 is the second hot row, row 4 the third cold one.
  std::vector<float> row(512);
  std::vector<std::uint8_t> scratch(512);
  mixed.dequantize_row(kernels, 3, scratch, row);
  std::vector<float> expected(512);
  mixed.hot.dequantize_row(kernels, 1, scratch, expected);
  EXPECT_EQ(row, expected);
  mixed.dequantize_row(kernels, 4, scratch, row);
  mixed.cold.dequantize_row(kernels, 2, scratch, expected);
  EXPECT_EQ(row, expected);
  parts.front().bytes[0] = std::byte{200};
  EXPECT_THROW((void)restore(), ParseError);
  parts.erase(parts.begin());
  EXPECT_THROW((void)restore(), ParseError);
}

}  // namespace
}  // namespace quern
