// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdint.h>  // NOLINT(modernize-deprecated-headers): see kernel_ops.h

namespace quern {

// Rows that one vector of the rounding kernels holds. Matrices of those kernels are stored column
// after column, [columns][lanes], with the rows in the lanes; `lanes` is a multiple of kRowLanes.
constexpr int64_t kRowLanes = 16;

// The grid of a run of columns: value = scale * v, with the integer v = code - zero.
struct ColumnGrid {
  int64_t lanes;
  int64_t columns;
  const int32_t* group;  // [columns] the row of scales and zeros that a column uses
  const float* scales;  // [groups][lanes], positive
  const float* zeros;  // [groups][lanes], whole numbers
  float max_code;
};

// A square tile of a symmetric or lower triangular matrix that couples those columns; entry (j, k)
// is at tile[j * stride + k], only k < j is read.
struct ColumnTile {
  const float* tile;
  int64_t stride;
  const float* inverse_diagonal;  // [columns]
};

}  // namespace quern
