// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace quern {

// A token that is found in the text as a whole, outside of the model. Fields as in tokenizer.json.
struct AddedToken {
  std::int32_t id = -1;
  std::string content;
  bool special = false;  // a control token: left out by decode(skip_special)
  bool normalized = false;  // looked for in the normalised text, else in the raw text
  bool left_strip = false;  // takes the white space on its left (right) with it
  bool right_strip = false;
  bool single_word = false;  // only where no word character touches it
};

inline constexpr std::size_t kMaxAddedTokens = 65536;
inline constexpr std::size_t kMaxAddedTokenBytes = 512;

// Finds added tokens in text: leftmost, of those the longest, without overlap.
class AddedTokenMatcher {
 public:
  // `content` is what to look for (the normalised content for `normalized` tokens).
  void add(std::string_view content, const AddedToken& token);

  // Cuts `text` at the tokens and calls `sink(text between tokens, -1)` or `sink({}, id)` in order.
  // Without `parse_special`, special tokens are text; the others are still found.
  using Sink = std::function<void(std::string_view, std::int32_t)>;
  void split(std::string_view text, bool parse_special, const Sink& sink) const;

 private:
  struct Entry {
    std::int32_t id;
    bool special;
    bool left_strip;
    bool right_strip;
    bool single_word;
  };
  struct Node {
    std::vector<std::pair<unsigned char, std::uint32_t>> children;
    std::int32_t entry = -1;
  };

  [[nodiscard]] std::uint32_t child(std::uint32_t node, unsigned char byte) const noexcept;
  // The longest token that begins at `at`: its entry and length, or -1.
  [[nodiscard]] std::int32_t longest(
      std::string_view text, std::size_t at, std::size_t& length) const noexcept;

  std::vector<Entry> entries_;
  std::vector<Node> nodes_ = std::vector<Node>(1);
  std::array<bool, 256> starts_{};  // no token begins with any other byte
};

}  // namespace quern
