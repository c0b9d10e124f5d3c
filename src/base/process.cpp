// SPDX-License-Identifier: Apache-2.0
#include "base/process.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <sstream>
#include <string>

namespace quern {
namespace {

double seconds_of(const struct timeval& time) {
  return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
}

}  // namespace

ProcessUsage process_usage() {
  ProcessUsage usage;
  struct rusage times {};
  if (::getrusage(RUSAGE_SELF, &times) == 0) {
    usage.cpu_seconds = seconds_of(times.ru_utime) + seconds_of(times.ru_stime);
    usage.peak_rss_bytes = static_cast<std::uint64_t>(times.ru_maxrss) * 1024;
  }
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("RssAnon:")) {
      std::istringstream fields(line.substr(8));
      std::uint64_t kilobytes = 0;
      fields >> kilobytes;
      usage.anonymous_bytes = kilobytes * 1024;
    }
  }
  // The system keeps no high-water mark of anonymous memory alone; the progress line samples it.
  static std::atomic<std::uint64_t> peak = 0;
  std::uint64_t seen = peak.load();
  while (seen < usage.anonymous_bytes && !peak.compare_exchange_weak(seen, usage.anonymous_bytes)) {
  }
  usage.peak_anonymous_bytes = peak.load();
  return usage;
}

std::uint64_t memory_limit() {
  auto limit = static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) *
               static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  std::ifstream group("/sys/fs/cgroup/memory.max");
  std::uint64_t bytes = 0;
  if (group >> bytes && bytes > 0) {
    limit = std::min(limit, bytes);
  }
  struct rlimit address_space {};
  if (::getrlimit(RLIMIT_AS, &address_space) == 0 && address_space.rlim_cur != RLIM_INFINITY) {
    limit = std::min<std::uint64_t>(limit, address_space.rlim_cur);
  }
  return limit;
}

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace quern
