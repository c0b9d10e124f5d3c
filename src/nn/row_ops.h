// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "kernels/kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace quern {

// Operations on one row in both precisions: float, which ships, runs the kernels; double, in which
// the gradients are held against central differences, runs plain loops.

// Softmax over n >= 1 values in place.
inline void softmax_row(const Context& ctx, float* x, std::int64_t n) {
  ctx.kernels.softmax(x, n);
}
inline void softmax_row(const Context& /*ctx*/, double* x, std::int64_t n) {
  const double highest = *std::max_element(x, x + n);
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    x[i] = std::exp(x[i] - highest);
    sum += x[i];
  }
  for (std::int64_t i = 0; i < n; ++i) {
    x[i] /= sum;
  }
}

// out[i] = e^x[i]; out may be x.
inline void exp_row(const Context& ctx, const float* x, float* out, std::int64_t n) {
  ctx.kernels.exp_f32(x, out, n);
}
inline void exp_row(const Context& /*ctx*/, const double* x, double* out, std::int64_t n) {
  std::transform(x, x + n, out, [](double value) { return std::exp(value); });
}

// Sum of a[i] * b[i], in double.
inline double dot_row(const Context& ctx, const float* a, const float* b, std::int64_t n) {
  return static_cast<double>(ctx.kernels.dot_f32(a, b, n));
}
inline double dot_row(const Context& /*ctx*/, const double* a, const double* b, std::int64_t n) {
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

}  // namespace quern
