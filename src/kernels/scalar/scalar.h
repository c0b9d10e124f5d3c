// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "kernels/quant_columns.h"

namespace quern {

// The scalar versions that live in a file of their own; ops.def says what they compute.
void fit_grids(
    const float* W,
    int64_t lanes,
    const float* d,
    int64_t columns,
    const float* scales,
    const float* zeros,
    float max_code,
    int64_t candidates,
    float* sums);
void fit_grids_power24(
    const float* W,
    int64_t lanes,
    int64_t columns,
    const float* scales,
    const float* zeros,
    float max_code,
    int64_t candidates,
    float* sums);
void round_columns(const ColumnGrid* grid, const float* W, float* D, uint8_t* codes);
void gptq_columns(
    const ColumnGrid* grid,
    const ColumnTile* triangle,
    const float* W,
    float* errors,
    uint8_t* codes);
void descend_columns(
    const ColumnGrid* grid,
    const ColumnTile* H,
    const float* W,
    const float* R,
    float* D,
    float* delta,
    uint8_t* codes);
void fit_affine(
    const float* x,
    const float* w,
    int64_t n,
    const float* scales,
    const float* minimums,
    float low,
    float high,
    int64_t candidates,
    float* sums);
void fit_levels(
    const float* x,
    const float* w,
    int64_t n,
    const float* scales,
    const float* levels,
    const float* steps,
    int64_t candidates,
    float* sums);

}  // namespace quern
