// SPDX-License-Identifier: Apache-2.0
#include "kernels/kernels.h"

#include "base/error.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

namespace quern {
namespace {

struct Level {
  const char* name;
  void (*install)(KernelOps& ops);
  const char* needs;
  bool present;
};

struct NamedEntry {
  const char* name;
  void (*entry)();
};

// The entries of a table as comparable pointers, in the order of ops.def.
std::vector<NamedEntry> entries(const KernelOps& ops) {
  return {
#define QUERN_OP(name, signature) {#name, reinterpret_cast<void (*)()>(ops.name)},
#include "kernels/ops.def"
#undef QUERN_OP
  };
}

}  // namespace

KernelTable make_kernel_table(const CpuFeatures& cpu, const std::string& isa) {
  const std::array<Level, 3> levels = {{
      {"scalar", install_scalar, "nothing", true},
      {"avx2", install_avx2, "AVX2, FMA and F16C", cpu.avx2},
      {"avx512", install_avx512, "AVX-512 F, BW, VL and DQ", cpu.avx512},
  }};
  KernelTable table;
  const auto forced = std::find_if(
      levels.begin(), levels.end(), [&](const Level& level) { return isa == level.name; });
  if (!isa.empty() && forced == levels.end()) {
    throw UsageError(
        "unknown instruction set",
        "--isa " + isa,
        "expected scalar, avx2 or avx512",
        "quern info lists what this CPU has");
  }
  std::string stop_reason;
  for (const Level& level : levels) {
    if (!level.present) {
      stop_reason = fmt::format("{}: this CPU lacks {}", level.name, level.needs);
      if (forced != levels.end()) {
        throw UsageError(
            "this CPU does not have the instruction set",
            "--isa " + isa,
            fmt::format("it lacks {}", level.needs),
            fmt::format("--isa {}", table.isa));
      }
      break;
    }
    const std::vector<NamedEntry> before = entries(table);
    level.install(table);
    table.isa = level.name;
    const std::vector<NamedEntry> after = entries(table);
    table.choices.resize(after.size());
    for (std::size_t i = 0; i < after.size(); ++i) {
      KernelTable::Choice& choice = table.choices[i];
      if (before[i].entry != after[i].entry) {
        choice = {after[i].name, level.name, ""};
      } else {
        choice.refused = fmt::format("{}: has no version of its own", level.name);
      }
    }
    if (isa == level.name) {
      stop_reason = fmt::format("--isa {}", isa);
      break;
    }
  }
  if (!stop_reason.empty()) {
    for (KernelTable::Choice& choice : table.choices) {
      choice.refused += (choice.refused.empty() ? "" : "; ") + stop_reason;
    }
  }
  return table;
}

}  // namespace quern
