// SPDX-License-Identifier: Apache-2.0
#include "pipeline/estimate.h"

#include "base/error.h"
#include "base/process.h"
#include "base/units.h"
#include "calib/statistics.h"
#include "kernels/blas.h"
#include "pipeline/block_quantizer.h"
#include "pipeline/parts.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

namespace quern {
namespace {

// Program, kernel tables, BLAS buffers, tokenizer, calibration ids.
constexpr std::uint64_t kProgramBytes = std::uint64_t{96} << 20U;
constexpr std::uint64_t kFloat = sizeof(float);

std::uint64_t u(std::int64_t value) {
  return static_cast<std::uint64_t>(value);
}

}  // namespace

double measure_rate(const Context& ctx) {
  constexpr std::int64_t kRows = 512;
  constexpr std::int64_t kColumns = 256;
  constexpr std::int64_t kInner = 1024;
  const std::vector<float> A(kRows * kInner, 0.5F);
  const std::vector<float> B(kColumns * kInner, 0.25F);
  std::vector<float> C(static_cast<std::size_t>(ctx.pool.size() * kRows * kColumns));
  const double started = steady_seconds();
  double work = 0;
  while (steady_seconds() - started < 0.2) {
    ctx.pool.for_chunks(ctx.pool.size(), 1, [&](std::int64_t i, std::int64_t, int) {
      ctx.blas.gemm(
          false,
          true,
          kRows,
          kColumns,
          kInner,
          1.0F,
          A.data(),
          kInner,
          B.data(),
          kInner,
          0.0F,
          C.data() + i * kRows * kColumns,
          kColumns);
    });
    work += static_cast<double>(ctx.pool.size() * kRows * kColumns * kInner);
  }
  return work / (steady_seconds() - started);
}

double measure_core_rate(const Context& ctx) {
  constexpr std::int64_t kSize = 1024;
  const std::vector<float> A(kSize * kSize, 0.5F);
  std::vector<float> C(kSize * kSize);
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    const double started = process_usage().cpu_seconds;
    for (int k = 0; k < 3; ++k) {
      ctx.blas.gemm(
          false,
          true,
          kSize,
          kSize,
          kSize,
          1.0F,
          A.data(),
          kSize,
          A.data(),
          kSize,
          0.0F,
          C.data(),
          kSize);
    }
    best = std::max(best, 3.0 * kSize * kSize * kSize / (process_usage().cpu_seconds - started));
  }
  return best;
}

Estimate estimate_run(
    const Context& ctx,
    const ModelGraph& graph,
    const QuantPlan& plan,
    const MethodOptions& options,
    std::int64_t samples,
    std::int64_t length,
    bool calibrated) {
  const ModelConfig& config = graph.config;
  Estimate estimate;
  const std::int64_t tokens = calibrated ? samples * length : 0;
  std::int64_t widest = 0;
  std::int64_t widest_carried = 0;
  std::int64_t largest = 0;
  for (const Block& block : graph.blocks) {
    for (std::size_t site = 0; site < block.sites.size(); ++site) {
      widest = std::max(widest, block.sites[site].width);
      if (!site_reads_residual(static_cast<int>(site))) {
        widest_carried = std::max(widest_carried, block.sites[site].width);
      }
    }
    for (const Linear& linear : block.linears) {
      largest = std::max(largest, linear.parameters());
    }
    const BlockWork work = block_work(
        block, config, static_cast<double>(tokens), static_cast<double>(length), plan, options);
    estimate.work += calibrated ? work.total() : work.round * 0.01;
  }
  // W in float, working copy, dequantized result, its product with H, and the packed codes.
  estimate.weights = u(largest) * kFloat * 5;
  if (calibrated) {
    // The accumulator (H, H of the held-out rows, float partial sums) is joined by the solver's
    // float H, the damped copy and its factor, after the partial sums are gone.
    const std::uint64_t cells = u(widest) * u(widest);
    estimate.statistics = cells * (8 + 8 + 4 + 8 + 4);
    const std::uint64_t streams = needs_reference(plan, options) ? 2 : 1;
    if (streams == 2) {
      estimate.statistics += cells * (8 + 8 + 4 + 3 * 4);  // G beside H, and the correction
    }
    estimate.residual = streams * u(tokens * config.hidden_size) * kFloat;
    if (config.mixture) {
      // The rows that enter a mixture are kept; those of some experts are gathered, and counted in
      // a copy. How many experts a token has a share in is known, which ones is not.
      const MixtureConfig& mixture = *config.mixture;
      widest_carried = std::max(widest_carried, config.hidden_size);
      const std::uint64_t row = u(config.hidden_size + 2 * mixture.expert_width) * kFloat;
      const std::uint64_t part = u(tokens * mixture.experts_per_token) * row / kExpertParts;
      estimate.experts = 2 * streams * part + u(tokens * mixture.experts) * kFloat;
    }
    estimate.carried = streams * u(tokens * widest_carried) * kFloat;
    const std::int64_t inner =
        std::max(config.intermediate_size, (config.heads + 2 * config.kv_heads) * config.head_dim);
    const auto workers = static_cast<std::uint64_t>(ctx.pool.size());
    estimate.scratch =
        u(length) * u(3 * config.hidden_size + 3 * inner) * kFloat +
        workers * (256 * u(std::max(widest, length)) + u(std::int64_t{256} * widest)) * kFloat;
  }
  estimate.scratch += kProgramBytes;
  const std::uint64_t budget = ctx.memory_budget;
  if (budget != 0 && estimate.peak() > budget) {
    estimate.spill_carried = true;
    estimate.spilled += estimate.carried;
    estimate.carried = 0;
    if (estimate.peak() > budget) {
      estimate.spill_residual = true;
      estimate.spilled += estimate.residual;
      estimate.residual = 0;
    }
    if (estimate.peak() > budget) {
      throw ResourceError(
          "not enough memory for this model",
          "--memory " + human_bytes(static_cast<double>(budget)),
          fmt::format(
              "at least {} are needed with everything else on disk",
              human_bytes(static_cast<double>(estimate.peak()))),
          fmt::format("--memory {}MiB", (estimate.peak() >> 20U) + 1));
    }
  }
  estimate.seconds = estimate.work / measure_rate(ctx);
  return estimate;
}

}  // namespace quern
