// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

namespace quern {

// A YAML 1.2 scalar that every YAML 1.1 reader also takes as this text: plain where that is
// certain, else in double quotes with JSON's escapes.
[[nodiscard]] std::string yaml_scalar(std::string_view text);

}  // namespace quern
