// SPDX-License-Identifier: Apache-2.0
#include "format/formats.h"

#include <array>

namespace quern {

std::span<const CheckpointFormat> checkpoint_formats() noexcept {
  static constexpr std::array<CheckpointFormat, 6> kFormats = {{
      {"dense", is_dense, open_dense},
      {"gptq", is_gptq, open_gptq},
      {"awq", is_awq, open_awq},
      {"compressed-tensors", is_compressed_tensors, open_compressed_tensors},
      {"fp8", is_fp8, open_fp8},
      {"quern", is_quern, open_quern},
  }};
  return kFormats;
}

}  // namespace quern
