// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>

namespace quern {

// "18GiB", "18G" (both 2^30), "512MiB", "1.5GB" (10^9), "4096" (bytes). Throws UsageError naming
// `option`.
[[nodiscard]] std::uint64_t parse_size(const std::string& text, const std::string& option);

[[nodiscard]] std::string human_bytes(double bytes);  // "3.2 GiB"
[[nodiscard]] std::string human_duration(double seconds);  // "1 h 52 min", "34 s"

}  // namespace quern
