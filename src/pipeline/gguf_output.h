// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "pipeline/output.h"

#include <filesystem>

namespace quern {

// Writes run.gguf, the rounded matrices as `parts` has them, all else from the source.
void write_gguf_output(
    const PreparedRun& run, const PartSource& parts, const std::filesystem::path& file);

}  // namespace quern
