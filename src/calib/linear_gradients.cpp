// SPDX-License-Identifier: Apache-2.0
#include "calib/linear_gradients.h"

#include "base/checked.h"
#include "base/error.h"
#include "kernels/blas.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace quern {
namespace {

constexpr std::int64_t kColumnChunk = 256;
constexpr std::int64_t kRowChunk = 32;
constexpr std::int64_t kTile = 384;

// squares[i] += sum over rows of A[t, i]^2 and, when not null, sums[i] += sum of A[t, i].
void add_columns(
    const Context& ctx,
    const float* A,
    std::int64_t rows,
    std::int64_t width,
    double* squares,
    double* sums) {
  ctx.pool.for_chunks(width, kColumnChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = 0; t < rows; ++t) {
      const float* row = A + t * width;
      for (std::int64_t i = begin; i < end; ++i) {
        squares[i] += static_cast<double>(row[i]) * static_cast<double>(row[i]);
      }
      for (std::int64_t i = begin; sums != nullptr && i < end; ++i) {
        sums[i] += static_cast<double>(row[i]);
      }
    }
  });
}

// C[m, n] += A^T B with A [rows, m] and B [rows, n].
void add_product(
    const Context& ctx,
    const float* A,
    std::int64_t m,
    const float* B,
    std::int64_t n,
    std::int64_t rows,
    float* C) {
  const std::int64_t columns = ceil_div(n, kTile);
  ctx.pool.for_chunks(ceil_div(m, kTile) * columns, 1, [&](std::int64_t tile, std::int64_t, int) {
    const std::int64_t i = tile / columns * kTile;
    const std::int64_t j = tile % columns * kTile;
    ctx.blas.gemm(
        true,
        false,
        std::min(kTile, m - i),
        std::min(kTile, n - j),
        rows,
        1.0F,
        A + i,
        m,
        B + j,
        n,
        1.0F,
        C + i * n + j,
        n);
  });
}

std::vector<float> squares_of(
    const Context& ctx, const float* A, std::int64_t rows, std::int64_t width) {
  std::vector<float> out(static_cast<std::size_t>(rows * width));
  ctx.pool.for_chunks(rows, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    std::transform(A + begin * width, A + end * width, out.data() + begin * width, [](float a) {
      return a * a;
    });
  });
  return out;
}

std::vector<double> rms(const std::vector<double>& squares, std::int64_t tokens) {
  std::vector<double> result(squares.size());
  std::transform(squares.begin(), squares.end(), result.begin(), [&](double sum) {
    return std::sqrt(sum / static_cast<double>(std::max<std::int64_t>(tokens, 1)));
  });
  return result;
}

bool all_finite(const std::vector<double>& values) {
  return std::all_of(values.begin(), values.end(), [](double x) { return std::isfinite(x); });
}

}  // namespace

std::vector<double> LinearGradients::delta_rms() const {
  return rms(delta_square, tokens);
}

std::vector<double> LinearGradients::input_rms() const {
  return rms(input_square, tokens);
}

RowRange guided_group(int k, int groups, std::int64_t out_features) {
  return {k * out_features / groups, (k + 1) * out_features / groups};
}

LinearGradientAccumulator::LinearGradientAccumulator(
    std::int64_t out_features, std::int64_t in_features, const GradientParts& parts)
    : out_(out_features), in_(in_features) {
  if (parts.guided_groups < 0 || parts.guided_groups > out_features) {
    throw std::logic_error("LinearGradientAccumulator: a group needs at least one output row");
  }
  sums_.delta_sum.resize(static_cast<std::size_t>(out_));
  sums_.delta_square.resize(static_cast<std::size_t>(out_));
  sums_.input_square.resize(static_cast<std::size_t>(in_));
  const auto cells = static_cast<std::size_t>(out_ * in_);
  sums_.weight.resize(parts.weight ? cells : 0);
  sums_.fisher.resize(parts.fisher ? cells : 0);
  for (int k = 0; k < parts.guided_groups; ++k) {
    guided_.emplace_back(in_);
  }
}

std::uint64_t LinearGradientAccumulator::memory(
    std::int64_t out_features,
    std::int64_t in_features,
    const GradientParts& parts,
    bool with_holdout) {
  const auto out = static_cast<std::uint64_t>(out_features);
  const auto in = static_cast<std::uint64_t>(in_features);
  const std::uint64_t matrices = (parts.weight ? 1U : 0U) + (parts.fisher ? 1U : 0U);
  return (2 * out + in) * sizeof(double) + matrices * out * in * sizeof(float) +
         static_cast<std::uint64_t>(parts.guided_groups) *
             SiteAccumulator::memory(in_features, with_holdout, false);
}

void LinearGradientAccumulator::add(
    const Context& ctx, const float* X, const float* delta, std::int64_t rows, bool holdout) {
  sums_.tokens += rows;
  add_columns(ctx, delta, rows, out_, sums_.delta_square.data(), sums_.delta_sum.data());
  add_columns(ctx, X, rows, in_, sums_.input_square.data(), nullptr);
  if (!sums_.weight.empty()) {
    add_product(ctx, delta, out_, X, in_, rows, sums_.weight.data());
  }
  if (!sums_.fisher.empty()) {
    const std::vector<float> delta_squares = squares_of(ctx, delta, rows, out_);
    const std::vector<float> X_squares = squares_of(ctx, X, rows, in_);
    add_product(ctx, delta_squares.data(), out_, X_squares.data(), in_, rows, sums_.fisher.data());
  }
  add_guided(ctx, X, delta, rows, holdout);
}

void LinearGradientAccumulator::add_guided(
    const Context& ctx, const float* X, const float* delta, std::int64_t rows, bool holdout) {
  const auto groups = static_cast<int>(guided_.size());
  std::vector<float> scaled(groups > 0 ? static_cast<std::size_t>(rows * in_) : 0);
  for (int k = 0; k < groups; ++k) {
    const RowRange range = guided_group(k, groups, out_);
    ctx.pool.for_chunks(rows, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t t = begin; t < end; ++t) {
        double square = 0;
        for (std::int64_t i = range.begin; i < range.end; ++i) {
          const auto d = static_cast<double>(delta[t * out_ + i]);
          square += d * d;
        }
        // sqrt(w) on the rows gives w on their products.
        const auto factor =
            static_cast<float>(std::sqrt(square / static_cast<double>(range.end - range.begin)));
        std::transform(X + t * in_, X + (t + 1) * in_, scaled.data() + t * in_, [&](float x) {
          return factor * x;
        });
      }
    });
    guided_[static_cast<std::size_t>(k)].add(ctx, scaled.data(), nullptr, rows, holdout);
  }
}

LinearGradients LinearGradientAccumulator::finish(const Context& ctx, const std::string& module) {
  if (!all_finite(sums_.delta_square) || !all_finite(sums_.input_square)) {
    throw ParseError(
        "the model computes values that are not finite",
        module,
        "an input or a gradient is infinity or NaN there",
        "check the checkpoint with quern verify: it may be damaged");
  }
  for (SiteAccumulator& accumulator : guided_) {
    sums_.guided.push_back(accumulator.finish(ctx));
  }
  return std::exchange(sums_, {});
}

}  // namespace quern
