// SPDX-License-Identifier: Apache-2.0
#include "pipeline/staging.h"

#include "base/error.h"
#include "base/file.h"
#include "base/units.h"
#include "pipeline/run_paths.h"

#include <fmt/format.h>

#include <system_error>

namespace quern {
namespace {

namespace fs = std::filesystem;

bool is_occupied(const fs::path& output) {
  std::error_code code;
  return fs::exists(output, code) &&
         !(fs::is_directory(output, code) && fs::is_empty(output, code));
}

void move_aside(const fs::path& output) {
  for (int i = 1;; ++i) {
    const fs::path name = beside(output, fmt::format(".old-{}", i).c_str());
    if (!fs::exists(name)) {
      fs::rename(output, name);
      return;
    }
  }
}

}  // namespace

void refuse_occupied(const fs::path& output, bool force) {
  if (is_occupied(output) && !force) {
    throw UsageError(
        "the output is not empty",
        "-o " + output.string(),
        "it holds something else than this run's own result",
        "choose another directory, or --force to move it aside");
  }
}

void check_disk(std::uint64_t needed, const fs::path& staging) {
  std::error_code code;
  const auto space = fs::space(staging, code);
  if (!code && space.available < needed) {
    throw ResourceError(
        "not enough disk space for the result",
        staging.parent_path().string(),
        fmt::format(
            "{} needed, {} free",
            human_bytes(static_cast<double>(needed)),
            human_bytes(static_cast<double>(space.available))),
        "free some space and run the same command again, or choose another output");
  }
}

void put_in_place(const fs::path& staging, const fs::path& output, bool force) {
  refuse_occupied(output, force);
  if (is_occupied(output)) {
    move_aside(output);
  }
  std::error_code code;
  fs::rename(staging, output, code);
  if (code) {
    throw IoError(
        "cannot put the result in place",
        output.string(),
        code.message(),
        "the result is in " + staging.string(),
        ErrorKind::kFailed);
  }
  sync_directory(output.parent_path());
}

}  // namespace quern
