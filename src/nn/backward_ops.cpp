// SPDX-License-Identifier: Apache-2.0
#include "nn/backward_ops.h"

#include "nn/row_ops.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace quern {

template <class T>
void rms_norm_backward(const T* x, const T* gain, float eps, const T* dy, std::int64_t n, T* dx) {
  double square = 0;
  double product = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const auto value = static_cast<double>(x[i]);
    square += value * value;
    product += static_cast<double>(gain[i]) * static_cast<double>(dy[i]) * value;
  }
  const auto count = static_cast<double>(n);
  const double inverse = 1.0 / std::sqrt(square / count + static_cast<double>(eps));
  const auto r = static_cast<T>(inverse);
  const auto along = static_cast<T>(inverse * inverse * inverse * product / count);
  for (std::int64_t i = 0; i < n; ++i) {
    dx[i] = r * gain[i] * dy[i] - along * x[i];
  }
}

template <class T>
void rope_backward(const T* cosines, const T* sines, std::int64_t half, T* x) {
  for (std::int64_t m = 0; m < half; ++m) {
    const T low = x[m];
    const T high = x[m + half];
    x[m] = low * cosines[m] + high * sines[m];
    x[m + half] = high * cosines[m] - low * sines[m];
  }
}

template <class T>
void swiglu_backward(const Context& ctx, const T* dh, std::int64_t n, T* gate, T* up) {
  std::array<T, 1024> below;  // 1 + e^-gate, some values at a time
  constexpr auto kChunk = static_cast<std::int64_t>(below.size());
  for (std::int64_t begin = 0; begin < n; begin += kChunk) {
    const std::int64_t count = std::min(kChunk, n - begin);
    T* g = gate + begin;
    T* u = up + begin;
    std::transform(g, g + count, below.data(), [](T value) { return -value; });
    exp_row(ctx, below.data(), below.data(), count);
    for (std::int64_t i = 0; i < count; ++i) {
      const T s = T{1} / (T{1} + below[static_cast<std::size_t>(i)]);
      const T value = g[i];
      const T d = dh[begin + i];
      g[i] = d * u[i] * s * (T{1} + value * (T{1} - s));
      u[i] = d * value * s;
    }
  }
}

template <class T>
void softmax_backward(const Context& ctx, const T* p, std::int64_t n, T* dp) {
  const auto mean = static_cast<T>(dot_row(ctx, p, dp, n));
  for (std::int64_t i = 0; i < n; ++i) {
    dp[i] = p[i] * (dp[i] - mean);
  }
}

template <class T>
void cross_entropy_backward(std::int64_t n, std::int64_t label, T scale, T* p) {
  if (label < 0) {
    std::fill(p, p + n, T{0});
    return;
  }
  p[label] -= T{1};
  for (std::int64_t i = 0; i < n; ++i) {
    p[i] *= scale;
  }
}

template void rms_norm_backward(
    const float*, const float*, float, const float*, std::int64_t, float*);
template void rms_norm_backward(
    const double*, const double*, float, const double*, std::int64_t, double*);
template void rope_backward(const float*, const float*, std::int64_t, float*);
template void rope_backward(const double*, const double*, std::int64_t, double*);
template void swiglu_backward(const Context&, const float*, std::int64_t, float*, float*);
template void swiglu_backward(const Context&, const double*, std::int64_t, double*, double*);
template void softmax_backward(const Context&, const float*, std::int64_t, float*);
template void softmax_backward(const Context&, const double*, std::int64_t, double*);
template void cross_entropy_backward(std::int64_t, std::int64_t, float, float*);
template void cross_entropy_backward(std::int64_t, std::int64_t, double, double*);

}  // namespace quern
