// SPDX-License-Identifier: Apache-2.0
#include "report/tables.h"

#include "report/facts.h"

#include <fmt/format.h>

#include <algorithm>

namespace quern {
namespace {

// Lists come from files; a page that opens is worth more than the last row.
constexpr std::size_t kMostRows = 200;

void flatten(
    const Json& value, const std::string& key, std::vector<std::vector<std::string>>& rows) {
  if (value.is_object()) {
    for (const auto& item : value.items()) {
      flatten(item.value(), key.empty() ? item.key() : key + "." + item.key(), rows);
    }
    return;
  }
  rows.push_back({key, plain_value(value)});
}

}  // namespace

void write_table(
    HtmlWriter& html,
    const std::vector<Column>& columns,
    const std::vector<std::vector<std::string>>& rows) {
  html.open("div", {{"class", "wide"}});
  html.open("table");
  html.open("thead");
  html.open("tr");
  for (const Column& column : columns) {
    html.element("th", column.title, {{"scope", "col"}, {"class", column.number ? "n" : "t"}});
  }
  html.close();
  html.close();
  html.line();
  html.open("tbody");
  const std::size_t shown = std::min(rows.size(), kMostRows);
  for (std::size_t r = 0; r < shown; ++r) {
    const std::vector<std::string>& row = rows[r];
    html.open("tr");
    for (std::size_t i = 0; i < row.size(); ++i) {
      html.element("td", row[i], {{"class", columns.at(i).number ? "n" : "t"}});
    }
    html.close();
    html.line();
  }
  html.close();
  html.close();
  html.close();
  html.line();
  if (shown < rows.size()) {
    html.element("p", fmt::format("And {} more.", rows.size() - shown));
  }
}

void write_key_values(HtmlWriter& html, const Json& object) {
  std::vector<std::vector<std::string>> rows;
  flatten(object, "", rows);
  write_table(html, {{"key"}, {"value"}}, rows);
}

void open_section(HtmlWriter& html, std::string_view title) {
  html.open("section");
  html.element("h2", title);
  html.line();
}

}  // namespace quern
