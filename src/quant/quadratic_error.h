// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "quant/quantized_matrix.h"

#include <cstdint>
#include <span>
#include <vector>

namespace quern {

// tr(W H W^T) and, for each candidate, tr((W-Q) H (W-Q)^T); methods.md 0.
struct QuadraticErrors {
  double total = 0;
  std::vector<double> errors;  // one per candidate

  // errors[i] / total; 0 for a linear whose outputs are all zero and reproduced.
  [[nodiscard]] double relative(std::size_t candidate) const;
};

// W [rows, columns] row-major; H [columns, columns] symmetric, row-major; empty: the identity.
// Products in float, sums in double, on the pool, the same for any thread count.
[[nodiscard]] QuadraticErrors quadratic_errors(
    const Context& ctx,
    std::span<const float> W,
    std::int64_t rows,
    std::int64_t columns,
    std::span<const double> H,
    std::span<const QuantizedMatrix* const> candidates);

}  // namespace quern
