// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "report/html_writer.h"

#include <string>
#include <string_view>
#include <vector>

namespace quern {

struct Column {
  std::string title;
  bool number = false;  // flush right
};

// A table that scrolls on its own when it is wider than the page.
void write_table(
    HtmlWriter& html,
    const std::vector<Column>& columns,
    const std::vector<std::vector<std::string>>& rows);

// Two columns, key and value; objects within are flattened to dotted keys.
void write_key_values(HtmlWriter& html, const Json& object);

void open_section(HtmlWriter& html, std::string_view title);

}  // namespace quern
