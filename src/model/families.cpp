// SPDX-License-Identifier: Apache-2.0
#include "model/families.h"

namespace quern {

const std::vector<Family>& families() {
  // clang-format off
  static const std::vector<Family> kFamilies = {
      {"qwen3", "Qwen3", build_qwen3},
      {"qwen2", "Qwen2 and Qwen2.5", build_qwen2},
      {"qwen3_moe", "Qwen3-MoE", build_qwen3_moe},
      {"qwen3_next", "Qwen3-Next", build_qwen3_next},
      {"qwen3_5", "Qwen3.5, 3.6 and 3.8", build_qwen3_5},
      {"qwen3_5_text", "Qwen3.5 without its vision tower", build_qwen3_5},
      {"qwen3_5_moe", "Qwen3.5-MoE, 3.6 and 3.8", build_qwen3_5_moe},
      {"qwen3_5_moe_text", "Qwen3.5-MoE without its vision tower", build_qwen3_5_moe},
      {"qwen2_moe", "Qwen2-MoE", build_qwen2_moe},
      {"llama", "Llama 2 and 3", build_llama},
      {"mistral", "Mistral", build_mistral},
  };
  // clang-format on
  return kFamilies;
}

}  // namespace quern
