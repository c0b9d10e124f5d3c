// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "report/report.h"

#include <filesystem>

namespace quern {

// What the front matter of the source's README.md says of licence, library and languages: plain
// `key: value` lines and simple lists. Anything else is left out; a card is no reason to fail.
[[nodiscard]] CardSource read_card_source(const std::filesystem::path& directory);

}  // namespace quern
