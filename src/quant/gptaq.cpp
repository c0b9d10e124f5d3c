// SPDX-License-Identifier: Apache-2.0
#include "quant/gptaq.h"

#include "kernels/blas.h"
#include "quant/error_feedback.h"
#include "quant/gptq.h"
#include "quant/mismatch.h"
#include "quant/rtn.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <string>
#include <utility>

namespace quern {
namespace {

constexpr std::int64_t kRows = 128;

// P^T [n, n], zero on and above the diagonal. By row chunks of P, whose left part is zero.
std::vector<float> transposed_pull(
    const Context& ctx,
    const SiteStats& stats,
    const std::vector<std::int32_t>& order,
    double alpha,
    const std::vector<float>& Ut) {
  const std::int64_t n = stats.width;
  std::vector<float> Pt(static_cast<std::size_t>(n * n));
  ctx.pool.for_chunks(n, kRows, [&](std::int64_t begin, std::int64_t end, int) {
    const std::int64_t rows = end - begin;
    const std::int64_t width = n - begin;
    const float* corner = Ut.data() + begin * (n + 1);
    std::vector<float> D(static_cast<std::size_t>(rows * width));
    std::vector<float> M(D.size());
    for (std::int64_t p = begin; p < end; ++p) {
      const std::int64_t row = order[static_cast<std::size_t>(p)];
      for (std::int64_t q = begin; q < n; ++q) {
        const auto at = static_cast<std::size_t>(order[static_cast<std::size_t>(q)] * n + row);
        D[static_cast<std::size_t>((p - begin) * width + q - begin)] =
            static_cast<float>(alpha * (stats.G[at] - stats.H[at]));
      }
    }
    ctx.blas.gemm(
        false, false, rows, width, width, 1.0F, D.data(), width, corner, n, 0.0F, M.data(), width);
    for (std::int64_t p = 0; p < rows; ++p) {
      std::fill_n(M.begin() + p * width, p + 1, 0.0F);
    }
    std::vector<float>& P = D;
    ctx.blas.gemm(
        false, true, rows, width, width, 1.0F, M.data(), width, corner, n, 0.0F, P.data(), width);
    for (std::int64_t q = begin; q < n; ++q) {
      for (std::int64_t p = begin; p < std::min(end, q); ++p) {
        Pt[static_cast<std::size_t>(q * n + p)] =
            P[static_cast<std::size_t>((p - begin) * width + q - begin)];
      }
    }
  });
  return Pt;
}

// C [n, n] = L B for lower triangular L and B.
std::vector<float> lower_product(
    const Context& ctx, std::int64_t n, const std::vector<float>& L, const std::vector<float>& B) {
  std::vector<float> C(L.size());
  ctx.pool.for_chunks(n, kRows, [&](std::int64_t begin, std::int64_t end, int) {
    ctx.blas.gemm(
        false,
        false,
        end - begin,
        end,
        end,
        1.0F,
        L.data() + begin * n,
        n,
        B.data(),
        n,
        0.0F,
        C.data() + begin * n,
        n);
  });
  return C;
}

// W L^T [rows, n] with the columns of W taken and put back in `order`.
std::vector<float> multiply_rows(
    const Context& ctx,
    std::span<const float> W,
    const std::vector<std::int32_t>& order,
    const std::vector<float>& L) {
  const auto n = static_cast<std::int64_t>(order.size());
  std::vector<float> product(W.size());
  ctx.pool.for_chunks(
      static_cast<std::int64_t>(W.size()) / n,
      kRows,
      [&](std::int64_t begin, std::int64_t end, int) {
        const std::int64_t rows = end - begin;
        std::vector<float> permuted(static_cast<std::size_t>(rows * n));
        std::vector<float> result(permuted.size());
        for (std::int64_t r = 0; r < rows; ++r) {
          for (std::int64_t p = 0; p < n; ++p) {
            permuted[static_cast<std::size_t>(r * n + p)] =
                W[static_cast<std::size_t>((begin + r) * n + order[static_cast<std::size_t>(p)])];
          }
        }
        ctx.blas.gemm(
            false, true, rows, n, n, 1.0F, permuted.data(), n, L.data(), n, 0.0F, result.data(), n);
        for (std::int64_t r = 0; r < rows; ++r) {
          for (std::int64_t p = 0; p < n; ++p) {
            product[static_cast<std::size_t>(
                (begin + r) * n + order[static_cast<std::size_t>(p)])] =
                result[static_cast<std::size_t>(r * n + p)];
          }
        }
      });
  return product;
}

// Why there is nothing to be asymmetric about, or nothing when there is.
std::optional<std::string> lacks_reference(const SiteStats* stats) {
  if (stats == nullptr || stats->G.size() != stats->H.size()) {
    return "no inputs of the unquantized model to aim at";
  }
  if (!std::isfinite(std::accumulate(stats->G.begin(), stats->G.end(), 0.0))) {
    return "G holds NaN or infinity";
  }
  return std::nullopt;
}

}  // namespace

std::vector<float> apply_asymmetry(
    const Context& ctx,
    const SiteStats& stats,
    const std::vector<std::int32_t>& order,
    double alpha,
    std::span<const float> W,
    Factor& factor) {
  const std::int64_t n = stats.width;
  // L = ((I - P)^T)^-1, unit lower triangular.
  std::vector<float> L = transposed_pull(ctx, stats, order, alpha, factor.Ut);
  ctx.pool.for_chunks(n, kRows, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t k = begin; k < end; ++k) {
      for (std::int64_t j = 0; j < k; ++j) {
        L[static_cast<std::size_t>(k * n + j)] *= -1.0F;
      }
      L[static_cast<std::size_t>(k * (n + 1))] = 1.0F;
      factor.Ut[static_cast<std::size_t>(k * (n + 1))] = 0.0F;  // P acts on what U feeds forward
    }
  });
  (void)ctx.blas.invert_lower(n, L.data(), n);  // cannot fail: its diagonal is 1
  factor.Ut = lower_product(ctx, n, L, factor.Ut);
  return multiply_rows(ctx, W, order, L);
}

LinearResult quantize_gptaq(
    const Context& ctx, const LinearProblem& problem, const MethodOptions& options) {
  check_problem(problem, options);
  if (std::optional<std::string> reason = lacks_reference(problem.stats)) {
    LinearResult result = quantize_gptq(ctx, problem, options);
    if (!result.report.fallback) {
      result.report.fallback = std::move(reason);
    }
    return result;
  }
  const SiteStats& stats = *problem.stats;
  LinearProblem asymmetric = problem;
  MismatchCorrection::Target target;
  MethodOptions strength = options;
  strength.mismatch_strength = options.asymmetry;
  if (const auto correction = MismatchCorrection::make(ctx, stats, strength)) {
    target = correction->target(ctx, problem.W, problem.out_features);
    asymmetric.target = target.W;
  }
  LinearResult result = quantize_with_feedback(
      ctx,
      asymmetric,
      options,
      "gptaq",
      [&](const std::vector<std::int32_t>& order, Factor& factor) {
        return apply_asymmetry(ctx, stats, order, options.asymmetry, problem.W, factor);
      });
  result.report.mismatch_strength = target.strength;
  return result;
}

}  // namespace quern
