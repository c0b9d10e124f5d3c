// SPDX-License-Identifier: Apache-2.0
// The rounding kernels of every level against the scalar ones, and products from many threads.
#include "base/cpu.h"
#include "kernels/blas.h"
#include "kernels/kernels.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace quern {
namespace {

std::vector<float> random_floats(std::size_t count, float sigma, std::uint64_t seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<float> normal(0.0F, sigma);
  std::vector<float> values(count);
  for (float& value : values) {
    value = normal(generator);
  }
  return values;
}

// 5 vectors of rows: one full set of chains and a remainder.
constexpr std::int64_t kLanes = 5 * kRowLanes;
constexpr std::int64_t kColumns = 37;
constexpr std::int64_t kGroups = 3;
constexpr std::size_t kSize = static_cast<std::size_t>(kLanes * kColumns);

struct Inputs {
  std::vector<float> W = random_floats(kSize, 0.05F, 1);
  std::vector<float> R = random_floats(kSize, 0.01F, 2);
  std::vector<float> scales;
  std::vector<float> zeros;
  std::vector<std::int32_t> group;
  std::vector<float> tile = random_floats(static_cast<std::size_t>(kColumns * kColumns), 0.1F, 3);
  std::vector<float> inverse_diagonal = std::vector<float>(kColumns, 0.5F);

  Inputs() {
    for (std::int64_t i = 0; i < kGroups * kLanes; ++i) {
      scales.push_back(0.01F + 0.0001F * static_cast<float>(i));
      zeros.push_back(static_cast<float>(i % 16));
    }
    for (std::int64_t j = 0; j < kColumns; ++j) {
      group.push_back(static_cast<std::int32_t>((j * 7) % kGroups));
    }
  }
  [[nodiscard]] ColumnGrid grid() const {
    return {kLanes, kColumns, group.data(), scales.data(), zeros.data(), 15.0F};
  }
  [[nodiscard]] ColumnTile triangle() const {
    return {tile.data(), kColumns, inverse_diagonal.data()};
  }
};

// Rows that agree to rounding. A code may differ where two grid points are equally near, and the
// rest of that row then differs too.
int rows_that_differ(
    const std::vector<float>& a,
    const std::vector<float>& b,
    const std::vector<std::uint8_t>& a_codes,
    const std::vector<std::uint8_t>& b_codes) {
  int different = 0;
  for (std::int64_t r = 0; r < kLanes; ++r) {
    bool same = true;
    for (std::int64_t j = 0; j < kColumns; ++j) {
      const auto at = static_cast<std::size_t>(j * kLanes + r);
      same = same && a_codes[at] == b_codes[at] && std::abs(a[at] - b[at]) < 1e-5F;
    }
    different += same ? 0 : 1;
  }
  return different;
}

class QuantKernels : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const CpuFeatures cpu = detect_cpu();
    const std::string level = GetParam();
    if ((level == "avx2" && !cpu.avx2) || (level == "avx512" && !cpu.avx512)) {
      GTEST_SKIP() << "this CPU lacks " << level;
    }
    scalar_ = make_kernel_table(cpu, "scalar");
    wide_ = make_kernel_table(cpu, level);
    ASSERT_EQ(wide_.isa, level);
    ASSERT_NE(wide_.gptq_columns, scalar_.gptq_columns);
  }

  KernelTable scalar_;
  KernelTable wide_;
  Inputs in_;
};

TEST_P(QuantKernels, FitGrids) {
  constexpr std::int64_t kCandidates = 5;
  const std::vector<float> d(kColumns, 2.0F);
  std::vector<float> expected(kCandidates * 3 * kRowLanes);
  std::vector<float> found(expected.size());
  for (auto [table, sums] : {std::pair(&scalar_, &expected), std::pair(&wide_, &found)}) {
    table->fit_grids(
        in_.W.data(),
        kLanes,
        d.data(),
        kColumns,
        in_.scales.data(),
        in_.zeros.data(),
        15.0F,
        kCandidates,
        sums->data());
  }
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(found[i], expected[i], 1e-4F * std::abs(expected[i]) + 1e-6F) << i;
  }
}

TEST_P(QuantKernels, FitGridsPower24) {
  constexpr std::int64_t kCandidates = 3;
  std::vector<float> expected(kCandidates * kRowLanes);
  std::vector<float> found(expected.size());
  for (auto [table, sums] : {std::pair(&scalar_, &expected), std::pair(&wide_, &found)}) {
    table->fit_grids_power24(
        in_.W.data(),
        kLanes,
        kColumns,
        in_.scales.data(),
        in_.zeros.data(),
        15.0F,
        kCandidates,
        sums->data());
  }
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(found[i], expected[i], 2e-4F * expected[i]) << i;
  }
}

TEST_P(QuantKernels, RoundColumns) {
  const ColumnGrid grid = in_.grid();
  std::vector<float> D(kSize);
  std::vector<float> Dw(kSize);
  std::vector<std::uint8_t> codes(kSize);
  std::vector<std::uint8_t> wide_codes(kSize);
  scalar_.round_columns(&grid, in_.W.data(), D.data(), codes.data());
  wide_.round_columns(&grid, in_.W.data(), Dw.data(), wide_codes.data());
  EXPECT_EQ(codes, wide_codes);
  EXPECT_EQ(rows_that_differ(D, Dw, codes, wide_codes), 0);
}

