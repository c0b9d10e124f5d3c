// SPDX-License-Identifier: Apache-2.0
#include "nn/activation_store.h"

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
      "free disk space, choose another --work-dir, or use fewer or shorter sequences");
}

}  // namespace

std::uint64_t ActivationStore::bytes(
    std::int64_t width, const std::vector<std::int64_t>& rows, DType dtype) {
  return static_cast<std::uint64_t>(std::accumulate(rows.begin(), rows.end(), std::int64_t{0})) *
         static_cast<std::uint64_t>(width) * dtype_size(dtype);
}

ActivationStore::ActivationStore(
    std::int64_t width,
    std::vector<std::int64_t> rows,
    const std::filesystem::path& spill_directory,
    DType dtype)
    : width_(width), rows_(std::move(rows)), dtype_(dtype) {
  std::size_t total = 0;
  for (std::int64_t i = 0; i < count(); ++i) {
    offsets_.push_back(total);
    total += size(i) * dtype_size(dtype_);
  }
  if (spill_directory.empty()) {
    memory_.resize(total);
    return;
  }
  descriptor_ = ::open(spill_directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (descriptor_ < 0) {
    throw_spill_error(errno);
  }
  const int code = ::posix_fallocate(descriptor_, 0, std::max<off_t>(1, static_cast<off_t>(total)));
  if (code != 0) {
    ::close(descriptor_);
    throw_spill_error(code);
  }
}

ActivationStore::ActivationStore(ActivationStore&& other) noexcept
    : width_(other.width_),
      rows_(std::move(other.rows_)),
      dtype_(other.dtype_),
      offsets_(std::move(other.offsets_)),
      memory_(std::move(other.memory_)),
      descriptor_(std::exchange(other.descriptor_, -1)) {}

ActivationStore& ActivationStore::operator=(ActivationStore&& other) noexcept {
  std::swap(width_, other.width_);
  std::swap(rows_, other.rows_);
  std::swap(dtype_, other.dtype_);
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
  const std::span<float> target(values, size(index));
  if (dtype_ == DType::kF32) {
    read_bytes(index, std::as_writable_bytes(target));
    return;
  }
  std::vector<std::byte> bytes(size(index) * dtype_size(dtype_));
  read_bytes(index, bytes);
  to_float({dtype_, {rows(index), width_}, bytes}, target);
}

float* ActivationStore::in_place(std::int64_t index) {
  if (descriptor_ >= 0 || dtype_ != DType::kF32) {
    return nullptr;
  }
  return reinterpret_cast<float*>(memory_.data() + offsets_[static_cast<std::size_t>(index)]);
}

float* ActivationStore::values(std::int64_t index, std::vector<float>& buffer) {
  if (float* place = in_place(index); place != nullptr) {
    return place;
  }
  buffer.resize(size(index));
  read(index, buffer.data());
  return buffer.data();
}

void ActivationStore::write(std::int64_t index, const float* values) {
  if (values == in_place(index)) {
    return;
  }
  const std::span<const float> source(values, size(index));
  if (dtype_ == DType::kF32) {
    write_bytes(index, std::as_bytes(source));
    return;
  }
  write_bytes(index, from_float(source, dtype_));
}

void ActivationStore::read_bytes(std::int64_t index, std::span<std::byte> bytes) const {
  const std::size_t offset = offsets_[static_cast<std::size_t>(index)];
  if (descriptor_ < 0) {
    std::copy_n(memory_.data() + offset, bytes.size(), bytes.data());
    return;
  }
  auto at = static_cast<off_t>(offset);
  while (!bytes.empty()) {
    const ssize_t n = ::pread(descriptor_, bytes.data(), bytes.size(), at);
    if (n < 0 && errno == EINTR) {
      continue;
    }
    if (n <= 0) {
      throw_spill_error(n < 0 ? errno : EIO);
    }
    at += n;
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
}

void ActivationStore::write_bytes(std::int64_t index, std::span<const std::byte> bytes) {
  const std::size_t offset = offsets_[static_cast<std::size_t>(index)];
  if (descriptor_ < 0) {
    std::copy_n(bytes.data(), bytes.size(), memory_.data() + offset);
    return;
  }
  auto at = static_cast<off_t>(offset);
  while (!bytes.empty()) {
    const ssize_t n = ::pwrite(descriptor_, bytes.data(), bytes.size(), at);
    if (n < 0 && errno == EINTR) {
      continue;
    }
    if (n < 0) {
      throw_spill_error(errno);
    }
    at += n;
    bytes = bytes.subspan(static_cast<std::size_t>(n));
  }
}

}  // namespace quern
