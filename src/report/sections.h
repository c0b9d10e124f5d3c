// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "report/html_writer.h"
#include "report/report.h"

namespace quern {

// The parts of the page, in its order. Each writes nothing when its facts are absent.
void write_header_section(HtmlWriter& html, const ReportData& data);
void write_comparison_section(HtmlWriter& html, const ReportData& data);
void write_error_section(
    HtmlWriter& html, const ReportData& data);  // map, ratios, worst, fallbacks
// What makes the model hard to quantize, what was done about it, ranges of down_proj by layer.
void write_hazard_section(HtmlWriter& html, const ReportData& data);
void write_storage_section(HtmlWriter& html, const ReportData& data);  // bar, kept, census
void write_quality_section(HtmlWriter& html, const ReportData& data);
void write_recipe_section(HtmlWriter& html, const ReportData& data);
void write_environment_section(HtmlWriter& html, const ReportData& data);
void write_files_section(HtmlWriter& html, const ReportData& data);

}  // namespace quern
