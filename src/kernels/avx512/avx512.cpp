// SPDX-License-Identifier: Apache-2.0
#include "kernels/kernel_ops.h"

namespace quern {

void install_avx512(KernelOps& ops) {
  install_avx512_quant(ops);
}

}  // namespace quern
