// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "report/facts.h"
#include "report/html_writer.h"

#include <string>
#include <vector>

// Inline SVG. Every mark carries its number as text or as a <title>; colour only repeats it.
namespace quern {

// Layers by roles, coloured by log10 of the relative error between -6 and -1, grey where nothing
// was quantized. Where several linears share a cell (experts) the largest counts. The layers are
// parted into several small maps, so that a deep model fits a screen and a printed page.
void write_heat_map(HtmlWriter& html, const std::vector<LinearFacts>& linears);
void write_heat_legend(HtmlWriter& html);

// One bar for the whole file, parted by role and by what was kept.
void write_storage_bar(HtmlWriter& html, const std::vector<StorageShare>& shares);
// The colour of a part of that bar, for its table.
[[nodiscard]] std::string storage_colour(
    const std::vector<StorageShare>& shares, std::size_t index);

// One small panel for each role: error over that of plain rounding, by layer, in powers of two.
void write_ratio_panels(HtmlWriter& html, const std::vector<LinearFacts>& linears);

// A point of the palette (viridis: its lightness grows steadily, so that it survives both colour
// blindness and grey print). `position` is cut to [0, 1].
[[nodiscard]] std::string palette(double position);
// Black or white, whichever is read better on `colour` ("#rrggbb").
[[nodiscard]] const char* text_colour_on(const std::string& colour);

}  // namespace quern
