// SPDX-License-Identifier: Apache-2.0
#include "format/lfs_pointer.h"

#include "base/error.h"

#include <fmt/format.h>

#include <string_view>

namespace quern {

void refuse_lfs_pointer(std::span<const std::byte> file, const std::string& where) {
  constexpr std::string_view kPointer = "version https://git-lfs";
  const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
  if (text.substr(0, kPointer.size()) == kPointer) {
    throw ParseError(
        "a Git LFS pointer stands where the weights should be",
        where,
        fmt::format("expected weights, found {} bytes of pointer text", file.size()),
        "run `git lfs pull` in the directory of the model");
  }
}

}  // namespace quern
