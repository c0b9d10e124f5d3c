// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace quern {

// The one pool of the process, made by main and passed by Context. Work is cut into chunks that do
// not depend on the thread count; each chunk writes its own output, so results are the same bytes
// for any number of threads. Calls do not nest: an inner call runs inline.
class ThreadPool {
 public:
  // begin, end: the range of the chunk; worker: 0 … size()-1, an index for scratch memory.
  using ChunkFunction = std::function<void(std::int64_t begin, std::int64_t end, int worker)>;

  explicit ThreadPool(int threads);
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  [[nodiscard]] int size() const noexcept { return static_cast<int>(workers_.size()) + 1; }

  // Calls `function` for [0, chunk), [chunk, 2 chunk), … up to `count`, on all threads, and
  // returns when all are done. The first exception of a worker is rethrown here; chunks that had
  // not begun by then are dropped.
  void for_chunks(std::int64_t count, std::int64_t chunk, const ChunkFunction& function);

 private:
  struct Job {
    const ChunkFunction* function = nullptr;
    std::int64_t count = 0;
    std::int64_t chunk = 1;
    std::int64_t next = 0;  // first index not handed out yet; guarded by mutex_
    int busy = 0;  // threads inside the job; guarded by mutex_
    std::exception_ptr error;  // guarded by mutex_
  };

  void run_worker(int worker);
  void take_chunks(int worker, std::unique_lock<std::mutex>& lock);

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  Job job_;
  bool active_ = false;
  std::uint64_t generation_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> workers_;
};

// CPUs that this process may use: affinity mask and cgroup quota, at least 1.
[[nodiscard]] int usable_cpus();

}  // namespace quern
