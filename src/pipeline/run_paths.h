// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace quern {

// Where a run writes, absolute and without links, dots or slashes at the end.
struct RunPaths {
  std::filesystem::path output;
  std::filesystem::path staging;  // beside the output, of which it becomes the content
  std::filesystem::path work;
};

// `output` and `work` are as typed; `work` empty: beside the output. Throws UsageError for names
// that would put one of them, or the model at `source`, in another's way.
[[nodiscard]] RunPaths resolve_run_paths(
    const std::filesystem::path& output,
    const std::filesystem::path& work,
    const std::filesystem::path& source);

// What an option writes besides the output: a plan, a report, an importance matrix. Makes its
// directory. Throws UsageError when it is a directory, lies in one of `taken` (where a result
// appears only when it is complete), or when a file stands there that `is_ours` does not know as
// one of its kind: a slip of the hand must not cost a model.
void prepare_side_output(
    const std::filesystem::path& file,
    const std::string& option,
    const std::vector<std::filesystem::path>& taken,
    bool (*is_ours)(const std::filesystem::path& file));

// `name` with `suffix` put at its end.
[[nodiscard]] std::filesystem::path beside(std::filesystem::path name, const char* suffix);

// A directory that only one run at a time works in: made if need be and locked, so that two runs
// with the same output cannot mix their files. Removed at the end if it is empty then.
class DirectoryLock {
 public:
  // Throws Error(kFailed) when another process holds it or it cannot be made.
  explicit DirectoryLock(std::filesystem::path directory);
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;
  ~DirectoryLock();

 private:
  std::filesystem::path directory_;
  int descriptor_ = -1;
};

}  // namespace quern
