// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/ggml_types.h"

#include <cstddef>
#include <cstdint>
#include <span>

namespace quern {

struct KernelTable;

// Choosing what a block of a ggml type stores, for the error sum_j w_j (x_j - q_j)^2 with weights
// of the caller: diag(H) of the linear's inputs, an importance matrix, or ones (methods.md 1.2).
//
// Scales are chosen as they will be stored: d and dmin rounded to half, sub-scales to their
// integers. The search of a block:
//   1. each group on its own: some dozen trial scales, least squares for the codes that each gives,
//      then codes and least squares in turn (as make_qkx3_quants and make_qx_quants of
//      ggml/src/ggml-quants.c, which stop after the first least squares);
//   2. super-scales: some dozen candidates around (largest scale) / (largest sub-scale), ranked by
//      the quadratic that rounding the sub-scales costs; ggml takes the plain quotient, or searches
//      without looking at codes;
//   3. for the best of them, sub-scales by trying the neighbours with codes chosen anew, then
//   super-
//      scales by least squares over the block, in turn.
// The error is at most that of ggml_quantize_chunk on every kind of row that was tried
// (tests/quant_ggml_quantize_test.cpp), in sum over blocks, not for each one.

// Stores d, dmin and the sub-scales of block `b` into `row` and computes its `scale` and `minimum`;
// codes stay as they are. `values` and `weights` have layout.block finite elements; weights are not
// negative. Columns of weight 0 count a millionth of the mean.
void find_scales(
    const KernelTable& kernels,
    const GgmlLayout& layout,
    std::span<const float> values,
    std::span<const float> weights,
    GgmlRow& row,
    std::size_t b);

// The codes of block `b` nearest to `values` [layout.block], given its scales.
void nearest_codes(
    const GgmlLayout& layout, std::span<const float> values, GgmlRow& row, std::size_t b);

// Both, for every block of a row.
[[nodiscard]] GgmlRow quantize_row(
    const KernelTable& kernels,
    const GgmlLayout& layout,
    std::span<const float> values,
    std::span<const float> weights);

// sum_j w_j (x_j - q_j)^2 of a row.
[[nodiscard]] double weighted_error(
    const GgmlLayout& layout,
    std::span<const float> values,
    std::span<const float> weights,
    const GgmlRow& row);

// The weights that ggml's own writers make of an importance per column: importance *
// sqrt(sigma2 + x^2), sigma2 a multiple of the mean square of the row or block; the importance
// alone for Q6_K and Q8_0. All three have the size of a row.
void ggml_weights(
    GgmlType type,
    std::span<const float> values,
    std::span<const float> importance,
    std::span<float> weights);

}  // namespace quern