TEST_P(QuantKernels, GptqColumns) {
  const ColumnGrid grid = in_.grid();
  const ColumnTile triangle = in_.triangle();
  std::vector<float> errors(kSize);
  std::vector<float> wide_errors(kSize);
  std::vector<std::uint8_t> codes(kSize);
  std::vector<std::uint8_t> wide_codes(kSize);
  scalar_.gptq_columns(&grid, &triangle, in_.W.data(), errors.data(), codes.data());
  wide_.gptq_columns(&grid, &triangle, in_.W.data(), wide_errors.data(), wide_codes.data());
  EXPECT_LE(rows_that_differ(errors, wide_errors, codes, wide_codes), 1);
}

TEST_P(QuantKernels, DescendColumns) {
  const ColumnGrid grid = in_.grid();
  const ColumnTile tile = in_.triangle();
  std::vector<float> D(kSize);
  std::vector<std::uint8_t> codes(kSize);
  scalar_.round_columns(&grid, in_.W.data(), D.data(), codes.data());
  std::vector<float> Dw = D;
  std::vector<std::uint8_t> wide_codes = codes;
  std::vector<float> delta(kSize);
  std::vector<float> wide_delta(kSize);
  scalar_.descend_columns(
      &grid, &tile, in_.W.data(), in_.R.data(), D.data(), delta.data(), codes.data());
  wide_.descend_columns(
      &grid, &tile, in_.W.data(), in_.R.data(), Dw.data(), wide_delta.data(), wide_codes.data());
  EXPECT_LE(rows_that_differ(D, Dw, codes, wide_codes), 1);
  EXPECT_LE(rows_that_differ(delta, wide_delta, codes, wide_codes), 1);
}

// Sums of 32 products in another order: a relative 32 * 2^-24 of the sum of magnitudes, which for
// these values is below 1e-5 of the largest term. Rounding a value that lies half-way between two
// codes the other way moves the code sums by one weight but hardly the error; no such value occurs.
TEST_P(QuantKernels, FitAffineAndLevels) {
  constexpr std::int64_t kCandidates = 4;
  const std::vector<float> x = random_floats(32, 0.05F, 11);
  std::vector<float> w = random_floats(32, 1.0F, 12);
  for (float& value : w) {
    value = std::abs(value);
  }
  const std::vector<float> scales = {0.01F, -0.013F, 0.0F, 0.004F};
  const std::vector<float> minimums = {0.08F, 0.0F, 0.03F, -0.01F};
  const std::vector<float> levels = {
      -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  std::vector<float> steps(15);
  for (std::size_t k = 0; k < steps.size(); ++k) {
    steps[k] = (levels[k] + levels[k + 1]) / 2;
  }
  for (const std::int64_t n : {16, 32}) {
    std::vector<float> expected(kCandidates * 4);
    std::vector<float> found(expected.size());
    const auto compare = [&](const char* what) {
      for (std::size_t i = 0; i < expected.size(); ++i) {
        EXPECT_NEAR(found[i], expected[i], 2e-5F * std::abs(expected[i]) + 1e-6F)
            << what << ' ' << i;
      }
    };
    for (auto [table, sums] : {std::pair(&scalar_, &expected), std::pair(&wide_, &found)}) {
      table->fit_affine(
          x.data(),
          w.data(),
          n,
          scales.data(),
          minimums.data(),
          -4.0F,
          15.0F,
          kCandidates,
          sums->data());
    }
    compare("affine");
    const std::vector<float> fine = {0.001F, -0.0013F, 0.0F, 0.0004F};
    for (auto [table, sums] : {std::pair(&scalar_, &expected), std::pair(&wide_, &found)}) {
      table->fit_levels(
          x.data(),
          w.data(),
          n,
          fine.data(),
          levels.data(),
          steps.data(),
          kCandidates,
          sums->data());
    }
    compare("levels");
  }
}

INSTANTIATE_TEST_SUITE_P(Levels, QuantKernels, ::testing::Values("avx2", "avx512"));

// OpenBLAS without locks gives wrong products here within a few thousand calls.
TEST(BlasThreads, ProductsFromSeveralThreadsAreRight) {
  const Blas blas(detect_cpu());
  std::atomic<int> wrong = 0;
  const auto work = [&](std::uint64_t seed) {
    constexpr std::int64_t kSide = 96;
    const std::vector<float> A = random_floats(kSide * kSide, 1.0F, seed);
    const std::vector<float> B = random_floats(kSide * kSide, 1.0F, seed + 100);
    std::vector<float> first(kSide * kSide);
    std::vector<float> C(kSide * kSide);
    for (int call = 0; call < 5000; ++call) {
      std::vector<float>& out = call == 0 ? first : C;
      blas.gemm(
          false,
          false,
          kSide,
          kSide,
          kSide,
          1.0F,
          A.data(),
          kSide,
          B.data(),
          kSide,
          0.0F,
          out.data(),
          kSide);
      wrong += call > 0 && C != first ? 1 : 0;
    }
  };
  std::vector<std::thread> threads;
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    threads.emplace_back(work, seed);
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace quern
