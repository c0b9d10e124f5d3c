// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>

namespace quern {

// A result is put together in a directory beside its place and gets its name by one rename, when
// everything in it was written and read back.

// Throws UsageError when something stands at `output` and `force` does not allow to move it aside.
void refuse_occupied(const std::filesystem::path& output, bool force);

// Throws ResourceError when the file system of `staging` has less than `needed` bytes left.
void check_disk(std::uint64_t needed, const std::filesystem::path& staging);

// Renames `staging` to `output`, moving aside what stands there. Throws as refuse_occupied, and
// IoError.
void put_in_place(
    const std::filesystem::path& staging, const std::filesystem::path& output, bool force);

}  // namespace quern
