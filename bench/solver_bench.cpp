// SPDX-License-Identifier: Apache-2.0
// Times the rounding methods on random layers and prints their errors. Built by hand:
//   cmake --preset dev -DQUERN_BENCH=ON && cmake --build --preset dev --target solver_bench
//   solver_bench [rows columns [bits group threads]]
#include "base/context.h"
#include "base/cpu.h"
#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "quant/method.h"

#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <random>
#include <vector>

namespace {

using quern::LinearProblem;
using quern::LinearResult;
using quern::MethodOptions;

// H = B B^T / k with channel scales; k = 2 n keeps it well conditioned.
std::vector<double> random_moment(
    const quern::Context& ctx, std::int64_t n, std::mt19937_64& generator) {
  std::normal_distribution<double> normal;
  std::vector<double> B(static_cast<std::size_t>(2 * n * n));
  for (std::int64_t j = 0; j < n; ++j) {
    const double scale = std::exp(normal(generator));
    for (std::int64_t k = 0; k < 2 * n; ++k) {
      B[static_cast<std::size_t>(j * 2 * n + k)] = scale * normal(generator);
    }
  }
  std::vector<double> H(static_cast<std::size_t>(n * n));
  const double inverse = 0.5 / static_cast<double>(n);
  ctx.blas.gemm(
      false, true, n, n, 2 * n, inverse, B.data(), 2 * n, B.data(), 2 * n, 0.0, H.data(), n);
  return H;
}

void report(
    const char* name,
    const quern::Context& ctx,
    const LinearProblem& problem,
    const char* method,
    const MethodOptions& options) {
  const std::clock_t cpu_start = std::clock();
  const auto start = std::chrono::steady_clock::now();
  const LinearResult result = quern::find_method(method)->quantize(ctx, problem, options);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  const double cpu_seconds = static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC;
  fmt::print(
      "{:<34} {:8.3f} s  CPU {:8.3f} s   error {:.5f}\n",
      name,
      seconds.count(),
      cpu_seconds,
      result.report.relative_error);
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int index, std::int64_t otherwise) {
    return argc > index ? std::atoll(argv[index]) : otherwise;
  };
  const std::int64_t rows = argument(1, 3072);
  const std::int64_t columns = argument(2, 1024);
  const quern::CpuFeatures cpu = quern::detect_cpu();
  const quern::KernelTable kernels = quern::make_kernel_table(cpu, "");
  const quern::Blas blas(cpu);
  quern::Log log({});
  quern::ThreadPool pool(static_cast<int>(argument(5, 1)));
  const quern::Context ctx = {pool, kernels, blas, log};

  std::mt19937_64 generator(1);
  std::normal_distribution<float> normal(0.0F, 0.02F);
  std::vector<float> W(static_cast<std::size_t>(rows * columns));
  for (float& w : W) {
    w = normal(generator);
  }
  quern::SiteStats stats;
  stats.width = columns;
  stats.rows = 8 * columns;
  stats.H = random_moment(ctx, columns, generator);
  const quern::QuantScheme scheme = {static_cast<int>(argument(3, 4)), true, argument(4, 128)};
  const LinearProblem problem = {W, rows, columns, &stats, scheme};

  fmt::print(
      "{} x {}, {} bits, group {}, {} thread(s), {}\n",
      rows,
      columns,
      scheme.bits,
      scheme.group_size,
      pool.size(),
      kernels.isa);
  MethodOptions options;
  options.range = quern::RangeSearch::kMinMax;
  report("rtn minmax", ctx, problem, "rtn", options);
  options.range = quern::RangeSearch::kPower24;
  report("rtn power-2.4", ctx, problem, "rtn", options);
  options.range = quern::RangeSearch::kWeighted;
  report("rtn weighted", ctx, problem, "rtn", options);
  options.descent_sweeps = 0;
  options.refit_rounds = 0;
  report("gptq weighted activation", ctx, problem, "gptq", options);
  options.order = quern::ColumnOrder::kGroupAware;
  report("gptq weighted group-aware", ctx, problem, "gptq", options);
  options.order = quern::ColumnOrder::kActivation;
  options.descent_sweeps = 3;
  report("  activation + 3 sweeps", ctx, problem, "gptq", options);
  options.refit_rounds = 3;
  report("  activation + 3 x (refit, sweeps)", ctx, problem, "gptq", options);
  return 0;
}
