// SPDX-License-Identifier: Apache-2.0
#include "quant/descent.h"

#include "kernels/blas.h"
#include "kernels/kernels.h"

#include <algorithm>
#include <cmath>

namespace quern {
namespace {

// Columns whose residual is brought up to date by one product; inside, the kernel takes over.
constexpr std::int64_t kBlock = 128;
constexpr std::int64_t kWindow = 64;  // groups whose scales are solved for together
constexpr int kSweepsPerRefit = 2;
constexpr double kRidge = 1e-9;  // times tr(A)/K, against groups whose codes are all zero points

// Codes minus zero points of one row block, as floats: Q of column j is scale * V_j.
std::vector<float> signed_codes(const RowBlock& block) {
  std::vector<float> V(block.codes.size());
  for (std::int64_t j = 0; j < block.columns; ++j) {
    const float* zeros =
        block.zeros.data() + block.group_of[static_cast<std::size_t>(j)] * block.lanes;
    for (std::int64_t r = 0; r < block.lanes; ++r) {
      const auto at = static_cast<std::size_t>(j * block.lanes + r);
      V[at] = static_cast<float>(block.codes[at]) - zeros[r];
    }
  }
  return V;
}

// out[r] += sum over `count` columns of a[j][r] * b[j][r].
void add_column_products(
    const float* a, const float* b, std::int64_t count, std::int64_t lanes, double* out) {
  for (std::int64_t j = 0; j < count; ++j) {
    for (std::int64_t r = 0; r < lanes; ++r) {
      out[r] += static_cast<double>(a[j * lanes + r]) * b[j * lanes + r];
    }
  }
}

// The systems of all rows for one window of groups: A = V^T H V [K][K][lanes] (lower triangle) and
// the gradient g = V^T H D [K][lanes].
struct ScaleSystem {
  std::int64_t size = 0;
  std::vector<double> A;
  std::vector<double> g;
};

// Change of E when the scales of row r move by `step`: 2 g^T step + step^T A step.
double change_of_error(
    const ScaleSystem& system,
    std::int64_t lanes,
    std::int64_t r,
    const std::vector<double>& step) {
  double change = 0;
  for (std::int64_t k = 0; k < system.size; ++k) {
    const double* row = system.A.data() + k * system.size * lanes;
    const double own = step[static_cast<std::size_t>(k)];
    double product =
        2.0 * system.g[static_cast<std::size_t>(k * lanes + r)] + row[k * lanes + r] * own;
    for (std::int64_t l = 0; l < k; ++l) {
      product += 2.0 * row[l * lanes + r] * step[static_cast<std::size_t>(l)];
    }
    change += own * product;
  }
  return change;
}

}  // namespace

Descent::Descent(
    const Context& context,
    const QuantScheme& quant_scheme,
    DType scale_dtype,
    const std::vector<float>& matrix)
    : ctx_(context), scheme_(quant_scheme), scale_dtype_(scale_dtype), H_(matrix) {
  const auto n =
      static_cast<std::size_t>(std::lround(std::sqrt(static_cast<double>(matrix.size()))));
  inverse_diagonal_.resize(n);
  for (std::size_t j = 0; j < n; ++j) {
    inverse_diagonal_[j] = 1.0F / matrix[j * (n + 1)];
  }
}

void Descent::multiply_columns(
    const RowBlock& block, std::int64_t begin, std::int64_t count, float* out) const {
  ctx_.blas.gemm(
      false,
      false,
      count,
      block.lanes,
      block.columns,
      1.0F,
      H_.data() + begin * block.columns,
      block.columns,
      block.D.data(),
      block.lanes,
      0.0F,
      out,
      block.lanes);
}

void Descent::sweep(RowBlock& block) const {
  const std::int64_t n = block.columns;
  const std::int64_t lanes = block.lanes;
  std::vector<float> R(static_cast<std::size_t>(kBlock * lanes));
  std::vector<float> delta(R.size());
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t count = std::min(kBlock, n - begin);
    // R = D H of these columns, afresh from D: no rounding error is carried from block to block.
    multiply_columns(block, begin, count, R.data());
    const ColumnGrid grid = block.grid(scheme_, begin, count);
    const ColumnTile tile = {H_.data() + begin * (n + 1), n, inverse_diagonal_.data() + begin};
    ctx_.kernels.descend_columns(
        &grid,
        &tile,
        block.W.data() + begin * lanes,
        R.data(),
        block.D.data() + begin * lanes,
        delta.data(),
        block.codes.data() + begin * lanes);
  }
}

