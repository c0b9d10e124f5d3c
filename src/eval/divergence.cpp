// SPDX-License-Identifier: Apache-2.0
#include "eval/divergence.h"

#include "kernels/kernels.h"

#include <algorithm>

namespace quern {

double kl_divergence(
    const Context& ctx,
    const float* a,
    const float* b,
    double a_norm,
    double b_norm,
    std::int64_t n,
    float* p) {
  std::copy(a, a + n, p);
  ctx.kernels.softmax(p, n);
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    sum += static_cast<double>(p[i]) * (static_cast<double>(a[i]) - b[i]);
  }
  // Rounding may leave it below 0. A NaN stays one: std::max would make it 0, a perfect score.
  const double kl = sum - a_norm + b_norm;
  return kl < 0 ? 0.0 : kl;
}

}  // namespace quern
