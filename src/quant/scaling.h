// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/method.h"

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// A linear that reads the channels of a site.
struct ScalingConsumer {
  std::span<const float> W;  // [out_features, width], row-major
  std::int64_t out_features = 0;
  QuantScheme scheme;
  std::optional<RangeSearch> range = {};  // instead of MethodOptions::range
  ActivationScheme activation = {};
};

// Channel factors s for one site: the producer of its input is divided by s, the columns of its
// consumers are multiplied, and the model computes what it did before. What changes is which
// columns share a range fairly (AWQ, arXiv 2306.00978; methods.md 4).
struct ScalingProblem {
  const SiteStats* stats = nullptr;
  std::vector<ScalingConsumer> consumers;
  // Channels of one unit must have one factor (heads that share a key-value head); [width], units
  // numbered from 0. Empty: every channel is free.
  std::vector<std::int32_t> unit_of;
  bool powers_of_two = false;  // the producer holds 16-bit floats that must divide exactly
};

struct ScalingResult {
  std::vector<float> factors;  // [width]; empty: 1 everywhere is best
  std::string rule;  // "none", "activation^0.35", …
  double error_ratio = 1;  // estimated error over that without factors
};

// One equivalence transform; one line in scaling.cpp.
struct Transform {
  std::string_view name;
  std::string_view summary;
  ScalingResult (*find)(
      const Context& ctx, const ScalingProblem& problem, const MethodOptions& options);
};

[[nodiscard]] std::span<const Transform> transforms();
[[nodiscard]] const Transform* find_transform(std::string_view name);

// Factors as close to `wanted` [width] as they may be: one in a unit (the geometric mean), middle
// of the range at 1, spread bounded, powers of two where asked. What is not positive and finite
// counts as 1.
[[nodiscard]] std::vector<float> allowed_factors(
    const ScalingProblem& problem, const std::vector<double>& wanted);

// The statistics of X / s.
void divide_by_factors(SiteStats& stats, std::span<const float> factors);

}  // namespace quern
