// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "calib/calibration_set.h"
#include "pipeline/block_quantizer.h"
#include "pipeline/quantize.h"

namespace quern {

// The two tables over the vocabulary: embedding and head. A table is far larger than any other
// matrix, so it is rounded in slices of rows.

// The rows of an embedding that always have 8 bits (special, added and single-byte tokens) are
// counted into hot_rows: added to what was asked for (`fresh`), or the least that a plan file may
// say. A table of hot rows only becomes one of 8 bits.
void resolve_hot_rows(const std::filesystem::path& model, bool fresh, QuantPlan& plan);

// The planned form of the embedding, also of one that is tied to the head; nothing when the plan
// keeps it. Rounded to nearest without weights: every input of a lookup counts alike. Done before
// the blocks, so that calibration sees its error. Hot rows are the forced ones, then the most
// frequent tokens of the calibration text, then low ids (vocabularies are sorted by frequency).
[[nodiscard]] QuantizedBlock quantize_embedding(
    const Context& ctx,
    const PreparedRun& run,
    const CalibrationSet& calibration,
    const MethodOptions& options);

// The planned form of a head of its own, on second moments of what the final norm gives for the
// residual stream at the end of `state` (null: data-free).
[[nodiscard]] QuantizedBlock quantize_head(
    const Context& ctx,
    const PreparedRun& run,
    const CalibrationState* state,
    const MethodOptions& options);

}  // namespace quern
