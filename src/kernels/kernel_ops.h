// SPDX-License-Identifier: Apache-2.0
#pragma once

// Plain pointers only: files built for one instruction set include this header, and must not bring
// inline functions of the standard library that the linker could keep for everyone.
#include "kernels/quant_columns.h"

#include <stdint.h>  // NOLINT(modernize-deprecated-headers)

namespace quern {

struct KernelOps {
// NOLINTBEGIN(bugprone-macro-parentheses): the name is declared here.
#define QUERN_OP(name, signature) \
  using name##_type = signature;  \
  name##_type* name = nullptr;
#include "kernels/ops.def"
// NOLINTEND(bugprone-macro-parentheses)
#undef QUERN_OP
};

// Each level replaces the entries it has a better version of. Only callable on a CPU with the
// level's instructions, except scalar.
void install_scalar(KernelOps& ops);
void install_avx2(KernelOps& ops);
void install_avx512(KernelOps& ops);

// The rounding kernels of a level, called by its install function.
void install_avx2_quant(KernelOps& ops);
void install_avx512_quant(KernelOps& ops);

}  // namespace quern
