// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <string>

namespace quern {

// A regular expression of a checkpoint's configuration, matched from the start of a module name (it
// need not reach the end), as Python's `match` does. The text is untrusted: its length, nesting and
// the steps of a match are limited.
class ModulePattern {
 public:
  // Throws ParseError naming `where` when the expression is malformed or too large.
  ModulePattern(std::string text, std::string where);

  // Throws ParseError when the match takes more steps than any sensible pattern needs.
  [[nodiscard]] bool matches(const std::string& module) const;
  [[nodiscard]] const std::string& text() const noexcept { return text_; }

 private:
  struct Code;
  std::string text_;
  std::string where_;
  std::shared_ptr<const Code> code_;
};

// `text` with every character that means something in an expression escaped.
[[nodiscard]] std::string escape_pattern(const std::string& text);

}  // namespace quern
