// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace quern {

// The importance of a weight tensor's columns: for each of its matrices (experts; one elsewhere)
// the sum over tokens of the squared inputs, and the number of tokens.
struct ImatrixEntry {
  std::vector<float> sums;  // [matrices][in]
  std::vector<float> counts;  // [matrices]

  [[nodiscard]] std::int64_t matrices() const noexcept {
    return static_cast<std::int64_t>(counts.size());
  }
  // [matrices][in] mean squares, sums / counts; ones for a matrix that saw no token.
  [[nodiscard]] std::vector<float> importance() const;
};

// What llama.cpp's imatrix tool collects (tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp).
struct Imatrix {
  std::map<std::string, ImatrixEntry> entries;  // by ggml tensor name: "blk.0.attn_q.weight"
  std::vector<std::string> datasets;
  std::int64_t chunks = 0;
  std::int64_t chunk_size = 0;  // tokens; 0 when the file does not say
};

// Both forms of the file, told apart by their first bytes:
//   GGUF    general.type "imatrix", imatrix.datasets, .chunk_count, .chunk_size; for each weight
//   two
//           F32 tensors NAME.in_sum2 [matrices, in] and NAME.counts [matrices, 1]
//   legacy  i32 entries; each: i32 length, name, i32 calls, i32 n, f32[n] of mean square * calls;
//           then, in newer files, i32 chunks, i32 length, name of the data set
// The matrices of experts are not told apart in the legacy form: an entry is one matrix of n
// columns. A pure function of untrusted bytes; throws ParseError (negative or infinite numbers
// included) and UnsupportedError for a GGUF file that is no importance matrix.
[[nodiscard]] Imatrix parse_imatrix(std::span<const std::byte> file, const std::string& where);
[[nodiscard]] Imatrix read_imatrix(const std::filesystem::path& path);

// Writes the GGUF form, entries in the order of their names. std::logic_error for an entry without
// matrices or of unequal ones, or a name too long for GGUF.
void write_imatrix(const std::filesystem::path& path, const Imatrix& imatrix);

}  // namespace quern
