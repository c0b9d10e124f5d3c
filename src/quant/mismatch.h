// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/method.h"

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace quern {

// The weights that do best on the inputs X of the quantized model what W does on those of the
// original, X~: argmin over V of |X~ W^T - X V^T|^2 = W G^T H^-1 (Qronos, arXiv 2505.11695;
// methods.md 2.5). Rounding then starts from W + tau (W G^T H^-1 - W). With few rows the correction
// learns the calibration text, so tau in [0, 1] is the one that is best on the held-out rows; the
// error is a parabola in tau.
class MismatchCorrection {
 public:
  // Nothing when `stats` has no G, or when H cannot be factorised at any damping.
  [[nodiscard]] static std::optional<MismatchCorrection> make(
      const Context& ctx, const SiteStats& stats, const MethodOptions& options);

  struct Target {
    std::vector<float> W;  // [rows, width]
    double strength = 0;  // tau; 0: W unchanged
  };
  [[nodiscard]] Target target(
      const Context& ctx, std::span<const float> W, std::int64_t rows) const;

 private:
  const SiteStats* stats_ = nullptr;
  std::vector<float> correction_;  // [width, width]: H^-1 (G - H)
  std::vector<float> difference_;  // [width, width]: H - G of the held-out rows; may be empty
  std::vector<float> holdout_;  // [width, width]: H of the held-out rows; may be empty
  std::optional<double> fixed_strength_;
};

}  // namespace quern
