// SPDX-License-Identifier: Apache-2.0
#include "base/cpu.h"
#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "quern/version.h"

#include <cstdio>

int main() {
  const quern::CpuFeatures cpu = quern::detect_cpu();
  const quern::KernelTable table = quern::make_kernel_table(cpu, "");
  const quern::Blas blas(cpu);
  std::printf("quern %s %s %s\n", quern::kVersion, table.isa.c_str(), blas.description().c_str());
  return 0;
}
