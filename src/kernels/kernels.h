// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/cpu.h"
#include "kernels/kernel_ops.h"

#include <string>
#include <vector>

namespace quern {

// The operations of ops.def for one CPU, chosen once at start and passed by Context.
struct KernelTable : KernelOps {
  std::string isa;  // the level: "scalar", "avx2", "avx512"

  // Which level each operation came from, in the order of ops.def, for `quern info`.
  struct Choice {
    std::string operation;
    std::string level;
    std::string refused;  // why no higher level was taken; empty when the highest one was
  };
  std::vector<Choice> choices;
};

// The table for this CPU. `isa` is empty (the best level), or forces "scalar", "avx2" or "avx512";
// throws UsageError when the CPU does not have the forced one or the name is unknown.
[[nodiscard]] KernelTable make_kernel_table(const CpuFeatures& cpu, const std::string& isa);

}  // namespace quern
