// SPDX-License-Identifier: Apache-2.0
// The rounding kernels over `Vec`, kRowLanes floats of one instruction set. A level's file defines
// Vec in an unnamed namespace of quern and includes this file there: nothing here is seen by the
// linker. No include guard and no includes, because it is a body, not an interface.
//
// Vec has load, store, set1, zero; + - * /; min, max, round (ties to even), fma(a, b, c) = a b + c,
// fnma(a, b, c) = c - a b, abs, power04 (|x|^0.4 to about 1e-5), store_codes (to bytes), above(a,
// b, c) = c where a > b, else 0, and store_sums(a, b, c, d, to): the sums over the lanes of each.

// Rows in flight at once: four independent chains hide the latency of the multiply-adds.
constexpr int kChains = 4;

// A tie goes to the even multiple of the scale; the bounds are whole numbers, so clamping first is
// the same as clamping the rounded value.
inline Vec nearest(Vec quotient, Vec zero, Vec max_code) {
  return round(min(max(quotient, Vec::zero() - zero), max_code - zero));
}

template <int kCandidates>
void fit_grids_body(
    const float* W,
    int64_t lanes,
    const float* d,
    int64_t columns,
    const float* scales,
    const float* zeros,
    float max_code,
    float* sums) {
  Vec scale[kCandidates];
  Vec inverse[kCandidates];
  Vec low[kCandidates];
  Vec high[kCandidates];
  Vec error[kCandidates];
  Vec product[kCandidates];
  Vec square[kCandidates];
  for (int c = 0; c < kCandidates; ++c) {
    const Vec zero = Vec::load(zeros + c * kRowLanes);
    scale[c] = Vec::load(scales + c * kRowLanes);
    inverse[c] = Vec::set1(1.0F) / scale[c];
    low[c] = Vec::zero() - zero;
    high[c] = Vec::set1(max_code) - zero;
    error[c] = product[c] = square[c] = Vec::zero();
  }
  for (int64_t j = 0; j < columns; ++j) {
    const Vec w = Vec::load(W + j * lanes);
    const Vec weight = Vec::set1(d[j]);
    for (int c = 0; c < kCandidates; ++c) {
      const Vec v = round(min(max(w * inverse[c], low[c]), high[c]));
      const Vec e = scale[c] * v - w;
      const Vec weighted = weight * v;
      error[c] = fma(weight * e, e, error[c]);
      product[c] = fma(weighted, w, product[c]);
      square[c] = fma(weighted, v, square[c]);
    }
  }
  for (int c = 0; c < kCandidates; ++c) {
    float* out = sums + int64_t{3} * c * kRowLanes;
    error[c].store(out);
    product[c].store(out + kRowLanes);
    square[c].store(out + 2 * kRowLanes);
  }
}

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
  int64_t c = 0;
  for (; c + 2 <= candidates; c += 2) {
    fit_grids_body<2>(
        W,
        lanes,
        d,
        columns,
        scales + c * kRowLanes,
        zeros + c * kRowLanes,
        max_code,
        sums + c * 3 * kRowLanes);
  }
  if (c < candidates) {
    fit_grids_body<1>(
        W,
        lanes,
        d,
        columns,
        scales + c * kRowLanes,
        zeros + c * kRowLanes,
        max_code,
        sums + c * 3 * kRowLanes);
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
    const Vec scale = Vec::load(scales + c * kRowLanes);
    const Vec zero = Vec::load(zeros + c * kRowLanes);
    const Vec inverse = Vec::set1(1.0F) / scale;
    Vec error = Vec::zero();
    for (int64_t j = 0; j < columns; ++j) {
      const Vec w = Vec::load(W + j * lanes);
      const Vec e = scale * nearest(w * inverse, zero, Vec::set1(max_code)) - w;
      error = fma(e * e, power04(abs(e)), error);
    }
    error.store(sums + c * kRowLanes);
  }
}

void round_columns(const ColumnGrid* grid, const float* W, float* D, uint8_t* codes) {
  const Vec max_code = Vec::set1(grid->max_code);
  for (int64_t j = 0; j < grid->columns; ++j) {
    const float* scales = grid->scales + grid->group[j] * grid->lanes;
    const float* zeros = grid->zeros + grid->group[j] * grid->lanes;
    for (int64_t r = 0; r < grid->lanes; r += kRowLanes) {
      const int64_t at = j * grid->lanes + r;
      const Vec scale = Vec::load(scales + r);
      const Vec zero = Vec::load(zeros + r);
      const Vec w = Vec::load(W + at);
      const Vec v = nearest(w / scale, zero, max_code);
      (scale * v - w).store(D + at);
      (v + zero).store_codes(codes + at);
    }
  }
}

template <int kVectors>
void gptq_columns_body(
    const ColumnGrid& grid,
    const ColumnTile& triangle,
    const float* W,
    float* errors,
    uint8_t* codes,
    int64_t first) {
  const Vec max_code = Vec::set1(grid.max_code);
  for (int64_t j = 0; j < grid.columns; ++j) {
    const float* row = triangle.tile + j * triangle.stride;
    const int64_t at = j * grid.lanes + first;
    Vec w[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      w[i] = Vec::load(W + at + i * kRowLanes);
    }
    for (int64_t k = 0; k < j; ++k) {
      const Vec factor = Vec::set1(row[k]);
      const float* error = errors + k * grid.lanes + first;
      for (int i = 0; i < kVectors; ++i) {
        w[i] = fnma(Vec::load(error + i * kRowLanes), factor, w[i]);
      }
    }
    const int64_t cells = grid.group[j] * grid.lanes + first;
    const Vec inverse = Vec::set1(triangle.inverse_diagonal[j]);
    for (int i = 0; i < kVectors; ++i) {
      const Vec scale = Vec::load(grid.scales + cells + i * kRowLanes);
      const Vec zero = Vec::load(grid.zeros + cells + i * kRowLanes);
      const Vec v = nearest(w[i] / scale, zero, max_code);
      (fnma(scale, v, w[i]) * inverse).store(errors + at + i * kRowLanes);
      (v + zero).store_codes(codes + at + i * kRowLanes);
    }
  }
}

