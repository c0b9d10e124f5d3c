// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "quant/grid.h"
#include "quant/method.h"
#include "quant/packed_linear.h"
#include "quant/site_stats.h"

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace quern {

// The blocks of H on its diagonal that belong to the groups of columns: with H_gg [g, g] the error
// of a group's part of the output, over all calibration tokens, is delta^T H_gg delta (the Gram
// form of AWQ's clipping; methods.md 4.4).
class GroupMoments {
 public:
  // Group k holds the columns at positions [k, k + 1) * width of `order`; empty: natural order.
  GroupMoments(
      const SiteStats& stats, std::span<const std::int32_t> order, std::int64_t group_width);

  // H_gg of the group that begins at position `begin`, row-major.
  [[nodiscard]] const float* at(std::int64_t begin) const noexcept {
    return blocks_.data() + begin * width_;
  }

 private:
  std::int64_t width_;
  std::vector<float> blocks_;
};

// The moments that kOutput needs, or nothing for other searches, for ggml types and without
// statistics.
[[nodiscard]] std::optional<GroupMoments> group_moments(
    const LinearProblem& problem,
    const MethodOptions& options,
    std::span<const std::int32_t> order = {});

// Moves the ranges of one group towards the least delta^T H_gg delta of each row: shrinks p of the
// extremes from 1 (or where the top code meets the extreme) to 0.35 (0.2 up to 3 bits), then scales
// around the best one, its closed-form fit and, for asymmetric grids, zero points beside it. Never
// ends behind what it starts from, which is what scales and zeros [lanes] hold, nor behind min-max.
// W is [columns][lanes]. About 60 products with H_gg.
void fit_ranges_to_output(
    const Context& ctx,
    const GridRules& rules,
    const float* H_gg,
    const float* W,
    std::int64_t lanes,
    std::int64_t columns,
    float* scales,
    float* zeros);

// Mean over all groups of scale / scale of the min-max range of W: how far ranges were clipped.
// 1 when W is zero.
[[nodiscard]] double clip_threshold(std::span<const float> W, const PackedLinear& packed);

// tr(D H D^T) / tr(W H W^T) of plain rounding with every way to find ranges, on up to 256 evenly
// spaced rows. Empty for ggml types and without usable statistics.
[[nodiscard]] std::vector<RangeError> compare_ranges(
    const Context& ctx, const LinearProblem& problem, const MethodOptions& options);

}  // namespace quern
