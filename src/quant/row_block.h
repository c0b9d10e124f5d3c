// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "kernels/quant_columns.h"
#include "quant/ggml_matrix.h"
#include "quant/grid.h"
#include "quant/method.h"
#include "quant/packed_linear.h"

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace quern {

struct KernelTable;
class GroupMoments;

// Some rows of a linear while they are rounded. Column after column with the rows in the lanes:
// W, codes and D are [columns][lanes], scales and zeros [groups][lanes]. Lanes beyond `rows` hold
// zeros. The grid of column j is that of group group_of[j] = j / group width.
struct RowBlock {
  std::int64_t first = 0;  // row of the linear that lane 0 is
  std::int64_t rows = 0;
  std::int64_t lanes = 0;
  std::int64_t columns = 0;
  std::vector<float> W;
  std::vector<std::uint8_t> codes;
  std::vector<float> D;  // Q - W
  std::vector<float> scales;
  std::vector<float> zeros;
  std::vector<std::int32_t> group_of;  // [columns]
  // [rows] of a ggml type: what each row stores beside its codes; else empty. W then holds the
  // weights plus the minimum of their group: the grid is scale * (code - zero) with a whole zero
  // point, as everywhere, and D is still Q - W.
  std::vector<GgmlRow> ggml;

  // Rows [first, end) of the problem, with nothing rounded yet.
  [[nodiscard]] static RowBlock load(
      const LinearProblem& problem, std::int64_t first, std::int64_t end);

  // The grid of columns [begin, begin + count) for the kernels.
  [[nodiscard]] ColumnGrid grid(
      const QuantScheme& scheme, std::int64_t begin, std::int64_t count) const;

  // Ranges of all groups from W; `weights` [columns].
  void find_all_ranges(
      const KernelTable& kernels,
      const QuantScheme& scheme,
      const GridRules& rules,
      const float* weights);
  // Moves all ranges on to what suits the output (fit_ranges_to_output).
  void fit_all_ranges_to_output(
      const Context& ctx,
      const QuantScheme& scheme,
      const GridRules& rules,
      const GroupMoments& moments);
  // Codes and D by plain rounding to the present ranges.
  void round_all(const KernelTable& kernels, const QuantScheme& scheme);
  // D from the present codes and ranges.
  void update_difference();

  // Takes a row's codes, D and ranges over from a block of the same rows.
  void take_row(const RowBlock& other, std::int64_t row);

  // Takes over the scales and minimums that ggml[row] has now.
  void apply_ggml_row(const GgmlLayout& layout, std::int64_t row);

  // Into a matrix of make_matrix.
  void store(QuantizedMatrix& matrix) const;

 private:
  void find_ggml_scales(const KernelTable& kernels, GgmlType type, const float* weights);
  void store_packed(PackedLinear& packed) const;
  void store_ggml(GgmlMatrix& matrix) const;
};

// An empty matrix of the problem's scheme.
[[nodiscard]] std::shared_ptr<QuantizedMatrix> make_matrix(
    const LinearProblem& problem, const StorageRules& storage);

// Rows [first, first + rows) of a row-major matrix with `columns` columns as [columns][lanes];
// lanes beyond `rows` hold zeros.
[[nodiscard]] std::vector<float> load_columns(
    std::span<const float> matrix,
    std::int64_t columns,
    std::int64_t first,
    std::int64_t rows,
    std::int64_t lanes);

// Rows that are worked on together. Fixed by the shape alone, because results must not depend on
// the thread count.
[[nodiscard]] std::int64_t rows_per_block(std::int64_t out_features);

}  // namespace quern
