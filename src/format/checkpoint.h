// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tensor/checkpoint.h"

#include <filesystem>
#include <memory>

namespace quern {

// Opens a model on disk: a directory with config.json and weights in a format of formats.cpp,
// one .safetensors file with config.json beside it, or a .gguf file. Throws quern::Error saying
// what is missing, broken or not supported.
[[nodiscard]] std::unique_ptr<Checkpoint> open_checkpoint(const std::filesystem::path& path);

}  // namespace quern
