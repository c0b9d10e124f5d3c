// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/method.h"

#include <cstdint>

namespace quern {

struct KernelTable;

// What a range search may choose from; methods.md 1.1 (GPTQ's definitions) and 1.2.
struct GridRules {
  int bits = 4;
  bool symmetric = true;  // zero point 2^(bits-1)
  StorageRules storage;
  RangeSearch search = RangeSearch::kWeighted;

  [[nodiscard]] float max_code() const noexcept { return static_cast<float>((1 << bits) - 1); }
};

[[nodiscard]] GridRules grid_rules(const QuantScheme& scheme, const MethodOptions& options);
[[nodiscard]] GridRules grid_rules(const LinearProblem& problem, const MethodOptions& options);

// The scale as a file will hold it: rounded to `dtype` (F16, BF16, F32), positive, normal and
// finite. Codes are always chosen with this value, never with the unrounded one.
[[nodiscard]] float storable_scale(float scale, DType dtype) noexcept;

// Extremes of one group of a row, with zero always inside.
struct Extent {
  float low = 0;
  float high = 0;

  void add(float w) noexcept {
    low = w < low ? w : low;
    high = w > high ? w : high;
  }
};

// The grid that spans p times the extent, as stored. A group of zeros gets scale 2/(2^bits-1) and
// the middle zero point.
void spanning_grid(
    const GridRules& rules, const Extent& extent, float p, float& scale, float& zero) noexcept;

// The p at which both extremes are held exactly: the highest code of a symmetric grid falls half a
// step short of p = 1.
[[nodiscard]] float absmax_shrink(const GridRules& rules) noexcept;

// The nearest zero point that can be stored.
[[nodiscard]] float clamp_zero(const GridRules& rules, float zero) noexcept;

// Scale and zero point of one group of every row. W is [columns][lanes] with the rows in the lanes
// (kernels/quant_columns.h), `weights` [columns] the importance of each column (only kWeighted uses
// it, and kOutput, which is the same here: fit_ranges_to_output goes on from there), scales and
// zeros [lanes].
void find_ranges(
    const KernelTable& kernels,
    const GridRules& rules,
    const float* W,
    std::int64_t lanes,
    const float* weights,
    std::int64_t columns,
    float* scales,
    float* zeros);

}  // namespace quern
