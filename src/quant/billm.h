// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "quant/method.h"

namespace quern {

// BiLLM (arXiv 2402.04291; methods.md 6; Aaronhuang-778/BiLLM: bigptq.py, utils/*). Blocks of
// columns (the scheme's group) from the left: the columns of largest sum_i w_ij^2 / U_jj^2 are
// salient, as many (1 to 49) as give the least error; those are binarised twice, the rest once, in
// two groups parted at the best of 81 quantiles of |w|; the error is fed into later columns.
//
// Four things differ from the published code, each to the better: errors are weighted by H_jj
// instead of measured on the saliencies; the two levels of a group are the weighted means of its
// upper and lower part; errors are fed forward inside a block too; and every weight takes the
// nearest value that its bits can say. Columns of up to 512 evenly spaced rows decide on structure
// and threshold.
//
// Falls back to binarisation without error feedback, and says why, where gptq falls back to rtn.
[[nodiscard]] LinearResult quantize_billm(
    const Context& ctx, const LinearProblem& problem, const MethodOptions& options);

}  // namespace quern
