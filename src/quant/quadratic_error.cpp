// SPDX-License-Identifier: Apache-2.0
#include "quant/quadratic_error.h"

#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "quant/row_block.h"

#include <algorithm>
#include <limits>

namespace quern {
namespace {

// Columns per product: wide enough for the BLAS, narrow enough to skip half of H.
constexpr std::int64_t kStrip = 256;

// tr(D H D^T) for D [rows, columns]. H is symmetric: the columns right of the diagonal block count
// twice, those left of it are not touched.
double quadratic_form(
    const Blas& blas,
    const std::vector<float>& H,
    const std::vector<float>& D,
    std::int64_t rows,
    std::int64_t columns,
    std::vector<float>& product) {
  double sum = 0;
  for (std::int64_t begin = 0; begin < columns; begin += kStrip) {
    const std::int64_t strip = std::min(kStrip, columns - begin);
    const std::int64_t width = columns - begin;
    // [rows, width] = D[:, strip] H[strip, begin…].
    blas.gemm(
        false,
        false,
        rows,
        width,
        strip,
        1.0F,
        D.data() + begin,
        columns,
        H.data() + begin * columns + begin,
        columns,
        0.0F,
        product.data(),
        width);
    for (std::int64_t r = 0; r < rows; ++r) {
      const float* left = product.data() + r * width;
      const float* right = D.data() + r * columns + begin;
      double diagonal = 0;
      double beside = 0;
      for (std::int64_t j = 0; j < strip; ++j) {
        diagonal += static_cast<double>(left[j]) * right[j];
      }
      for (std::int64_t j = strip; j < width; ++j) {
        beside += static_cast<double>(left[j]) * right[j];
      }
      sum += diagonal + 2.0 * beside;
    }
  }
  return sum;
}

double sum_of_squares(const std::vector<float>& D) {
  double sum = 0;
  for (const float value : D) {
    sum += static_cast<double>(value) * value;
  }
  return sum;
}

}  // namespace

double QuadraticErrors::relative(std::size_t candidate) const {
  const double error = errors[candidate];
  if (total > 0) {
    return error / total;
  }
  return error > 0 ? std::numeric_limits<double>::infinity() : 0.0;
}

QuadraticErrors quadratic_errors(
    const Context& ctx,
    std::span<const float> W,
    std::int64_t rows,
    std::int64_t columns,
    std::span<const double> H,
    std::span<const QuantizedMatrix* const> candidates) {
  std::vector<float> single(H.size());
  ctx.pool.for_chunks(columns, 64, [&](std::int64_t begin, std::int64_t end, int) {
    const auto first = static_cast<std::ptrdiff_t>(H.empty() ? 0 : begin * columns);
    const auto last = static_cast<std::ptrdiff_t>(H.empty() ? 0 : end * columns);
    std::transform(H.begin() + first, H.begin() + last, single.begin() + first, [](double value) {
      return static_cast<float>(value);
    });
  });

  const std::int64_t chunk = rows_per_block(rows);
  const std::int64_t chunks = (rows + chunk - 1) / chunk;
  const std::size_t sums = candidates.size() + 1;
  std::vector<double> partial(static_cast<std::size_t>(chunks) * sums);
  ctx.pool.for_chunks(rows, chunk, [&](std::int64_t begin, std::int64_t end, int) {
    const std::int64_t count = end - begin;
    const float* from = W.data() + begin * columns;
    std::vector<float> D(from, from + count * columns);
    std::vector<float> product(H.empty() ? 0 : D.size());
    std::vector<float> row(static_cast<std::size_t>(columns));
    std::vector<std::uint8_t> scratch(static_cast<std::size_t>(columns));
    double* out = partial.data() + static_cast<std::size_t>(begin / chunk) * sums;
    const auto measure = [&] {
      return H.empty() ? sum_of_squares(D)
                       : quadratic_form(ctx.blas, single, D, count, columns, product);
    };
    out[0] = measure();
    for (std::size_t c = 0; c < candidates.size(); ++c) {
      for (std::int64_t r = 0; r < count; ++r) {
        candidates[c]->dequantize_row(ctx.kernels, begin + r, scratch, row);
        for (std::int64_t j = 0; j < columns; ++j) {
          D[static_cast<std::size_t>(r * columns + j)] =
              row[static_cast<std::size_t>(j)] - from[r * columns + j];
        }
      }
      out[c + 1] = measure();
    }
  });

  QuadraticErrors result;
  result.errors.assign(candidates.size(), 0.0);
  for (std::size_t i = 0; i < static_cast<std::size_t>(chunks); ++i) {
    result.total += partial[i * sums];
    for (std::size_t c = 0; c < candidates.size(); ++c) {
      result.errors[c] += partial[i * sums + c + 1];
    }
  }
  return result;
}

}  // namespace quern
