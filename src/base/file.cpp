// SPDX-License-Identifier: Apache-2.0
#include "base/file.h"

#include "base/error.h"
#include "base/mapped_file.h"

#include <fmt/format.h>
#include <openssl/evp.h>

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <fstream>
#include <system_error>
#include <utility>

namespace quern {
namespace {

[[noreturn]] void throw_write_error(const std::filesystem::path& path, int code) {
  const std::string reason = std::error_code(code, std::generic_category()).message();
  if (code == EFAULT) {
    // The bytes came straight from a mapped input, which somebody has cut short since.
    throw IoError(
        "an input file was cut short while it was read",
        path.string(),
        "pages of it are gone",
        "put the whole file back and run the same command again");
  }
  if (code == ENOSPC || code == EDQUOT || code == EFBIG) {
    throw ResourceError(
        "cannot write the file",
        path.string(),
        reason,
        "free some disk space and run the same command again: it resumes");
  }
  throw IoError(
      "cannot write the file",
      path.string(),
      reason,
      "check the directory and its permissions",
      ErrorKind::kFailed);
}

}  // namespace

std::string read_file(const std::filesystem::path& path, std::uint64_t limit) {
  std::error_code code;
  const auto size = std::filesystem::file_size(path, code);
  if (code) {
    throw IoError(
        "cannot read the file",
        path.string(),
        code.message(),
        "check the path and its permissions");
  }
  if (size > limit) {
    throw ParseError(
        "file too large",
        path.string(),
        fmt::format("at most {} bytes expected, found {}", limit, size),
        "check that this is the right file");
  }
  std::string text(size, '\0');
  std::ifstream stream(path, std::ios::binary);
  stream.read(text.data(), static_cast<std::streamsize>(size));
  if (!stream || stream.gcount() != static_cast<std::streamsize>(size)) {
    throw IoError("cannot read the file", path.string(), "the read ended early", "check the disk");
  }
  return text;
}

AtomicFile::AtomicFile(std::filesystem::path target)
    : target_(std::move(target)),
      partial_(target_.parent_path() / ("." + target_.filename().string() + ".partial")) {
  descriptor_ = ::open(partial_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor_ < 0) {
    throw_write_error(partial_, errno);
  }
}

AtomicFile::~AtomicFile() {
  if (descriptor_ >= 0) {
    ::close(descriptor_);
    ::unlink(partial_.c_str());
  }
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0) {
      if (errno == EINTR) {
        continue;
      }
      throw_write_error(partial_, errno);
    }
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
}

void AtomicFile::write(std::string_view text) {
  write(std::as_bytes(std::span(text.data(), text.size())));
}

void AtomicFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written =
        ::pwrite(descriptor_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (written < 0) {
      if (errno == EINTR) {
        continue;
      }
      throw_write_error(partial_, errno);
    }
    bytes = bytes.subspan(static_cast<std::size_t>(written));
    offset += static_cast<std::uint64_t>(written);
  }
}

void AtomicFile::reserve(std::uint64_t bytes) {
  while (bytes > 0 && ::fallocate(descriptor_, 0, 0, static_cast<off_t>(bytes)) != 0) {
    if (errno == EOPNOTSUPP || errno == ENOSYS) {
      return;
    }
    if (errno != EINTR) {
      throw_write_error(partial_, errno);
    }
  }
}

void AtomicFile::commit() {
  if (::fsync(descriptor_) != 0) {
    throw_write_error(partial_, errno);
  }
  ::close(std::exchange(descriptor_, -1));
  if (::rename(partial_.c_str(), target_.c_str()) != 0) {
    const int code = errno;
    ::unlink(partial_.c_str());
    throw_write_error(target_, code);
  }
  sync_directory(target_.parent_path());
}

void write_file(const std::filesystem::path& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

void sync_directory(const std::filesystem::path& directory) {
  const std::filesystem::path name = directory.empty() ? std::filesystem::path(".") : directory;
  const int descriptor = ::open(name.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor >= 0) {
    ::fsync(descriptor);
    ::close(descriptor);
  }
}

Sha256::Sha256() : state_(EVP_MD_CTX_new()) {
  if (state_ == nullptr ||
      EVP_DigestInit_ex(static_cast<EVP_MD_CTX*>(state_), EVP_sha256(), nullptr) != 1) {
    EVP_MD_CTX_free(static_cast<EVP_MD_CTX*>(state_));
    throw Error(
        ErrorKind::kFailed,
        "SHA-256 is not available",
        "",
        "the crypto library refused it",
        "check the system's OpenSSL settings");
  }
}

Sha256::~Sha256() {
  EVP_MD_CTX_free(static_cast<EVP_MD_CTX*>(state_));
}

void Sha256::update(std::span<const std::byte> bytes) {
  EVP_DigestUpdate(static_cast<EVP_MD_CTX*>(state_), bytes.data(), bytes.size());
}

void Sha256::update(std::string_view text) {
  update(std::as_bytes(std::span(text.data(), text.size())));
}

std::string Sha256::hex() {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int length = 0;
  EVP_DigestFinal_ex(static_cast<EVP_MD_CTX*>(state_), digest.data(), &length);
  std::string text;
  for (unsigned int i = 0; i < length; ++i) {
    text += fmt::format("{:02x}", digest[i]);
  }
  return text;
}

std::string sha256_of_file(const std::filesystem::path& path) {
  const MappedFile file(path);
  Sha256 hash;
  hash.update(file.bytes());
  file.release(file.bytes());
  return hash.hex();
}

}  // namespace quern
