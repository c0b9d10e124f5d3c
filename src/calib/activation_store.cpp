// SPDX-License-Identifier: Apache-2.0
#include "calib/activation_store.h"

#include "base/error.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <numeric>
#include <system_error>
#include <utility>

namespace quern {
namespace {

[[noreturn]] void throw_spill_error(int code) {
  throw ResourceError(
      "cannot spill activations to disk",
      "",
      std::error_code(code, std::generic_category()).message(),
      "free disk space, choose another --work-dir, or use fewer --samples");
}

}  // namespace

std::uint64_t ActivationStore::bytes(std::int64_t width, const std::vector<std::int64_t>& rows) {
  return static_cast<std::uint64_t>(std::accumulate(rows.begin(), rows.end(), std::int64_t{0})) *
         static_cast<std::uint64_t>(width) * sizeof(float);
}

ActivationStore::ActivationStore(
    std::int64_t width,
    std::vector<std::int64_t> rows,
    const std::filesystem::path& spill_directory)
    : width_(width), rows_(std::move(rows)) {
  std::int64_t total = 0;
  for (const std::int64_t n : rows_) {
    offsets_.push_back(total);
    total += n * width_;
  }
  if (spill_directory.empty()) {
    memory_.resize(static_cast<std::size_t>(total));
    return;
  }
  descriptor_ = ::open(spill_directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (descriptor_ < 0) {
    throw_spill_error(errno);
  }
  const int code = ::posix_fallocate(
      descriptor_, 0, std::max<off_t>(1, total * static_cast<off_t>(sizeof(float))));
  if (code != 0) {
    ::close(descriptor_);
    throw_spill_error(code);
  }
}

ActivationStore::ActivationStore(ActivationStore&& other) noexcept
    : width_(other.width_),
      rows_(std::move(other.rows_)),
      offsets_(std::move(other.offsets_)),
      memory_(std::move(other.memory_)),
      descriptor_(std::exchange(other.descriptor_, -1)) {}

ActivationStore& ActivationStore::operator=(ActivationStore&& other) noexcept {
  std::swap(width_, other.width_);
  std::swap(rows_, other.rows_);
  std::swap(offsets_, other.offsets_);
  std::swap(memory_, other.memory_);
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

ActivationStore::~ActivationStore() {
  if (descriptor_ >= 0) {
    ::close(descriptor_);
  }
}

void ActivationStore::read(std::int64_t index, float* values) const {
  const std::int64_t offset = offsets_[static_cast<std::size_t>(index)];
  if (descriptor_ < 0) {
    std::copy_n(memory_.data() + offset, size(index), values);
    return;
  }
  auto* target = reinterpret_cast<char*>(values);
  auto left = static_cast<std::size_t>(size(index)) * sizeof(float);
  auto at = static_cast<off_t>(offset) * static_cast<off_t>(sizeof(float));
  while (left > 0) {
    const ssize_t n = ::pread(descriptor_, target, left, at);
    if (n < 0 && errno == EINTR) {
      continue;
    }
    if (n <= 0) {
      throw_spill_error(n < 0 ? errno : EIO);
    }
    target += n;
    at += n;
    left -= static_cast<std::size_t>(n);
  }
}

void ActivationStore::write(std::int64_t index, const float* values) {
  const std::int64_t offset = offsets_[static_cast<std::size_t>(index)];
  if (descriptor_ < 0) {
    std::copy_n(values, size(index), memory_.data() + offset);
    return;
  }
  const auto* source = reinterpret_cast<const char*>(values);
  auto left = static_cast<std::size_t>(size(index)) * sizeof(float);
  auto at = static_cast<off_t>(offset) * static_cast<off_t>(sizeof(float));
  while (left > 0) {
    const ssize_t n = ::pwrite(descriptor_, source, left, at);
    if (n < 0 && errno == EINTR) {
      continue;
    }
    if (n < 0) {
      throw_spill_error(errno);
    }
    source += n;
    at += n;
    left -= static_cast<std::size_t>(n);
  }
}

}  // namespace quern
