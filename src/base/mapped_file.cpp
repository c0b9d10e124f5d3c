// SPDX-License-Identifier: Apache-2.0
#include "base/mapped_file.h"

#include "base/error.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <system_error>
#include <utility>

namespace quern {
namespace {

std::string system_reason(int code) {
  return std::error_code(code, std::generic_category()).message();
}

void advise(std::span<const std::byte> range, int advice) noexcept {
  if (range.empty()) {
    return;
  }
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(range.data()) / page * page;
  const auto end = reinterpret_cast<std::uintptr_t>(range.data() + range.size());
  ::madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) : path_(path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) {
    throw IoError(
        "cannot open the file",
        path.string(),
        system_reason(errno),
        "check the path and its permissions");
  }
  struct stat status {};
  const bool regular = ::fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode);
  if (!regular) {
    ::close(descriptor);
    throw IoError(
        "not a regular file",
        path.string(),
        "a checkpoint file is expected here",
        "check the path");
  }
  size_ = static_cast<std::size_t>(status.st_size);
  if (size_ > 0) {
    void* address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (address == MAP_FAILED) {
      const int code = errno;
      ::close(descriptor);
      throw IoError("cannot map the file", path.string(), system_reason(code), "check ulimit -v");
    }
    data_ = static_cast<const std::byte*>(address);
    ::madvise(address, size_, MADV_SEQUENTIAL);
  }
  ::close(descriptor);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  if (this != &other) {
    close();
    path_ = std::move(other.path_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
  }
  return *this;
}

MappedFile::~MappedFile() {
  close();
}

void MappedFile::close() noexcept {
  if (data_ != nullptr) {
    ::munmap(const_cast<std::byte*>(data_), size_);
    data_ = nullptr;
  }
}

// Pages shared with a neighbour go too, or those between small tensors would add up.
void MappedFile::release(std::span<const std::byte> range) const noexcept {
  advise(range, MADV_DONTNEED);
}

void prefetch_mapped(std::span<const std::byte> range) noexcept {
  advise(range, MADV_WILLNEED);
}

}  // namespace quern
