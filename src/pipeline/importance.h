// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "calib/calibration_set.h"
#include "format/imatrix.h"
#include "model/graph.h"
#include "pipeline/output.h"
#include "quant/site_stats.h"

#include <filesystem>
#include <optional>

namespace quern {

// llama.cpp's importance matrices in the place of calibration text, and made of it.

// Throws UsageError unless the file knows linears of this model, at their widths.
void check_imatrix(
    const Imatrix& imatrix, const ModelGraph& graph, const std::filesystem::path& path);
// As much of the calibration as the file tells, for the manifest and the fingerprint.
[[nodiscard]] CalibrationSet calibration_of(
    const Imatrix& imatrix, const std::filesystem::path& path);
// A checked matrix as the diagonal of second moments; nothing when it lacks the linear.
[[nodiscard]] std::optional<SiteStats> diagonal_stats(const Imatrix& imatrix, const Linear& linear);

[[nodiscard]] bool is_imatrix_file(const std::filesystem::path& file);
// What calibration saw at the inputs of all parts; UsageError when it saw none.
void write_imatrix_of(
    const PartSource& parts,
    const ModelGraph& graph,
    const CalibrationSet& calibration,
    const std::filesystem::path& path);

}  // namespace quern
