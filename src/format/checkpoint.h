// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tensor/checkpoint.h"

#include <filesystem>
#include <memory>

namespace quern {

// What quern calls a GGUF file that it writes into a directory.
inline constexpr const char* kGgufInDirectory = "model.gguf";

// Opens a model on disk: a directory with config.json and weights in a format of formats.cpp,
// one .safetensors file with config.json beside it, a .gguf file, or a directory with
// kGgufInDirectory and no config.json. Throws quern::Error saying
// what is missing, broken or not supported.
[[nodiscard]] std::unique_ptr<Checkpoint> open_checkpoint(const std::filesystem::path& path);

}  // namespace quern
