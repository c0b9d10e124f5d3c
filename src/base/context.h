// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/log.h"
#include "base/thread_pool.h"

#include <atomic>
#include <cstdint>

namespace quern {

struct KernelTable;
class Blas;

// What every operation of the library needs from its caller; made once by main (or a test), passed
// by reference, never global.
struct Context {
  ThreadPool& pool;
  const KernelTable& kernels;
  const Blas& blas;
  Log& log;
  std::uint64_t memory_budget = 0;  // bytes of anonymous memory; 0: no limit asked
  std::uint64_t seed = 0;
  const std::atomic<int>* interrupts = nullptr;  // SIGINTs so far; null: none can come

  [[nodiscard]] bool interrupted() const noexcept {
    return interrupts != nullptr && interrupts->load(std::memory_order_relaxed) > 0;
  }
};

}  // namespace quern
