// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"

#include <cstdint>
#include <vector>

namespace quern {

// Scratch memory that grows to what a forward pass needs and is then reused, so that hot loops do
// not allocate. One per engine; per-worker parts are indexed by the pool's worker number.
class Workspace {
 public:
  explicit Workspace(const Context& ctx) : workers_(static_cast<std::size_t>(ctx.pool.size())) {}

  // At least `count` floats for `worker`; valid until the next call for this worker and slot.
  float* worker_floats(int worker, std::size_t slot, std::int64_t count) {
    auto& buffers = workers_[static_cast<std::size_t>(worker)].floats;
    if (buffers.size() <= slot) {
      buffers.resize(slot + 1);
    }
    return grown(buffers[slot], count);
  }
  std::uint8_t* worker_bytes(int worker, std::int64_t count) {
    return grown(workers_[static_cast<std::size_t>(worker)].bytes, count);
  }

  // At least `count` floats that all workers see: for the thread that hands out chunks.
  float* shared_floats(std::int64_t count) { return grown(shared_, count); }

 private:
  struct Worker {
    std::vector<std::vector<float>> floats;
    std::vector<std::uint8_t> bytes;
  };
  template <class T>
  static T* grown(std::vector<T>& buffer, std::int64_t count) {
    if (buffer.size() < static_cast<std::size_t>(count)) {
      buffer.resize(static_cast<std::size_t>(count));
    }
    return buffer.data();
  }

  std::vector<Worker> workers_;
  std::vector<float> shared_;
};

}  // namespace quern
