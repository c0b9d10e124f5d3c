// SPDX-License-Identifier: Apache-2.0
#include "kernels/kernel_ops.h"

namespace quern {

void install_avx2(KernelOps& ops) {
  install_avx2_quant(ops);
}

}  // namespace quern
