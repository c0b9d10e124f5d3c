// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

namespace quern {

// What calibration learned about one distinct linear input X [rows, width]; filled by calib/, read
// by the methods. Matrices are full and symmetric, row-major, double.
//
// The rows are split once, by sequence: most fill H, about a tenth only H_holdout, so that a method
// can see whether what it gained on H is real (methods.md 2.5 and 14).
struct SiteStats {
  std::int64_t width = 0;
  std::vector<double> H;  // [width, width]: (1/rows) X^T X
  std::vector<double> H_holdout;  // same of the held-out rows; empty when there are none
  // (1/rows) X^T X~ with X~ the inputs of the unquantized model, of the same rows; empty when only
  // one stream of activations was kept (methods.md 2.5).
  std::vector<double> G;
  std::vector<double> G_holdout;
  std::vector<float> abs_max;  // [width], over all rows
  // Up to kSampledRows of the rows in H, evenly spaced, [sample_rows, width]: for what cannot be
  // told from second moments.
  std::vector<float> sample;
  std::int64_t rows = 0;  // rows in H
  std::int64_t holdout_rows = 0;
  std::int64_t dropped_rows = 0;  // rows with NaN or infinity, in neither

  static constexpr std::int64_t kSampledRows = 256;

  [[nodiscard]] std::int64_t sample_rows() const noexcept {
    return width == 0 ? 0 : static_cast<std::int64_t>(sample.size()) / width;
  }
};

}  // namespace quern
