// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "base/cpu.h"
#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "quant/method.h"
#include "quant/packed_linear.h"

#include <string>

namespace quern::testing {

// A context with its own pool; `isa` as in make_kernel_table.
class TestContext {
 public:
  explicit TestContext(int threads = 2, const std::string& isa = "")
      : kernels_(make_kernel_table(detect_cpu(), isa)), blas_(detect_cpu()), pool_(threads) {}

  [[nodiscard]] const Context& operator*() const { return context_; }

 private:
  KernelTable kernels_;
  Blas blas_;
  Log log_{{}};
  ThreadPool pool_;
  Context context_{pool_, kernels_, blas_, log_};
};

inline const PackedLinear& packed_of(const LinearResult& result) {
  return as_packed(*result.matrix, "result");
}

}  // namespace quern::testing
