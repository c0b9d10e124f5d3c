// SPDX-License-Identifier: Apache-2.0
#include "quant/descent.h"

#include "base/half.h"
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

// Unknown k of the bases of a ggml row: d and, with minimums, dmin of its blocks in turn.
std::uint16_t& super_scale(
    GgmlRow& row, std::int64_t first_block, std::size_t k, bool with_minimum) {
  const std::size_t step = with_minimum ? 2 : 1;
  const std::size_t b = static_cast<std::size_t>(first_block) + k / step;
  return k % step == 0 ? row.d[b] : row.dmin[b];
}

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

ScaleSystem Descent::build_system(const RowBlock& block, std::span<const Basis> bases) const {
  const std::int64_t n = block.columns;
  const std::int64_t lanes = block.lanes;
  const auto size = static_cast<std::int64_t>(bases.size());
  ScaleSystem system;
  system.size = size;
  system.A.assign(static_cast<std::size_t>(size * size * lanes), 0.0);
  system.g.assign(static_cast<std::size_t>(size * lanes), 0.0);
  const std::int64_t begin = bases.front().begin;
  const std::int64_t end = bases.back().end;
  std::vector<float> product(static_cast<std::size_t>((end - begin) * lanes));

  // H D of the window's columns gives the gradient.
  multiply_columns(block, begin, end - begin, product.data());
  for (std::int64_t k = 0; k < size; ++k) {
    const Basis& basis = bases[static_cast<std::size_t>(k)];
    add_column_products(
        basis.values + basis.begin * lanes,
        product.data() + (basis.begin - begin) * lanes,
        basis.end - basis.begin,
        lanes,
        system.g.data() + k * lanes);
  }
  // H V_l from basis l downwards gives column l of the lower triangle of A.
  for (std::int64_t l = 0; l < size; ++l) {
    const Basis& column = bases[static_cast<std::size_t>(l)];
    ctx_.blas.gemm(
        false,
        false,
        end - column.begin,
        lanes,
        column.end - column.begin,
        1.0F,
        H_.data() + column.begin * (n + 1),
        n,
        column.values + column.begin * lanes,
        lanes,
        0.0F,
        product.data(),
        lanes);
    for (std::int64_t k = l; k < size; ++k) {
      const Basis& row = bases[static_cast<std::size_t>(k)];
      add_column_products(
          row.values + row.begin * lanes,
          product.data() + (row.begin - column.begin) * lanes,
          row.end - row.begin,
          lanes,
          system.A.data() + (k * size + l) * lanes);
    }
  }
  return system;
}

std::optional<std::vector<double>> Descent::best_step(
    const ScaleSystem& system, std::int64_t lanes, std::int64_t r) const {
  const std::int64_t size = system.size;
  std::vector<double> matrix(static_cast<std::size_t>(size * size));
  std::vector<double> step(static_cast<std::size_t>(size));
  double trace = 0;
  for (std::int64_t k = 0; k < size; ++k) {
    for (std::int64_t l = 0; l <= k; ++l) {
      matrix[static_cast<std::size_t>(k * size + l)] =
          system.A[static_cast<std::size_t>((k * size + l) * lanes + r)];
    }
    trace += matrix[static_cast<std::size_t>(k * (size + 1))];
    step[static_cast<std::size_t>(k)] = -system.g[static_cast<std::size_t>(k * lanes + r)];
  }
  const double ridge = kRidge * trace / static_cast<double>(size);
  for (std::int64_t k = 0; k < size; ++k) {
    matrix[static_cast<std::size_t>(k * (size + 1))] += ridge;
  }
  if (!ctx_.blas.cholesky_lower(size, matrix.data(), size)) {
    return std::nullopt;  // no weight of the row is off its zero point: nothing to fit
  }
  ctx_.blas.solve_cholesky_lower(size, 1, matrix.data(), size, step.data(), 1);
  return step;
}

