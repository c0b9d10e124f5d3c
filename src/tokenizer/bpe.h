// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tokenizer/vocabulary.h"

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

inline constexpr std::size_t kMaxMerges = std::size_t{1} << 23U;

// (left id, right id) -> (rank, id of the joined token). Open addressing on one flat array: the
// look-up is the inner loop of encoding.
class MergeTable {
 public:
  struct Merge {
    std::uint64_t pair = kNoPair;
    std::uint32_t rank = 0;
    std::int32_t id = -1;
  };

  // A pair that is set again takes the later rank, as in the `tokenizers` library.
  void set(std::int32_t left, std::int32_t right, std::uint32_t rank, std::int32_t id);
  [[nodiscard]] const Merge* find(std::int32_t left, std::int32_t right) const noexcept;
  [[nodiscard]] std::size_t count() const noexcept { return count_; }
  // All merges, by rank.
  struct Pair {
    std::int32_t left = -1;
    std::int32_t right = -1;
    std::uint32_t rank = 0;
  };
  [[nodiscard]] std::vector<Pair> pairs() const;

 private:
  static constexpr std::uint64_t kNoPair = ~std::uint64_t{0};

  [[nodiscard]] std::size_t slot_of(std::uint64_t pair) const noexcept;

  std::vector<Merge> slots_;
  std::size_t count_ = 0;
};

// Byte-pair encoding of one piece of text (a word of the pre-tokenizer): the piece becomes symbols,
// one for each byte (byte-level models) or each character, and the adjacent pair of lowest rank,
// the leftmost of equals, is joined until no pair has a merge.
struct BpeModel {
  Vocabulary vocabulary;
  MergeTable merges;

  bool byte_level = false;  // the vocabulary is written in the byte alphabet
  bool byte_fallback = false;  // a character without a token becomes its bytes' <0xNN> tokens
  bool ignore_merges = false;  // a piece that is a token as a whole is not built from merges
  bool fuse_unknown = false;  // neighbouring unknown characters become one unknown token
  std::int32_t unknown = -1;
  std::array<std::int32_t, 256> byte_ids{};  // set by find_bytes()

  // Looks up the 256 single-byte tokens that byte_level or byte_fallback need.
  void find_bytes();

  // Appends the ids of `piece`, which is valid UTF-8. Takes n log n steps whatever the text is.
  // Throws UnsupportedError when a byte or character has neither token nor unknown token.
  void encode(std::string_view piece, std::vector<std::int32_t>& ids) const;

 private:
  void first_symbols(std::string_view piece, std::vector<std::int32_t>& ids) const;
  void first_characters(std::string_view piece, std::vector<std::int32_t>& ids) const;
};

}  // namespace quern
