// SPDX-License-Identifier: Apache-2.0
#include "model/families.h"

namespace quern {

const std::vector<Family>& families() {
  // clang-format off
  static const std::vector<Family> kFamilies = {
      {"qwen3", "Qwen3", build_qwen3},
      {"qwen2", "Qwen2 and Qwen2.5", build_qwen2},
      {"qwen3_moe", "Qwen3-MoE", build_qwen3_moe},
      {"qwen2_moe", "Qwen2-MoE", build_qwen2_moe},
      {"llama", "Llama 2 and 3", build_llama},
      {"mistral", "Mistral", build_mistral},
  };
  // clang-format on
  return kFamilies;
}

}  // namespace quern
