// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// More than ten times the largest published vocabulary; keeps a forged id from costing memory.
inline constexpr std::int64_t kMaxTokenId = (std::int64_t{1} << 22U) - 1;
inline constexpr std::size_t kMaxTokenBytes = 65536;

// The tokens of a BPE model as its file writes them, both ways. Each text and each id stands at
// most once; ids may have gaps.
class Vocabulary {
 public:
  // Throws ParseError (naming `where`) for an id outside of 0..kMaxTokenId, an id or a text that
  // was added before, an empty text and one longer than kMaxTokenBytes.
  void add(std::string_view text, std::int64_t id, const std::string& where);

  [[nodiscard]] std::int32_t find(std::string_view text) const noexcept;  // -1: not there
  [[nodiscard]] bool has(std::int64_t id) const noexcept;
  // Empty for an id without a token.
  [[nodiscard]] std::string_view text(std::int64_t id) const noexcept;
  // One more than the largest id, gaps included.
  [[nodiscard]] std::int32_t size() const noexcept {
    return static_cast<std::int32_t>(places_.size());
  }
  [[nodiscard]] std::size_t count() const noexcept { return count_; }

 private:
  struct Place {
    std::uint64_t offset = 0;
    std::uint32_t length = 0;  // 0: no token has this id
  };

  [[nodiscard]] std::size_t slot_of(std::string_view text) const noexcept;
  void grow();

  std::string bytes_;
  std::vector<Place> places_;
  std::vector<std::int32_t> slots_;  // open addressing, a power of two, at most half full
  std::size_t count_ = 0;
};

}  // namespace quern
