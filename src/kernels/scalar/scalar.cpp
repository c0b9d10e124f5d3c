// SPDX-License-Identifier: Apache-2.0
// The reference level: obviously correct, always available, the oracle of the other levels.
#include "kernels/scalar/scalar.h"

#include "base/half.h"
#include "kernels/kernel_ops.h"

#include <cmath>

namespace quern {
namespace {

void bf16_to_f32(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = bf16_to_float(in[i]);
  }
}

void f16_to_f32(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = f16_to_float(in[i]);
  }
}

float dot_f32(const float* a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += static_cast<double>(a[i]) * b[i];
  }
  return static_cast<float>(sum);
}

float dot_bf16(const float* a, const uint16_t* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += static_cast<double>(a[i]) * bf16_to_float(b[i]);
  }
  return static_cast<float>(sum);
}

void matvec_bf16(const uint16_t* W, const float* x, float* y, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) {
    y[row] = dot_bf16(x, W + row * columns, columns);
  }
}

void add_f32(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] += x[i];
  }
}

void axpy_f32(float a, const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] += a * x[i];
  }
}

void rms_norm(const float* x, const float* gain, float eps, float* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += static_cast<double>(x[i]) * x[i];
  }
  const auto inverse =
      static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(n) + static_cast<double>(eps)));
  for (int64_t i = 0; i < n; ++i) {
    y[i] = gain[i] * (x[i] * inverse);
  }
}

void rope_half(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t m = 0; m < half; ++m) {
    const float low = x[m];
    const float high = x[m + half];
    x[m] = low * cos[m] - high * sin[m];
    x[m + half] = high * cos[m] + low * sin[m];
  }
}

void exp_f32(const float* x, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = std::exp(x[i]);
  }
}

void swiglu(const float* gate, const float* up, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = gate[i] / (1.0F + std::exp(-gate[i])) * up[i];
  }
}

float maximum(const float* x, int64_t n) {
  float highest = x[0];
  for (int64_t i = 1; i < n; ++i) {
    highest = x[i] > highest ? x[i] : highest;
  }
  return highest;
}

void softmax(float* x, int64_t n) {
  const float highest = maximum(x, n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = std::exp(x[i] - highest);
    sum += x[i];
  }
  const auto inverse = static_cast<float>(1.0 / sum);
  for (int64_t i = 0; i < n; ++i) {
    x[i] *= inverse;
  }
}

double log_sum_exp(const float* x, int64_t n) {
  const float highest = maximum(x, n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += std::exp(x[i] - highest);
  }
  return std::log(sum) + highest;
}

void unpack_codes(const uint32_t* words, int bits, int64_t first, int64_t n, uint8_t* out) {
  const uint32_t mask = (1U << static_cast<unsigned>(bits)) - 1U;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t bit = (first + i) * bits;
    const auto shift = static_cast<unsigned>(bit & 31);
    uint64_t window = words[bit >> 5];
    if (shift + static_cast<unsigned>(bits) > 32) {
      window |= static_cast<uint64_t>(words[(bit >> 5) + 1]) << 32U;
    }
    out[i] = static_cast<uint8_t>((window >> shift) & mask);
  }
}

void dequantize_group(const uint8_t* codes, float scale, float zero, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = scale * (static_cast<float>(codes[i]) - zero);
  }
}

}  // namespace

void install_scalar(KernelOps& ops) {
#define QUERN_OP(name, signature) ops.name = name;
#include "kernels/ops.def"
#undef QUERN_OP
}

}  // namespace quern
