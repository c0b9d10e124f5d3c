// SPDX-License-Identifier: Apache-2.0
#include "pipeline/run_paths.h"

#include "base/error.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

namespace quern {
namespace {

namespace fs = std::filesystem;

fs::path resolved(const fs::path& name, const char* option) {
  std::error_code code;
  fs::path path = fs::weakly_canonical(fs::absolute(name, code), code);
  if (!path.has_filename()) {
    path = path.parent_path();  // "out/" names the same directory as "out"
  }
  if (name.empty() || code || !path.has_filename()) {
    throw UsageError(
        "not a name for a directory",
        option + name.string(),
        code ? code.message() : "expected the name of a directory to make",
        "choose another directory");
  }
  return path;
}

// Whether `inner` is `outer` or below it.
bool is_within(const fs::path& inner, const fs::path& outer) {
  return std::mismatch(outer.begin(), outer.end(), inner.begin(), inner.end()).first == outer.end();
}

// Whether the descriptor still is what stands under the name.
bool is_same(int descriptor, const fs::path& directory) {
  struct stat opened {};
  struct stat named {};
  return ::fstat(descriptor, &opened) == 0 && ::stat(directory.c_str(), &named) == 0 &&
         opened.st_dev == named.st_dev && opened.st_ino == named.st_ino;
}

[[noreturn]] void throw_unusable(const fs::path& directory, const std::string& reason) {
  throw IoError(
      "cannot make the directory",
      directory.string(),
      reason,
      "check the path and its permissions",
      ErrorKind::kFailed);
}

}  // namespace

fs::path beside(fs::path name, const char* suffix) {
  name += suffix;
  return name;
}

RunPaths resolve_run_paths(const fs::path& output, const fs::path& work, const fs::path& source) {
  RunPaths paths;
  paths.output = resolved(output, "-o ");
  paths.staging = beside(paths.output, ".partial");
  paths.work = work.empty() ? beside(paths.output, ".run") : resolved(work, "--work-dir ");
  const auto refuse = [](const std::string& where, const std::string& reason) {
    throw UsageError(
        "a directory of the run is in the way", where, reason, "choose another directory");
  };
  if (fs::is_symlink(paths.output)) {
    refuse("-o " + output.string(), "it is a link to nothing");
  }
  const fs::path model = fs::weakly_canonical(fs::absolute(source));
  if (is_within(model, paths.output) || is_within(model, paths.staging)) {
    refuse("-o " + output.string(), "the model itself is there");
  }
  if (is_within(paths.work, paths.output) || is_within(paths.work, paths.staging)) {
    refuse(
        "--work-dir " + work.string(),
        "it is in the output, which appears only when it is complete");
  }
  return paths;
}

void prepare_side_output(
    const fs::path& file,
    const std::string& option,
    const std::vector<fs::path>& taken,
    bool (*is_ours)(const fs::path& file)) {
  const std::string where = option + " " + file.string();
  const fs::path place = fs::weakly_canonical(fs::absolute(file));
  for (const fs::path& directory : taken) {
    if (is_within(place, directory)) {
      throw UsageError(
          "a file of the run is in the way",
          where,
          "it is in the output, which appears only when it is complete",
          option + " of another directory");
    }
  }
  std::error_code code;
  if (fs::is_directory(place, code)) {
    throw UsageError(
        "a directory stands there", where, "expected the name of a file", option + " FILE");
  }
  if (fs::exists(place, code) && !is_ours(place)) {
    throw UsageError(
        "a file stands there that is something else",
        where,
        "it would be overwritten",
        "choose another name, or move it away");
  }
  fs::create_directories(place.parent_path(), code);
  if (code) {
    throw_unusable(place.parent_path(), code.message());
  }
}

DirectoryLock::DirectoryLock(fs::path directory) : directory_(std::move(directory)) {
  while (descriptor_ < 0) {
    std::error_code code;
    fs::create_directories(directory_, code);
    if (code) {
      throw_unusable(directory_, code.message());
    }
    descriptor_ = ::open(directory_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (descriptor_ < 0 && errno != ENOENT) {
      throw_unusable(directory_, std::error_code(errno, std::generic_category()).message());
    }
    // File systems without locks answer otherwise; a run there is on its own.
    if (descriptor_ >= 0 && ::flock(descriptor_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      ::close(std::exchange(descriptor_, -1));
      throw Error(
          ErrorKind::kFailed,
          "another run is at work here",
          directory_.string(),
          "a process of quern holds the directory",
          "wait for it, or choose another output and --work-dir");
    }
    if (descriptor_ >= 0 && !is_same(descriptor_, directory_)) {
      ::close(std::exchange(descriptor_, -1));  // its run ended in between and took it away
    }
  }
}

DirectoryLock::~DirectoryLock() {
  if (descriptor_ >= 0) {
    ::rmdir(directory_.c_str());  // does nothing unless it is empty
    ::close(descriptor_);
  }
}

}  // namespace quern
