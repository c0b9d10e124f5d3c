// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

// What a person reads after a run: an HTML page, a table for the terminal and a model card. All
// three are made from the run's own JSON and from nothing else, so that they can be made again.
namespace quern {

// The documents of a run. Every key is optional: what is absent or of another type is left out of
// the page, because manifests of older and newer versions are rendered too.
struct ReportData {
  Json manifest;  // "quern.quantize/1"
  std::optional<Json> original_eval;  // "quern.eval/1" of the source
  std::optional<Json> result_eval;  // "quern.eval/1" of the output
};

// One HTML page without scripts or outside references. Strings of the manifest are untrusted.
[[nodiscard]] std::string render_html_report(const ReportData& data);

// Whether a file is a page that render_html_report made.
[[nodiscard]] bool is_html_report(const std::filesystem::path& file);

// The before/after table for a terminal: aligned columns, each line ended.
[[nodiscard]] std::string render_text_summary(const ReportData& data);

// What the source's own card and files say; copied into the new card.
struct CardSource {
  std::string license;  // of the front matter, as it stands there; empty: unknown
  std::string license_name;  // with license "other"
  std::string license_link;
  std::string library_name;
  std::string pipeline_tag;
  std::vector<std::string> languages;
};

// README.md with YAML front matter. Holds no times or dates, so that the same run gives the same
// card. Its last line carries a checksum of the rest.
[[nodiscard]] std::string render_model_card(
    const Json& manifest,
    const CardSource& source = {},
    const std::optional<Json>& original_eval = std::nullopt,
    const std::optional<Json>& result_eval = std::nullopt);

// Whether `card` is as render_model_card made it. An edited one must not be overwritten.
[[nodiscard]] bool is_unedited_card(std::string_view card);

}  // namespace quern
