// SPDX-License-Identifier: Apache-2.0
#include "format/formats.h"

#include <array>

namespace quern {

std::span<const CheckpointFormat> checkpoint_formats() noexcept {
  static constexpr std::array<CheckpointFormat, 2> kFormats = {{
      {"dense", is_dense, open_dense},
      {"gptq", is_gptq, open_gptq},
  }};
  return kFormats;
}

}  // namespace quern
