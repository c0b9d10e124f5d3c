// SPDX-License-Identifier: Apache-2.0
#include "report/charts.h"

#include "base/units.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <optional>
#include <set>

namespace quern {
namespace {

using Colour = std::array<double, 3>;

constexpr std::array<Colour, 11> kViridis = {{
    {0x44, 0x01, 0x54},
    {0x48, 0x24, 0x75},
    {0x41, 0x44, 0x87},
    {0x35, 0x5f, 0x8d},
    {0x2a, 0x78, 0x8e},
    {0x21, 0x91, 0x8c},
    {0x22, 0xa8, 0x84},
    {0x44, 0xbf, 0x70},
    {0x7a, 0xd1, 0x51},
    {0xbd, 0xdf, 0x26},
    {0xfd, 0xe7, 0x25},
}};

constexpr double kLowest = -6;  // the fixed scale of the heat map, log10
constexpr double kHighest = -1;

constexpr int kCellWidth = 41;  // three maps of seven roles fit the page
constexpr int kCellHeight = 17;
constexpr int kLabelWidth = 42;
constexpr int kHeaderHeight = 20;
constexpr std::size_t kRowsOfMap = 20;
constexpr std::int64_t kFilledLayers = 1024;

std::string px(double value) {
  return fmt::format("{:.6g}", std::round(value * 10) / 10);
}

void open_svg(HtmlWriter& html, double width, double height, const std::string& label) {
  html.open(
      "svg",
      {{"class", "chart"},
       {"viewBox", fmt::format("0 0 {} {}", px(width), px(height))},
       {"width", px(width)},
       {"height", px(height)},
       {"role", "img"},
       {"aria-label", label}});
}

void label_at(
    HtmlWriter& html,
    double x,
    double y,
    std::string_view text,
    std::string_view anchor,
    std::string_view fill = "currentColor") {
  html.element("text", text, {{"x", px(x)}, {"y", px(y)}, {"text-anchor", anchor}, {"fill", fill}});
}

// Names of roles come from files: long ones are cut for their column, the title has all of it.
std::string shortened(const std::string& text, std::size_t limit) {
  std::string out;
  for (const char c : text) {
    const bool begins = (static_cast<unsigned char>(c) & 0xc0U) != 0x80U;
    if (begins && out.size() >= limit) {
      return out + "…";
    }
    out += c;
  }
  return out;
}

// What stands in one cell: the linears of a layer that have one role.
struct Cell {
  std::vector<const LinearFacts*> linears;
};

using Row = std::optional<std::int64_t>;  // none: linears outside the layers
using Grid = std::map<Row, std::map<std::string, Cell>>;

Grid grid_of(const std::vector<LinearFacts>& linears) {
  Grid grid;
  for (const LinearFacts& linear : linears) {
    grid[linear.layer][linear.role].linears.push_back(&linear);
  }
  // A layer that was left alone as a whole is shown too, as a grey row.
  if (!grid.empty() && grid.rbegin()->first && *grid.rbegin()->first < kFilledLayers) {
    for (std::int64_t layer = 0; layer < *grid.rbegin()->first; ++layer) {
      grid.try_emplace(layer);
    }
  }
  return grid;
}

std::string error_text(const LinearFacts& linear) {
  std::string text = fmt::format(
      "{}: relative error {}",
      linear.name,
      linear.relative_error ? short_number(*linear.relative_error) : "unknown");
  if (const auto ratio = linear.rtn_ratio()) {
    text += fmt::format(", {} of plain rounding", short_number(*ratio));
  }
  if (linear.bits) {
    text += fmt::format(", {:g} bit", *linear.bits);
  }
  if (!linear.fallback.empty()) {
    text += ", fallback: " + linear.fallback;
  }
  return text;
}

// The largest error of a cell and what its <title> says.
std::pair<std::optional<double>, std::string> summary_of(const Cell& cell) {
  const LinearFacts* worst = nullptr;
  std::vector<double> errors;
  for (const LinearFacts* linear : cell.linears) {
    if (!linear->relative_error) {
      continue;
    }
    errors.push_back(*linear->relative_error);
    if (worst == nullptr || *linear->relative_error > *worst->relative_error) {
      worst = linear;
    }
  }
  if (worst == nullptr) {
    return {std::nullopt, error_text(*cell.linears.front())};
  }
  std::string text = error_text(*worst);
  if (errors.size() > 1) {
    const auto middle = errors.begin() + static_cast<std::ptrdiff_t>(errors.size() / 2);
    std::nth_element(errors.begin(), middle, errors.end());
    text += fmt::format("; the largest of {}, median {}", errors.size(), short_number(*middle));
  }
  return {worst->relative_error, text};
}

void write_cell(HtmlWriter& html, double x, double y, const Cell* cell, const std::string& place) {
  html.open("g");
  std::string fill = "var(--absent)";
  std::string number = "–";
  std::string ink = "currentColor";
  std::string title = place + ": not quantized";
  if (cell != nullptr) {
    const auto [error, text] = summary_of(*cell);
    title = text;
    if (error) {
      // An error of zero is better than anything on the scale.
      const double power = *error > 0 ? std::log10(*error) : -99;
      fill = palette((power - kLowest) / (kHighest - kLowest));
      ink = text_colour_on(fill);
      number = *error > 0 ? fmt::format("{:.1f}", power) : "0";
    } else {
      number = "?";
    }
  }
  html.element("title", title);
  html.empty(
      "rect",
      {{"x", px(x)},
       {"y", px(y)},
       {"width", px(kCellWidth - 1)},
       {"height", px(kCellHeight - 1)},
       {"fill", fill}});
  label_at(html, x + kCellWidth / 2.0, y + 12, number, "middle", ink);
  html.close();
}

double linear_light(double channel) {
  channel /= 255;
  return channel <= 0.04045 ? channel / 12.92 : std::pow((channel + 0.055) / 1.055, 2.4);
}

struct RatioScale {
  int low = -1;  // powers of two
  int high = 1;
};

RatioScale scale_of(const std::vector<LinearFacts>& linears) {
  RatioScale scale;
  for (const LinearFacts& linear : linears) {
    const auto ratio = linear.rtn_ratio();
    if (ratio && *ratio > 0) {
      scale.low =
          std::min(scale.low, std::max(-6, static_cast<int>(std::floor(std::log2(*ratio)))));
      scale.high =
          std::max(scale.high, std::min(4, static_cast<int>(std::ceil(std::log2(*ratio)))));
    }
  }
  return scale;
}

constexpr double kPanelWidth = 240;  // four fit the page
constexpr double kPanelHeight = 132;
constexpr double kPanelLeft = 44;
constexpr double kPanelTop = 20;
constexpr double kPanelBottom = 112;

void write_ratio_panel(
    HtmlWriter& html,
    const std::string& role,
    const std::vector<const LinearFacts*>& linears,
    const RatioScale& scale,
    std::int64_t last_layer) {
  std::vector<double> ratios;
  std::transform(
      linears.begin(), linears.end(), std::back_inserter(ratios), [](const LinearFacts* linear) {
        return *linear->rtn_ratio();
      });
  std::sort(ratios.begin(), ratios.end());
  const std::string caption = fmt::format(
      "{}: median {:.2f}, worst {:.2f}",
      shortened(role, 12),
      ratios.at(ratios.size() / 2),
      ratios.back());
  open_svg(html, kPanelWidth, kPanelHeight, "Error over plain rounding by layer, " + caption);
  label_at(html, 0, 12, caption, "start");
  const auto y_of = [&](double power) {
    const double share = (power - scale.low) / (scale.high - scale.low);
    return kPanelBottom - std::clamp(share, 0.0, 1.0) * (kPanelBottom - kPanelTop);
  };
  for (int power = scale.low; power <= scale.high; ++power) {
    const double y = y_of(power);
    html.empty(
        "line",
        {{"class", power == 0 ? "even" : "grid"},
         {"x1", px(kPanelLeft)},
         {"x2", px(kPanelWidth - 4)},
         {"y1", px(y)},
         {"y2", px(y)}});
    label_at(html, kPanelLeft - 4, y + 4, fmt::format("{:g}", std::exp2(power)), "end");
  }
  // Experts of one layer share a mark at their median, so that the page stays small.
  std::map<std::int64_t, std::vector<const LinearFacts*>> by_layer;
  for (const LinearFacts* linear : linears) {
    by_layer[linear->layer.value_or(last_layer)].push_back(linear);
  }
  for (auto& [layer, members] : by_layer) {
    const auto middle = members.begin() + static_cast<std::ptrdiff_t>(members.size() / 2);
    std::nth_element(
        members.begin(), middle, members.end(), [](const LinearFacts* a, const LinearFacts* b) {
          return *a->rtn_ratio() < *b->rtn_ratio();
        });
    const double share =
        last_layer > 0 ? static_cast<double>(layer) / static_cast<double>(last_layer) : 0.5;
    const double ratio = *(*middle)->rtn_ratio();
    html.open(
        "circle",
        {{"cx", px(kPanelLeft + 6 + share * (kPanelWidth - kPanelLeft - 16))},
         {"cy", px(y_of(ratio > 0 ? std::log2(ratio) : scale.low))},
         {"r", "2.6"}});
    html.element(
        "title",
        error_text(**middle) +
            (members.size() > 1 ? fmt::format("; the median of {}", members.size()) : ""));
    html.close();
  }
  label_at(html, kPanelLeft + 6, kPanelHeight - 5, "layer 0", "start");
  label_at(html, kPanelWidth - 4, kPanelHeight - 5, fmt::format("{}", last_layer), "end");
  html.close();
}

}  // namespace

std::string palette(double position) {
  const double at = std::clamp(position, 0.0, 1.0) * (kViridis.size() - 1);
  const auto low = std::min(static_cast<std::size_t>(at), kViridis.size() - 2);
  const double share = at - static_cast<double>(low);
  std::string out = "#";
  for (std::size_t i = 0; i < 3; ++i) {
    const double value = kViridis.at(low).at(i) * (1 - share) + kViridis.at(low + 1).at(i) * share;
    out += fmt::format("{:02x}", static_cast<int>(std::lround(value)));
  }
  return out;
}

const char* text_colour_on(const std::string& colour) {
  const auto channel = [&](std::size_t at) {
    return linear_light(static_cast<double>(std::stoi(colour.substr(at, 2), nullptr, 16)));
  };
  const double luminance = 0.2126 * channel(1) + 0.7152 * channel(3) + 0.0722 * channel(5);
  // Contrast is (lighter + 0.05) / (darker + 0.05); at 0.179 black and white are equal.
  return luminance > 0.179 ? "#000000" : "#ffffff";
}

void write_heat_map(HtmlWriter& html, const std::vector<LinearFacts>& linears) {
  const Grid grid = grid_of(linears);
  const std::vector<std::string> roles = roles_of(linears);
  std::vector<Row> rows;
  for (const auto& [row, cells] : grid) {
    rows.push_back(row);
  }
  // A std::optional without a value sorts first; those linears (the head) come last in a model.
  if (!rows.empty() && !rows.front()) {
    std::rotate(rows.begin(), rows.begin() + 1, rows.end());
  }
  const std::size_t maps = (rows.size() + kRowsOfMap - 1) / kRowsOfMap;
  const std::size_t height = maps == 0 ? 0 : (rows.size() + maps - 1) / maps;
  for (std::size_t begin = 0; begin < rows.size(); begin += height) {
    const std::size_t end = std::min(begin + height, rows.size());
    const auto name_of = [](const Row& row) { return row ? fmt::format("{}", *row) : "other"; };
    open_svg(
        html,
        kLabelWidth + kCellWidth * static_cast<double>(roles.size()),
        kHeaderHeight + kCellHeight * static_cast<double>(end - begin),
        fmt::format(
            "Heat map of log10 of the relative error, layers {} to {}, {} roles",
            name_of(rows.at(begin)),
            name_of(rows.at(end - 1)),
            roles.size()));
    label_at(html, kLabelWidth - 6, 14, "layer", "end");
    for (std::size_t column = 0; column < roles.size(); ++column) {
      const double x = kLabelWidth + kCellWidth * static_cast<double>(column);
      label_at(html, x + kCellWidth / 2.0, 14, shortened(roles[column], 6), "middle");
    }
    for (std::size_t i = begin; i < end; ++i) {
      const double y = kHeaderHeight + kCellHeight * static_cast<double>(i - begin);
      label_at(html, kLabelWidth - 6, y + 12, name_of(rows[i]), "end");
      const auto& cells = grid.at(rows[i]);
      for (std::size_t column = 0; column < roles.size(); ++column) {
        const auto cell = cells.find(roles[column]);
        write_cell(
            html,
            kLabelWidth + kCellWidth * static_cast<double>(column),
            y,
            cell == cells.end() ? nullptr : &cell->second,
            fmt::format("layer {}, {}", name_of(rows[i]), roles[column]));
      }
    }
    html.close();
    html.line();
  }
}

void write_heat_legend(HtmlWriter& html) {
  constexpr int kStep = 60;
  constexpr int kSteps = 5;
  constexpr int kParts = 6;  // of a step
  open_svg(
      html,
      kStep * kSteps + 180,
      34,
      "Legend: log10 of the relative error from -6 (dark, good) to -1 (light, poor); grey is not "
      "quantized");
  for (int i = 0; i < kSteps * kParts; ++i) {
    const double width = static_cast<double>(kStep) / kParts;
    html.empty(
        "rect",
        {{"x", px(16 + i * width)},
         {"y", "0"},
         {"width", px(width + 0.5)},
         {"height", "14"},
         {"fill", palette((i + 0.5) / (kSteps * kParts))}});
  }
  for (int i = 0; i <= kSteps; ++i) {
    label_at(html, 16 + i * kStep, 28, fmt::format("{}", static_cast<int>(kLowest) + i), "middle");
  }
  const double grey = 16 + kStep * kSteps + 24;
  html.empty(
      "rect",
      {{"x", px(grey)}, {"y", "0"}, {"width", "20"}, {"height", "14"}, {"fill", "var(--absent)"}});
  label_at(html, grey + 26, 12, "not quantized", "start");
  html.close();
}

std::string storage_colour(const std::vector<StorageShare>& shares, std::size_t index) {
  const auto same = [&](const StorageShare& share) {
    return share.quantized == shares.at(index).quantized;
  };
  const auto at = shares.begin() + static_cast<std::ptrdiff_t>(index);
  const auto before = std::count_if(shares.begin(), at, same);
  const auto all = std::count_if(shares.begin(), shares.end(), same);
  const double position = all > 1 ? static_cast<double>(before) / static_cast<double>(all - 1) : 0;
  if (shares.at(index).quantized) {
    return palette(0.08 + 0.84 * position);
  }
  const auto grey = static_cast<int>(std::lround(0x6a + 0x60 * position));
  return fmt::format("#{0:02x}{0:02x}{0:02x}", grey);
}

void write_storage_bar(HtmlWriter& html, const std::vector<StorageShare>& shares) {
  constexpr double kWidth = 1000;
  constexpr double kHeight = 36;
  double total = 0;
  for (const StorageShare& share : shares) {
    total += share.bytes;
  }
  if (total <= 0) {
    return;
  }
  open_svg(html, kWidth, kHeight, "Bytes of the file by role; the table below has the numbers");
  double x = 0;
  for (std::size_t i = 0; i < shares.size(); ++i) {
    const double width = kWidth * shares[i].bytes / total;
    const std::string fill = storage_colour(shares, i);
    html.open("g");
    html.element(
        "title",
        fmt::format(
            "{}: {}, {:.1f} %",
            shares[i].label,
            human_bytes(shares[i].bytes),
            100 * shares[i].bytes / total));
    html.empty(
        "rect",
        {{"class", "part"},
         {"x", px(x)},
         {"y", "0"},
         {"width", px(width)},
         {"height", px(kHeight)},
         {"fill", fill}});
    const std::string label = shortened(shares[i].label, 11);
    if (width > 8.0 * static_cast<double>(label.size()) + 6) {
      label_at(html, x + width / 2, 23, label, "middle", text_colour_on(fill));
    }
    html.close();
    x += width;
  }
  html.close();
}

void write_ratio_panels(HtmlWriter& html, const std::vector<LinearFacts>& linears) {
  std::map<std::string, std::vector<const LinearFacts*>> by_role;
  std::int64_t last_layer = 0;
  for (const LinearFacts& linear : linears) {
    last_layer = std::max(last_layer, linear.layer.value_or(0));
    if (linear.rtn_ratio()) {
      by_role[linear.role].push_back(&linear);
    }
  }
  const RatioScale scale = scale_of(linears);
  for (const std::string& role : roles_of(linears)) {
    const auto found = by_role.find(role);
    if (found != by_role.end()) {
      write_ratio_panel(html, role, found->second, scale, last_layer);
      html.line();
    }
  }
}

}  // namespace quern
