// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace quern {

// Instruction sets that both the CPU and the operating system grant, read once at start.
struct CpuFeatures {
  bool avx2 = false;  // with FMA and F16C
  bool avx512 = false;  // F, BW, VL, DQ
  bool avx512_vnni = false;
  bool avx512_bf16 = false;
  bool amx_bf16 = false;  // advertised; the tiles still need a grant by the system
  bool amd = false;
  std::string name;  // the brand string, for people
};

[[nodiscard]] CpuFeatures detect_cpu();

}  // namespace quern