void Descent::refit_scales(RowBlock& block) const {
  const std::int64_t lanes = block.lanes;
  const std::int64_t width = scheme_.group_width(block.columns);
  const std::int64_t groups = scheme_.groups(block.columns);
  const std::vector<float> V = signed_codes(block);
  for (std::int64_t first = 0; first < groups; first += kWindow) {
    std::vector<Basis> bases;
    for (std::int64_t group = first; group < std::min(first + kWindow, groups); ++group) {
      bases.push_back({V.data(), group * width, std::min((group + 1) * width, block.columns)});
    }
    const ScaleSystem system = build_system(block, bases);
    std::vector<float> scales(bases.size());
    for (std::int64_t r = 0; r < block.rows; ++r) {
      std::optional<std::vector<double>> step = best_step(system, lanes, r);
      if (!step) {
        continue;
      }
      for (std::size_t k = 0; k < scales.size(); ++k) {
        float& old = block.scales
                         [(static_cast<std::size_t>(first) + k) * static_cast<std::size_t>(lanes) +
                          static_cast<std::size_t>(r)];
        scales[k] = storable_scale(static_cast<float>(old + (*step)[k]), scale_dtype_);
        (*step)[k] = static_cast<double>(scales[k]) - old;
      }
      if (change_of_error(system, lanes, r, *step) < 0) {
        for (std::size_t k = 0; k < scales.size(); ++k) {
          block.scales
              [(static_cast<std::size_t>(first) + k) * static_cast<std::size_t>(lanes) +
               static_cast<std::size_t>(r)] = scales[k];
        }
      }
    }
    block.update_difference();
  }
}

// Q of a ggml row is d_b u - dmin_b v over block b, with u = sub-scale * (code - zero) and v the
// sub-minimum: the same system with these as bases, and d and dmin as unknowns.
void Descent::refit_super_scales(RowBlock& block) const {
  const GgmlLayout& layout = *ggml_layout(*scheme_.ggml);
  const std::int64_t lanes = block.lanes;
  std::vector<float> U(block.codes.size());
  std::vector<float> M(layout.has_minimum() ? block.codes.size() : 0);
  for (std::int64_t j = 0; j < block.columns; ++j) {
    const auto group = static_cast<std::size_t>(block.group_of[static_cast<std::size_t>(j)]);
    for (std::int64_t r = 0; r < block.rows; ++r) {
      const GgmlRow& row = block.ggml[static_cast<std::size_t>(r)];
      const auto at = static_cast<std::size_t>(j * lanes + r);
      U[at] = static_cast<float>(row.sub_scale[group]) *
              (static_cast<float>(block.codes[at]) + layout.values.front());
      if (!M.empty()) {
        M[at] = -static_cast<float>(row.sub_minimum[group]);
      }
    }
  }
  const std::int64_t blocks = block.columns / layout.block;
  const std::int64_t window = M.empty() ? kWindow : kWindow / 2;
  for (std::int64_t first = 0; first < blocks; first += window) {
    std::vector<Basis> bases;
    for (std::int64_t b = first; b < std::min(first + window, blocks); ++b) {
      bases.push_back({U.data(), b * layout.block, (b + 1) * layout.block});
      if (!M.empty()) {
        bases.push_back({M.data(), b * layout.block, (b + 1) * layout.block});
      }
    }
    const ScaleSystem system = build_system(block, bases);
    for (std::int64_t r = 0; r < block.rows; ++r) {
      std::optional<std::vector<double>> step = best_step(system, lanes, r);
      if (!step) {
        continue;
      }
      GgmlRow& row = block.ggml[static_cast<std::size_t>(r)];
      std::vector<std::uint16_t> halves(step->size());
      for (std::size_t k = 0; k < step->size(); ++k) {
        const std::uint16_t old = super_scale(row, first, k, !M.empty());
        halves[k] = float_to_f16(static_cast<float>(f16_to_float(old) + (*step)[k]));
        (*step)[k] = static_cast<double>(f16_to_float(halves[k])) - f16_to_float(old);
      }
      const double change = change_of_error(system, lanes, r, *step);
      if (std::isfinite(change) && change < 0) {
        for (std::size_t k = 0; k < halves.size(); ++k) {
          super_scale(row, first, k, !M.empty()) = halves[k];
        }
        block.apply_ggml_row(layout, r);
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
    if (scheme_.ggml) {
      refit_super_scales(block);
    } else {
      refit_scales(block);
    }
    for (int i = 0; i < kSweepsPerRefit; ++i) {
      sweep(block);
    }
  }
}

}  // namespace quern