void gptq_columns(
    const ColumnGrid* grid,
    const ColumnTile* triangle,
    const float* W,
    float* errors,
    uint8_t* codes) {
  int64_t first = 0;
  for (; first + kChains * kRowLanes <= grid->lanes; first += kChains * kRowLanes) {
    gptq_columns_body<kChains>(*grid, *triangle, W, errors, codes, first);
  }
  for (; first < grid->lanes; first += kRowLanes) {
    gptq_columns_body<1>(*grid, *triangle, W, errors, codes, first);
  }
}

template <int kVectors>
void descend_columns_body(
    const ColumnGrid& grid,
    const ColumnTile& H,
    const float* W,
    const float* R,
    float* D,
    float* delta,
    uint8_t* codes,
    int64_t first) {
  const Vec max_code = Vec::set1(grid.max_code);
  for (int64_t j = 0; j < grid.columns; ++j) {
    const float* row = H.tile + j * H.stride;
    const int64_t at = j * grid.lanes + first;
    Vec residual[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      residual[i] = Vec::load(R + at + i * kRowLanes);
    }
    for (int64_t k = 0; k < j; ++k) {
      const Vec factor = Vec::set1(row[k]);
      const float* change = delta + k * grid.lanes + first;
      for (int i = 0; i < kVectors; ++i) {
        residual[i] = fma(Vec::load(change + i * kRowLanes), factor, residual[i]);
      }
    }
    const int64_t cells = grid.group[j] * grid.lanes + first;
    const Vec inverse = Vec::set1(H.inverse_diagonal[j]);
    for (int i = 0; i < kVectors; ++i) {
      const Vec scale = Vec::load(grid.scales + cells + i * kRowLanes);
      const Vec zero = Vec::load(grid.zeros + cells + i * kRowLanes);
      const Vec w = Vec::load(W + at + i * kRowLanes);
      const Vec old = Vec::load(D + at + i * kRowLanes);
      const Vec target = w + fnma(residual[i], inverse, old);
      const Vec v = nearest(target / scale, zero, max_code);
      const Vec difference = scale * v - w;
      (difference - old).store(delta + at + i * kRowLanes);
      difference.store(D + at + i * kRowLanes);
      (v + zero).store_codes(codes + at + i * kRowLanes);
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
  int64_t first = 0;
  for (; first + kChains * kRowLanes <= grid->lanes; first += kChains * kRowLanes) {
    descend_columns_body<kChains>(*grid, *H, W, R, D, delta, codes, first);
  }
  for (; first < grid->lanes; first += kRowLanes) {
    descend_columns_body<1>(*grid, *H, W, R, D, delta, codes, first);
  }
}

// What a candidate leaves of some values: see fit_affine in quant_ops.def.
struct FitSums {
  Vec error;
  Vec l;
  Vec square;
  Vec product;

  void add(Vec x, Vec w, Vec q, Vec scale, Vec minimum) {
    const Vec e = fma(scale, q, Vec::zero() - minimum) - x;
    const Vec weighted = w * q;
    error = fma(w * e, e, error);
    l = l + weighted;
    square = fma(weighted, q, square);
    product = fma(weighted, x, product);
  }
};

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
  const Vec lowest = Vec::set1(low);
  const Vec highest = Vec::set1(high);
  for (int64_t c = 0; c < candidates; ++c) {
    const Vec inverse = Vec::set1(scales[c] == 0 ? 0.0F : 1 / scales[c]);
    const Vec scale = Vec::set1(scales[c]);
    const Vec minimum = Vec::set1(minimums[c]);
    FitSums fit = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    for (int64_t i = 0; i < n; i += kRowLanes) {
      const Vec value = Vec::load(x + i);
      const Vec q = round(min(max((value + minimum) * inverse, lowest), highest));
      fit.add(value, Vec::load(w + i), q, scale, minimum);
    }
    store_sums(fit.error, fit.l, fit.square, fit.product, sums + 4 * c);
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
  Vec heights[kSteps];
  for (int k = 0; k < kSteps; ++k) {
    heights[k] = Vec::set1(levels[k + 1] - levels[k]);
  }
  for (int64_t c = 0; c < candidates; ++c) {
    const Vec inverse = Vec::set1(scales[c] == 0 ? 0.0F : 1 / scales[c]);
    FitSums fit = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    for (int64_t i = 0; i < n; i += kRowLanes) {
      const Vec value = Vec::load(x + i);
      const Vec t = value * inverse;
      Vec q = Vec::set1(levels[0]);
      for (int k = 0; k < kSteps; ++k) {
        q = q + above(t, Vec::set1(steps[k]), heights[k]);
      }
      fit.add(value, Vec::load(w + i), q, Vec::set1(scales[c]), Vec::zero());
    }
    store_sums(fit.error, fit.l, fit.square, fit.product, sums + 4 * c);
  }
}

void install_quant(KernelOps& ops) {
  ops.fit_grids = fit_grids;
  ops.fit_grids_power24 = fit_grids_power24;
  ops.round_columns = round_columns;
  ops.gptq_columns = gptq_columns;
  ops.descend_columns = descend_columns;
  ops.fit_affine = fit_affine;
  ops.fit_levels = fit_levels;
}
