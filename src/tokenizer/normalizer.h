// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace quern {

// What is done to text before it is cut into pieces: the steps of tokenizer.json's `normalizer`,
// in order, nested sequences laid flat.
class Normalizer {
 public:
  void add_nfc() { steps_.push_back({Kind::kNfc, {}, {}}); }
  void add_prepend(std::string prefix) {
    steps_.push_back({Kind::kPrepend, {}, std::move(prefix)});
  }
  // Replaces every occurrence of `from`, which must not be empty.
  void add_replace(std::string from, std::string to) {
    steps_.push_back({Kind::kReplace, std::move(from), std::move(to)});
  }

  // The result is `text` itself or lies in `storage`. Text without characters stays so.
  [[nodiscard]] std::string_view apply(std::string_view text, std::string& storage) const;
  [[nodiscard]] std::size_t steps() const noexcept { return steps_.size(); }

 private:
  enum class Kind { kNfc, kPrepend, kReplace };
  struct Step {
    Kind kind;
    std::string from;
    std::string to;
  };
  [[nodiscard]] static std::string apply_step(const Step& step, std::string_view text);

  std::vector<Step> steps_;
};

// Every occurrence of `from` in `text`, left to right, becomes `to`.
[[nodiscard]] std::string replace_all(
    std::string_view text, std::string_view from, std::string_view to);

}  // namespace quern
