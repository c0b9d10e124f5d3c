// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace quern {

// What this process has used so far, from the operating system.
struct ProcessUsage {
  double cpu_seconds = 0;  // user + system, all threads
  std::uint64_t peak_rss_bytes = 0;  // high-water mark, mapped file pages included
  std::uint64_t anonymous_bytes = 0;  // anonymous memory now
  std::uint64_t peak_anonymous_bytes = 0;  // the highest that any call of process_usage() saw
};
[[nodiscard]] ProcessUsage process_usage();

// Memory that this process may use: the smallest of physical memory, cgroup limit and RLIMIT_AS.
[[nodiscard]] std::uint64_t memory_limit();

// Seconds of a steady clock.
[[nodiscard]] double steady_seconds();

}  // namespace quern
