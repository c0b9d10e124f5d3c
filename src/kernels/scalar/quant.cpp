// SPDX-License-Identifier: Apache-2.0
// The rounding kernels, one row at a time: the oracle of the vector versions.
#include "kernels/scalar/scalar.h"

#include <algorithm>
#include <cmath>

namespace quern {
namespace {

// code - zero of the grid point nearest to w; a tie goes to the even multiple of the scale. A NaN
// becomes the lowest code (argument order of std::max).
float nearest(float w, float scale, float zero, float max_code) {
  return std::nearbyint(std::min(std::max(-zero, w / scale), max_code - zero));
}

struct Cell {
  float scale;
  float zero;
};

struct FitSums {
  float error = 0;
  float l = 0;
  float square = 0;
  float product = 0;

  void add(float x, float w, float q, float scale, float minimum) {
    const float e = scale * q - minimum - x;
    error += w * e * e;
    l += w * q;
    square += w * q * q;
    product += w * q * x;
  }
  void store(float* out) const {
    out[0] = error;
    out[1] = l;
    out[2] = square;
    out[3] = product;
  }
};

Cell cell(const ColumnGrid& grid, int64_t column, int64_t lane) {
  const int64_t at = grid.group[column] * grid.lanes + lane;
  return {grid.scales[at], grid.zeros[at]};
}

}  // namespace

void fit_grids(
    const float* W,
    int64_t lanes,
    const float* d,
    int64_t columns,
    const float* scales,
    const float* zeros,
    float max_code,
    int64_t candidates,
    float* sums) {
  for (int64_t c = 0; c < candidates; ++c) {
    for (int64_t r = 0; r < kRowLanes; ++r) {
      const float scale = scales[c * kRowLanes + r];
      const float zero = zeros[c * kRowLanes + r];
      float error = 0;
      float product = 0;
      float square = 0;
      for (int64_t j = 0; j < columns; ++j) {
        const float w = W[j * lanes + r];
        const float v = nearest(w, scale, zero, max_code);
        const float e = scale * v - w;
        error += d[j] * e * e;
        product += d[j] * v * w;
        square += d[j] * v * v;
      }
      float* out = sums + c * 3 * kRowLanes + r;
      out[0] = error;
      out[kRowLanes] = product;
      out[2 * kRowLanes] = square;
    }
  }
}

void fit_grids_power24(
    const float* W,
    int64_t lanes,
    int64_t columns,
    const float* scales,
    const float* zeros,
    float max_code,
    int64_t candidates,
    float* sums) {
  for (int64_t c = 0; c < candidates; ++c) {
    for (int64_t r = 0; r < kRowLanes; ++r) {
      const float scale = scales[c * kRowLanes + r];
      const float zero = zeros[c * kRowLanes + r];
      float error = 0;
      for (int64_t j = 0; j < columns; ++j) {
        const float w = W[j * lanes + r];
        error += std::pow(std::abs(scale * nearest(w, scale, zero, max_code) - w), 2.4F);
      }
      sums[c * kRowLanes + r] = error;
    }
  }
}

void round_columns(const ColumnGrid* grid, const float* W, float* D, uint8_t* codes) {
  for (int64_t j = 0; j < grid->columns; ++j) {
    for (int64_t r = 0; r < grid->lanes; ++r) {
      const int64_t at = j * grid->lanes + r;
      const auto [scale, zero] = cell(*grid, j, r);
      const float v = nearest(W[at], scale, zero, grid->max_code);
      D[at] = scale * v - W[at];
      codes[at] = static_cast<uint8_t>(v + zero);
    }
  }
}

void gptq_columns(
    const ColumnGrid* grid,
    const ColumnTile* triangle,
    const float* W,
    float* errors,
    uint8_t* codes) {
  for (int64_t j = 0; j < grid->columns; ++j) {
    const float* row = triangle->tile + j * triangle->stride;
    for (int64_t r = 0; r < grid->lanes; ++r) {
      const int64_t at = j * grid->lanes + r;
      float w = W[at];
      for (int64_t k = 0; k < j; ++k) {
        w -= errors[k * grid->lanes + r] * row[k];
      }
      const auto [scale, zero] = cell(*grid, j, r);
      const float v = nearest(w, scale, zero, grid->max_code);
      errors[at] = (w - scale * v) * triangle->inverse_diagonal[j];
      codes[at] = static_cast<uint8_t>(v + zero);
    }
  }
}

void descend_columns(
    const ColumnGrid* grid,
    const ColumnTile* H,
    const float* W,
    const float* R,
    float* D,
    float* delta,
    uint8_t* codes) {
  for (int64_t j = 0; j < grid->columns; ++j) {
    const float* row = H->tile + j * H->stride;
    for (int64_t r = 0; r < grid->lanes; ++r) {
      const int64_t at = j * grid->lanes + r;
      float residual = R[at];
      for (int64_t k = 0; k < j; ++k) {
        residual += delta[k * grid->lanes + r] * row[k];
      }
      const auto [scale, zero] = cell(*grid, j, r);
      const float target = W[at] + (D[at] - residual * H->inverse_diagonal[j]);
      const float v = nearest(target, scale, zero, grid->max_code);
      const float difference = scale * v - W[at];
      delta[at] = difference - D[at];
      D[at] = difference;
      codes[at] = static_cast<uint8_t>(v + zero);
    }
  }
}

void fit_affine(
    const float* x,
    const float* w,
    int64_t n,
    const float* scales,
    const float* minimums,
    float low,
    float high,
    int64_t candidates,
    float* sums) {
  for (int64_t c = 0; c < candidates; ++c) {
    const float inverse = scales[c] == 0 ? 0.0F : 1 / scales[c];
    FitSums fit;
    for (int64_t i = 0; i < n; ++i) {
      const float t = (x[i] + minimums[c]) * inverse;
      const float q = std::nearbyint(std::min(std::max(low, t), high));
      fit.add(x[i], w[i], q, scales[c], minimums[c]);
    }
    fit.store(sums + 4 * c);
  }
}

void fit_levels(
    const float* x,
    const float* w,
    int64_t n,
    const float* scales,
    const float* levels,
    const float* steps,
    int64_t candidates,
    float* sums) {
  constexpr int kSteps = 15;
  for (int64_t c = 0; c < candidates; ++c) {
    const float inverse = scales[c] == 0 ? 0.0F : 1 / scales[c];
    FitSums fit;
    for (int64_t i = 0; i < n; ++i) {
      const float t = x[i] * inverse;
      const auto k = std::count_if(steps, steps + kSteps, [t](float step) { return t > step; });
      fit.add(x[i], w[i], levels[k], scales[c], 0.0F);
    }
    fit.store(sums + 4 * c);
  }
}

}  // namespace quern
