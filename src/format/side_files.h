// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace quern {

struct SideFiles {
  struct Skipped {
    std::string name;
    std::string reason;
  };
  std::vector<std::string> copied;  // sorted names
  std::vector<Skipped> skipped;  // sorted by name
};

// Copies what belongs to a model besides weights and configuration: tokenizer, chat templates,
// generation and processor settings, licence and notices, and other small files. Not copied:
// weights in any container, config.json, index and quantization files (they are written anew), the
// README (it describes the source), code (a quantized checkpoint must load without running any),
// hidden files and folders. Each file appears under its name only when it is complete.
[[nodiscard]] SideFiles copy_side_files(
    const std::filesystem::path& source, const std::filesystem::path& target);

}  // namespace quern
