// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "calib/statistics.h"

#include <cstdint>
#include <string>
#include <vector>

namespace quern {

// What is gathered for one linear besides the vectors; each costs room of the size of its matrix.
struct GradientParts {
  bool weight = false;  // the gradient of the weights
  bool fisher = false;  // the token-level diagonal of the Fisher information
  int guided_groups = 0;  // GuidedQuant Hessians of this many groups of output rows (1 … 4)
};

// What a backward pass tells about one linear y = W x + b: x_t its inputs and delta_t the gradient
// of the loss at its outputs, t over the tokens of all sequences. Matrices are row-major.
struct LinearGradients {
  std::int64_t tokens = 0;
  std::vector<double> delta_sum;  // [out] sum over t of delta_ti: the gradient of the bias
  std::vector<double> delta_square;  // [out] sum over t of delta_ti^2
  std::vector<double> input_square;  // [in] sum over t of x_tj^2
  std::vector<float> weight;  // [out, in] sum over t of delta_ti x_tj: the gradient of W; or empty
  // [out, in] sum over t of delta_ti^2 x_tj^2, the sum over tokens of squared gradients of W (not
  // the square of their sum); or empty. methods.md 11.1 and 12.
  std::vector<float> fisher;
  // H of group k = (1/rows) sum over t of w_tk x_t x_t^T with w_tk the mean of delta_ti^2 over the
  // outputs guided_group(k, …): GuidedQuant (arXiv 2505.07004). In the form that the
  // rounding methods take, held-out sequences in H_holdout; abs_max is that of sqrt(w_tk) x_t.
  std::vector<SiteStats> guided;

  // Root mean squares over the tokens: RMS_t(delta_i) and RMS_t(x_j) of methods.md 11.2.
  [[nodiscard]] std::vector<double> delta_rms() const;  // [out]
  [[nodiscard]] std::vector<double> input_rms() const;  // [in]
};

// Output rows [begin, end) of group `k` of `groups`: as equal as they can be, in order.
struct RowRange {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};
[[nodiscard]] RowRange guided_group(int k, int groups, std::int64_t out_features);

// Gathers LinearGradients from rows of inputs and deltas. The result does not depend on the thread
// count.
class LinearGradientAccumulator {
 public:
  // Throws std::logic_error for a number of groups outside 0 … out_features.
  LinearGradientAccumulator(
      std::int64_t out_features, std::int64_t in_features, const GradientParts& parts);

  // Adds X [rows, in] and delta [rows, out] of one sequence. `holdout` only concerns the guided
  // Hessians; SiteAccumulator says which order is fast.
  void add(const Context& ctx, const float* X, const float* delta, std::int64_t rows, bool holdout);

  // Ends the accumulator: no rows can be added afterwards. Throws ParseError naming `module` when a
  // sum is not finite.
  [[nodiscard]] LinearGradients finish(const Context& ctx, const std::string& module);

  // Bytes that one accumulator holds; while rows are added for `fisher` or `guided_groups`, a copy
  // of them comes on top.
  [[nodiscard]] static std::uint64_t memory(
      std::int64_t out_features,
      std::int64_t in_features,
      const GradientParts& parts,
      bool with_holdout);

 private:
  void add_guided(
      const Context& ctx, const float* X, const float* delta, std::int64_t rows, bool holdout);

  std::int64_t out_;
  std::int64_t in_;
  LinearGradients sums_;
  std::vector<SiteAccumulator> guided_;
};

}  // namespace quern
