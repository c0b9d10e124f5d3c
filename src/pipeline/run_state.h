// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "pipeline/block_quantizer.h"
#include "pipeline/parts.h"
#include "pipeline/run_paths.h"

#include <filesystem>
#include <optional>
#include <vector>

namespace quern {

// The work directory of a run: what a killed run needs to go on and end in the same bytes.
//
//   state.json               the fingerprint: everything that decides the result
//   layers/PART.safetensors  the rounded linears of a part and their reports; appears by rename
//                            when it is done
class RunState {
 public:
  // Opens or makes `directory`. With `resume` an earlier state of the same fingerprint is kept;
  // one of another fingerprint throws UsageError that lists what changed. Without, it is removed.
  // A directory that holds anything else is refused. Locked until the end of the run.
  RunState(std::filesystem::path directory, const Json& fingerprint, bool resume);

  // A saved part (parts.h), or nothing. A file that is broken or does not fit the plan counts as
  // nothing.
  [[nodiscard]] std::optional<QuantizedBlock> load(
      const std::string& part, const QuantPlan& plan) const;
  void save(const std::string& part, const QuantizedBlock& done) const;

  [[nodiscard]] const std::filesystem::path& directory() const noexcept { return directory_; }
  // Whether a part is there and whole, without reading its values.
  [[nodiscard]] bool holds(const std::string& part) const;
  [[nodiscard]] int parts_saved() const;
  // Whether an earlier run left its state in `directory`.
  [[nodiscard]] static bool is_started(const std::filesystem::path& directory);
  // Deletes what is in the directory; the result is safe elsewhere.
  void remove() const;
  // The same for what a run of this fingerprint left when it was killed after its result was in
  // place. Anything else, also a directory that a run works in, is left alone.
  static void remove_leftover(const std::filesystem::path& directory, const Json& fingerprint);

 private:
  [[nodiscard]] std::filesystem::path part_path(const std::string& part) const;

  std::filesystem::path directory_;
  DirectoryLock lock_;
};

[[nodiscard]] Json report_json(const QuantizedLinear& linear);

}  // namespace quern
