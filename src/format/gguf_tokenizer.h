// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "format/gguf_metadata.h"
#include "tensor/checkpoint.h"
#include "tokenizer/tokenizer.h"

#include <cstdint>
#include <filesystem>

namespace quern {

// The tokenizer in a GGUF file's metadata (conversion/base.py get_vocab_base of llama.cpp,
// src/llama-vocab.cpp): byte-level BPE with
//   tokenizer.ggml.model = "gpt2", .pre    the name of the split pattern
//   .tokens [vocab_size]  vocabulary text in the byte alphabet, added tokens as they are written;
//                         "[PAD<id>]" where no token has the id
//   .token_type           1 normal, 3 control, 4 user-defined, 5 unused
//   .merges               "left right", by rank
//   .bos_token_id … .add_bos_token, tokenizer.chat_template

// Appends these keys for the tokenizer of a model directory. `config` is config.json (special ids
// that the tokenizer's own files leave open), `vocab_size` the rows of the embedding. Throws what
// load_tokenizer throws, and UnsupportedError for tokenizers that GGUF readers would run
// differently: split patterns other than Qwen's, Llama 3's and GPT-2's, models with byte fallback,
// rank files without merges, more tokens than rows.
void add_gguf_tokenizer(
    GgufMetadata& metadata,
    const std::filesystem::path& directory,
    const Json& config,
    std::int64_t vocab_size);

// The tokenizer of a GGUF file. Throws ParseError for keys that are missing or do not fit together,
// UnsupportedError for other models and split patterns.
[[nodiscard]] Tokenizer tokenizer_from_gguf(const GgufMetadata& metadata);

// The tokenizer that belongs to a model: that inside of a .gguf file, else as load_tokenizer.
[[nodiscard]] Tokenizer open_tokenizer(const std::filesystem::path& path);
[[nodiscard]] Tokenizer open_tokenizer(const Checkpoint& checkpoint);

}  // namespace quern
