// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"

#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace quern {

// Text for HTML content and quoted attributes. Control characters, invalid UTF-8 and characters
// that turn the direction of writing are shown by their number instead of taking effect.
[[nodiscard]] std::string escape_html(std::string_view text);

// JSON for a <script type="application/json"> block: no `<`, `>` or `&`, so that no string can end
// the block or start a comment in it, and no control characters.
[[nodiscard]] std::string script_json(const Json& value);

// Writes elements that are closed in the order in which they were opened. Empty elements get a
// slash, which HTML allows and XML demands, so that both kinds of parser read the page.
class HtmlWriter {
 public:
  using Attribute = std::pair<std::string_view, std::string_view>;
  using Attributes = std::initializer_list<Attribute>;

  void open(std::string_view tag, Attributes attributes = {});
  void close();  // the element opened last
  void element(std::string_view tag, std::string_view content, Attributes attributes = {});
  void empty(std::string_view tag, Attributes attributes = {});
  void text(std::string_view content);
  void raw(std::string_view markup);  // already escaped
  void line();  // a line end, for those who read the source

  // The markup; every element must be closed.
  [[nodiscard]] std::string take();

 private:
  void start(std::string_view tag, Attributes attributes);

  std::string out_;
  std::vector<std::string> open_;
};

}  // namespace quern
