// SPDX-License-Identifier: Apache-2.0
#include "calib/calibration_set.h"

// The file itself becomes part of the program, so that an installed binary needs nothing beside it.
__asm__(
    ".section .rodata\n"
    ".global quern_default_mix_begin\n"
    ".hidden quern_default_mix_begin\n"
    "quern_default_mix_begin:\n"
    ".incbin \"" QUERN_DEFAULT_MIX
    "\"\n"
    ".global quern_default_mix_end\n"
    ".hidden quern_default_mix_end\n"
    "quern_default_mix_end:\n"
    ".previous\n");

extern "C" {
extern const char quern_default_mix_begin[];  // NOLINT(readability-identifier-naming)
extern const char quern_default_mix_end[];  // NOLINT(readability-identifier-naming)
}

namespace quern {

std::string_view default_calibration_jsonl() {
  return {
      quern_default_mix_begin,
      static_cast<std::size_t>(quern_default_mix_end - quern_default_mix_begin)};
}

}  // namespace quern
