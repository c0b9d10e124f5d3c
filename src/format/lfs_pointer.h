// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace quern {

// Throws ParseError when the bytes are the pointer that Git LFS leaves in place of a file.
void refuse_lfs_pointer(std::span<const std::byte> file, const std::string& where);

}  // namespace quern