void Descent::refit_scales(RowBlock& block) const {
  const std::int64_t n = block.columns;
  const std::int64_t lanes = block.lanes;
  const std::int64_t width = scheme_.group_width(n);
  const std::int64_t groups = scheme_.groups(n);
  const std::vector<float> V = signed_codes(block);
  std::vector<float> product;
  for (std::int64_t first = 0; first < groups; first += kWindow) {
    const std::int64_t begin = first * width;
    ScaleSystem system;
    system.size = std::min(kWindow, groups - first);
    const std::int64_t end = std::min((first + system.size) * width, n);
    system.A.assign(static_cast<std::size_t>(system.size * system.size * lanes), 0.0);
    system.g.assign(static_cast<std::size_t>(system.size * lanes), 0.0);
    product.resize(static_cast<std::size_t>((end - begin) * lanes));

    // H D of the window's columns gives the gradient.
    multiply_columns(block, begin, end - begin, product.data());
    for (std::int64_t k = 0; k < system.size; ++k) {
      const std::int64_t column = begin + k * width;
      add_column_products(
          V.data() + column * lanes,
          product.data() + (column - begin) * lanes,
          std::min(width, end - column),
          lanes,
          system.g.data() + k * lanes);
    }
    // H V_l from group l downwards gives column l of the lower triangle of A.
    for (std::int64_t l = 0; l < system.size; ++l) {
      const std::int64_t column = begin + l * width;
      ctx_.blas.gemm(
          false,
          false,
          end - column,
          lanes,
          std::min(width, end - column),
          1.0F,
          H_.data() + column * (n + 1),
          n,
          V.data() + column * lanes,
          lanes,
          0.0F,
          product.data(),
          lanes);
      for (std::int64_t k = l; k < system.size; ++k) {
        const std::int64_t row = begin + k * width;
        add_column_products(
            V.data() + row * lanes,
            product.data() + (row - column) * lanes,
            std::min(width, end - row),
            lanes,
            system.A.data() + (k * system.size + l) * lanes);
      }
    }

    std::vector<double> matrix(static_cast<std::size_t>(system.size * system.size));
    std::vector<double> step(static_cast<std::size_t>(system.size));
    for (std::int64_t r = 0; r < block.rows; ++r) {
      double trace = 0;
      for (std::int64_t k = 0; k < system.size; ++k) {
        for (std::int64_t l = 0; l <= k; ++l) {
          matrix[static_cast<std::size_t>(k * system.size + l)] =
              system.A[static_cast<std::size_t>((k * system.size + l) * lanes + r)];
        }
        trace += matrix[static_cast<std::size_t>(k * (system.size + 1))];
        step[static_cast<std::size_t>(k)] = -system.g[static_cast<std::size_t>(k * lanes + r)];
      }
      const double ridge = kRidge * trace / static_cast<double>(system.size);
      for (std::int64_t k = 0; k < system.size; ++k) {
        matrix[static_cast<std::size_t>(k * (system.size + 1))] += ridge;
      }
      if (!ctx_.blas.cholesky_lower(system.size, matrix.data(), system.size)) {
        continue;  // no weight of the row is off its zero point: nothing to fit
      }
      ctx_.blas.solve_cholesky_lower(system.size, 1, matrix.data(), system.size, step.data(), 1);
      std::vector<float> scales(static_cast<std::size_t>(system.size));
      for (std::int64_t k = 0; k < system.size; ++k) {
        const float old = block.scales[static_cast<std::size_t>((first + k) * lanes + r)];
        const auto wanted = static_cast<float>(old + step[static_cast<std::size_t>(k)]);
        scales[static_cast<std::size_t>(k)] = storable_scale(wanted, scale_dtype_);
        step[static_cast<std::size_t>(k)] =
            static_cast<double>(scales[static_cast<std::size_t>(k)]) - old;
      }
      if (change_of_error(system, lanes, r, step) < 0) {
        for (std::int64_t k = 0; k < system.size; ++k) {
          block.scales[static_cast<std::size_t>((first + k) * lanes + r)] =
              scales[static_cast<std::size_t>(k)];
        }
      }
    }
    block.update_difference();
  }
}

std::vector<double> Descent::errors(const RowBlock& block) const {
  const std::int64_t n = block.columns;
  const std::int64_t lanes = block.lanes;
  std::vector<float> R(static_cast<std::size_t>(kBlock * lanes));
  std::vector<double> sums(static_cast<std::size_t>(lanes));
  for (std::int64_t begin = 0; begin < n; begin += kBlock) {
    const std::int64_t count = std::min(kBlock, n - begin);
    multiply_columns(block, begin, count, R.data());
    add_column_products(R.data(), block.D.data() + begin * lanes, count, lanes, sums.data());
  }
  return sums;
}

void Descent::run(RowBlock& block, int sweeps, int refit_rounds) const {
  for (int i = 0; i < sweeps; ++i) {
    sweep(block);
  }
  for (int round = 0; round < refit_rounds; ++round) {
    refit_scales(block);
    for (int i = 0; i < kSweepsPerRefit; ++i) {
      sweep(block);
    }
  }
}

}  // namespace quern
