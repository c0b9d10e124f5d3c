// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "quant/site_stats.h"

#include <cstdint>
#include <vector>

namespace quern {

// Gathers SiteStats of one calibration site from rows of activations. X^T X is summed in float over
// a few thousand rows and then in double, tile by tile on the pool; the result does not depend on
// the thread count.
class SiteAccumulator {
 public:
  explicit SiteAccumulator(std::int64_t width);

  // Adds X [rows, width] (contiguous) to H or, with `holdout`, to H_holdout; with `reference`, the
  // same rows of the unquantized model, also to G. Rows that hold a NaN or an infinity in either
  // are left out and counted; they are overwritten by the rows that follow them. Alternating
  // `holdout` often costs time: give all rows of one kind first.
  void add(const Context& ctx, float* X, float* reference, std::int64_t rows, bool holdout);

  // The means; the accumulator is empty afterwards.
  [[nodiscard]] SiteStats finish(const Context& ctx);

  // Bytes that one accumulator of this width holds at its peak.
  [[nodiscard]] static std::uint64_t memory(
      std::int64_t width, bool with_holdout, bool with_reference);

 private:
  std::int64_t drop_non_finite(const Context& ctx, float* X, float* reference, std::int64_t rows);
  void add_products(const Context& ctx, const float* X, std::int64_t rows);
  void add_mixed_products(
      const Context& ctx, const float* X, const float* reference, std::int64_t rows);
  void flush(const Context& ctx);
  void take_sample(const float* X, std::int64_t rows);

  SiteStats stats_;
  std::vector<float> partial_;  // upper tiles of X^T X since the last flush
  std::vector<float> partial_mixed_;  // X^T X~ since the last flush; empty without a reference
  std::int64_t sample_stride_ = 1;  // doubled whenever the sample is full
  std::int64_t partial_rows_ = 0;
  bool partial_holdout_ = false;
};

}  // namespace quern
