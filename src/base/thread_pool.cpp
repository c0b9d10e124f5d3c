// SPDX-License-Identifier: Apache-2.0
#include "base/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <string>

namespace quern {
namespace {

// True while this thread runs a chunk: a nested call then runs inline.
thread_local bool inside_chunk =
    false;  // NOLINT(cppcoreguidelines-avoid-non-const-global-variables)
thread_local int current_worker = 0;  // NOLINT(cppcoreguidelines-avoid-non-const-global-variables)

}  // namespace

ThreadPool::ThreadPool(int threads) {
  for (int worker = 1; worker < threads; ++worker) {
    workers_.emplace_back([this, worker] { run_worker(worker); });
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) {
    worker.join();
  }
}

void ThreadPool::for_chunks(std::int64_t count, std::int64_t chunk, const ChunkFunction& function) {
  chunk = std::max<std::int64_t>(chunk, 1);
  if (count <= 0) {
    return;
  }
  if (inside_chunk || workers_.empty() || count <= chunk) {
    const bool outer = !inside_chunk;
    const int worker = outer ? 0 : current_worker;
    for (std::int64_t begin = 0; begin < count; begin += chunk) {
      function(begin, std::min(begin + chunk, count), worker);
    }
    return;
  }
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return !active_; });  // another outer caller may be using the pool
  job_ = Job{&function, count, chunk, 0, 0, nullptr};
  active_ = true;
  ++generation_;
  wake_.notify_all();
  take_chunks(0, lock);
  done_.wait(lock, [this] { return job_.busy == 0; });
  const std::exception_ptr error = job_.error;
  active_ = false;
  lock.unlock();
  done_.notify_all();
  if (error) {
    std::rethrow_exception(error);
  }
}

void ThreadPool::take_chunks(int worker, std::unique_lock<std::mutex>& lock) {
  ++job_.busy;
  while (job_.next < job_.count) {
    const std::int64_t begin = job_.next;
    const std::int64_t end = std::min(begin + job_.chunk, job_.count);
    job_.next = end;
    const ChunkFunction& function = *job_.function;
    lock.unlock();
    std::exception_ptr error;
    inside_chunk = true;
    current_worker = worker;
    try {
      function(begin, end, worker);
    } catch (...) {
      error = std::current_exception();
    }
    inside_chunk = false;
    lock.lock();
    if (error) {
      if (!job_.error) {
        job_.error = error;
      }
      job_.next = job_.count;
    }
  }
  if (--job_.busy == 0) {
    done_.notify_all();
  }
}

void ThreadPool::run_worker(int worker) {
  std::unique_lock lock(mutex_);
  std::uint64_t seen = 0;
  while (true) {
    wake_.wait(lock, [&] { return stopping_ || (active_ && generation_ != seen); });
    if (stopping_) {
      return;
    }
    seen = generation_;
    take_chunks(worker, lock);
  }
}

int usable_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cpus = 1;
  if (::sched_getaffinity(0, sizeof(set), &set) == 0) {
    cpus = std::max(1, CPU_COUNT(&set));
  }
  // cgroup v2: "quota period" in microseconds, or "max period".
  std::ifstream limits("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (limits >> quota >> period && quota != "max" && period > 0) {
    char* end = nullptr;
    const double value = std::strtod(quota.c_str(), &end);
    if (end != quota.c_str() && value > 0) {
      cpus = std::clamp(static_cast<int>(std::ceil(value / period)), 1, cpus);
    }
  }
  return cpus;
}

}  // namespace quern
