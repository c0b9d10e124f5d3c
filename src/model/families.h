// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "model/graph.h"

namespace quern {

// Defined one per family file; listed in families.cpp.
[[nodiscard]] ModelGraph build_llama(const JsonReader& config);
[[nodiscard]] ModelGraph build_mistral(const JsonReader& config);
[[nodiscard]] ModelGraph build_qwen2(const JsonReader& config);
[[nodiscard]] ModelGraph build_qwen2_moe(const JsonReader& config);
[[nodiscard]] ModelGraph build_qwen3(const JsonReader& config);
[[nodiscard]] ModelGraph build_qwen3_5(const JsonReader& config);
[[nodiscard]] ModelGraph build_qwen3_5_moe(const JsonReader& config);
[[nodiscard]] ModelGraph build_qwen3_next(const JsonReader& config);
[[nodiscard]] ModelGraph build_qwen3_moe(const JsonReader& config);

}  // namespace quern
