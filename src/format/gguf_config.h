// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "format/gguf_file.h"
#include "model/graph.h"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// The architecture under which GGUF readers run a model: "qwen2", "qwen3", "qwen3moe", "qwen3next",
// "qwen35", "qwen35moe" or "llama" (Llama and Mistral). Throws UnsupportedError for what such a
// reader would compute differently: other families, attention windows, biases that the architecture
// has no place for.
[[nodiscard]] std::string gguf_architecture(const ModelGraph& graph);

// The metadata of a model without its tokenizer, as llama.cpp's conversion scripts write it
// (conversion/base.py set_gguf_parameters): general.*, ARCHITECTURE.*. `config` is config.json,
// `graph` what was built from it, `name` general.name, `file_type` the label general.file_type
// (gguf_file_type). Throws as gguf_architecture, and UnsupportedError for a scaling of positions
// that GGUF readers compute otherwise.
[[nodiscard]] GgufMetadata gguf_metadata(
    const Json& config, const ModelGraph& graph, const std::string& name, std::uint32_t file_type);

// The number of a label such as "Q4_K_M" or "BF16" (LLAMA_FTYPE of llama.h).
[[nodiscard]] std::optional<std::uint32_t> gguf_file_type(std::string_view label) noexcept;

// The values of the tensor kRopeFactorsName: empty when the file needs none.
[[nodiscard]] std::vector<float> gguf_rope_factors(const Json& config, const ModelGraph& graph);

// The layers of the decoder; draft layers stand behind them as further blocks.
[[nodiscard]] std::int64_t gguf_layers(const GgufFile& file);

// What config.json of the same model would say, from which build_graph() makes its graph. Throws
// ParseError for missing or impossible keys, UnsupportedError for architectures and keys that quern
// does not compute.
[[nodiscard]] Json config_from_gguf(const GgufFile& file);

}  // namespace quern
