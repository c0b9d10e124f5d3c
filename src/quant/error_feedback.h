// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/curvature.h"
#include "quant/method.h"

#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

namespace quern {

// What a method does between the factorisation and the recursion: it may change the part of
// factor.Ut below the diagonal, and returns the weights [out_features, in_features] that the
// recursion starts from (empty: problem.goal()). `order` is position -> column.
using FeedbackSetup =
    std::function<std::vector<float>(const std::vector<std::int32_t>& order, Factor& factor)>;

// What all methods with error feedback share (methods.md 2.2 to 2.6): the factor of the shrunk and
// damped H, the recursion in a chosen column order, coordinate descent and scale refit towards
// problem.goal(), and the choice among their results. Falls back to RTN, and says why in the
// report, when the statistics cannot be used, when no damping makes them positive definite, or when
// the result is worse than RTN on the held-out rows. The report calls the method `name`.
[[nodiscard]] LinearResult quantize_with_feedback(
    const Context& ctx,
    const LinearProblem& problem,
    const MethodOptions& options,
    std::string_view name,
    const FeedbackSetup& setup = {});

// Held-out errors of two roundings are compared on the same text, but a text may favour one of
// them: the factor by which one must be worse before it counts.
[[nodiscard]] double holdout_margin(const SiteStats& stats);

}  // namespace quern
