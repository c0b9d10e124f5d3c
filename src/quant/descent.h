// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "quant/row_block.h"

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace quern {

// The systems of all rows for one window of bases: A = V^T H V [K][K][lanes] (lower triangle) and
// the gradient g = V^T H D [K][lanes].
struct ScaleSystem {
  std::int64_t size = 0;
  std::vector<double> A;
  std::vector<double> g;
};

// Coordinate descent and scale refit on E = tr(D H D^T), D = Q - W (methods.md 2.6). `H` is
// [columns, columns] in float, symmetric, with a positive diagonal. Both keep D and the codes of
// the block consistent and never raise a row's E, up to the rounding of float.
class Descent {
 public:
  Descent(
      const Context& context,
      const QuantScheme& quant_scheme,
      DType scale_dtype,
      const std::vector<float>& matrix);

  // One pass over all columns: each code becomes the best one given all others.
  void sweep(RowBlock& block) const;
  // The scales that minimise E for the present codes, by a K x K system per row for windows of up
  // to 64 groups, rounded as stored. A row whose E would not fall keeps its scales.
  void refit_scales(RowBlock& block) const;

  // The same for the super-scales d and dmin of a ggml type.
  void refit_super_scales(RowBlock& block) const;

  // E of every lane.
  [[nodiscard]] std::vector<double> errors(const RowBlock& block) const;

  // Sweeps, then rounds of (refit, 2 sweeps).
  void run(RowBlock& block, int sweeps, int refit_rounds) const;

 private:
  // What one unknown multiplies: values [columns][lanes], of which columns [begin, end) count.
  // The bases of a window stand in the order of their columns.
  struct Basis {
    const float* values;
    std::int64_t begin;
    std::int64_t end;
  };
  [[nodiscard]] ScaleSystem build_system(const RowBlock& block, std::span<const Basis> bases) const;
  // What to add to the unknowns of lane r for the least E; nothing when E does not depend on them.
  [[nodiscard]] std::optional<std::vector<double>> best_step(
      const ScaleSystem& system, std::int64_t lanes, std::int64_t r) const;
  // out [count][lanes] = columns [begin, begin + count) of D H.
  void multiply_columns(
      const RowBlock& block, std::int64_t begin, std::int64_t count, float* out) const;

  const Context& ctx_;
  const QuantScheme& scheme_;
  DType scale_dtype_;
  const std::vector<float>& H_;
  std::vector<float> inverse_diagonal_;
};

}  // namespace quern
