// SPDX-License-Identifier: Apache-2.0
#include "report/facts.h"
#include "report/html_writer.h"
#include "report/report.h"
#include "report/sections.h"

#include <fstream>
#include <string>
#include <string_view>

namespace quern {
namespace {

// The page is meant to stay below 1.5 MB; a model of thousands of experts has a manifest larger
// than that, and then the embedded copy goes without its linears.
constexpr std::size_t kEmbeddedLimit = 900'000;

constexpr const char* kFirstLine = "<!DOCTYPE html>\n";

// Colours keep a contrast of at least 4.5 against their background in both schemes.
constexpr const char* kStyle = R"css(
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b1d21; --soft: #55595f; --rule: #d4d7dc;
  --panel: #f4f5f7; --absent: #dcdee2; --mark: #31688e;
  --pass: #0b6b36; --warn: #8a5200; --fail: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --ink: #e8eaed; --soft: #aab0b8; --rule: #3a3f46; --panel: #202328;
    --absent: #3b4047; --mark: #5ec9b4; --pass: #6fd89a; --warn: #f2b75c; --fail: #ff9b90; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 48px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 8px; padding-top: 12px; border-top: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 6px 0; overflow-wrap: anywhere; }
.target { color: var(--soft); }
.note { color: var(--soft); font-size: 13px; max-width: 78ch; }
.verdict { border-left: 5px solid var(--soft); background: var(--panel); padding: 8px 12px;
  margin: 14px 0 6px; }
.verdict strong { text-transform: uppercase; letter-spacing: .04em; margin-right: 6px; }
.pass { border-color: var(--pass); } .pass strong { color: var(--pass); }
.warn { border-color: var(--warn); } .warn strong { color: var(--warn); }
.fail { border-color: var(--fail); } .fail strong { color: var(--fail); }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin-top: 14px; }
.tile { flex: 1 1 150px; background: var(--panel); padding: 8px 12px; }
.tile .label { display: block; color: var(--soft); font-size: 13px; }
.tile strong { font-size: 17px; }
.wide { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 14px 3px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
.t { text-align: left; overflow-wrap: break-word; min-width: 7ch; max-width: 64ch; }
.n { text-align: right; white-space: nowrap; }
pre { background: var(--panel); padding: 10px 12px; white-space: pre-wrap; overflow-wrap: anywhere;
  font-size: 13px; }
.chart { max-width: 100%; height: auto; display: block; margin: 6px 0; font-size: 11px;
  font-variant-numeric: tabular-nums; }
.maps { display: flex; flex-wrap: wrap; gap: 10px 22px; align-items: flex-start; }
.part { stroke: var(--page); stroke-width: 1; }
.grid { stroke: var(--rule); stroke-width: 1; }
.even { stroke: var(--ink); stroke-width: 1.5; }
circle { fill: var(--mark); }
.swatch { margin-right: 7px; vertical-align: -1px; }
footer { margin-top: 36px; color: var(--soft); font-size: 13px; }
@media print {
  @page { margin: 14mm; }
  :root { color-scheme: light; --page: #ffffff; --ink: #000000; --soft: #444444; --rule: #bbbbbb;
    --panel: #f4f5f7; --absent: #dcdee2; --mark: #31688e; --pass: #0b6b36; --warn: #8a5200;
    --fail: #b3261e; }
  body { max-width: none; padding: 0; font-size: 12px; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .chart, .tile, tr, pre, .verdict { break-inside: avoid; }
  h2, h3, .legend { break-after: avoid; }
  .wide { overflow: visible; }
  table { font-size: 10px; } th, td { padding-right: 8px; }
}
)css";

std::string embedded_data(const ReportData& data) {
  Json document = {{"schema", "quern.report/1"}, {"manifest", data.manifest}};
  if (data.original_eval) {
    document["original_eval"] = *data.original_eval;
  }
  if (data.result_eval) {
    document["result_eval"] = *data.result_eval;
  }
  std::string text = script_json(document);
  if (text.size() > kEmbeddedLimit && data.manifest.is_object()) {
    Json& manifest = document["manifest"];
    for (const char* key : {"linears", "kept"}) {
      manifest[std::string(key) + "_omitted"] = find_list(manifest, {key}).size();
      manifest.erase(key);
    }
    text = script_json(document);
  }
  return text;
}

}  // namespace

bool is_html_report(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  std::string start(std::string_view(kFirstLine).size(), '\0');
  stream.read(start.data(), static_cast<std::streamsize>(start.size()));
  return stream && start == kFirstLine;
}

std::string render_html_report(const ReportData& data) {
  HtmlWriter html;
  html.raw(kFirstLine);
  html.open("html", {{"lang", "en"}});
  html.line();
  html.open("head");
  html.empty("meta", {{"charset", "utf-8"}});
  html.empty("meta", {{"name", "viewport"}, {"content", "width=device-width, initial-scale=1"}});
  // Should markup of a model ever slip through, it can neither run nor fetch anything.
  html.empty(
      "meta",
      {{"http-equiv", "Content-Security-Policy"},
       {"content", "default-src 'none'; style-src 'unsafe-inline'"}});
  const std::string model = find_text(data.manifest, {"source", "id"});
  html.element("title", model.empty() ? "quern report" : "quern report: " + model);
  html.open("style");
  html.raw(kStyle);
  html.close();
  html.close();
  html.line();
  html.open("body");
  html.line();
  write_header_section(html, data);
  html.open("main");
  html.line();
  write_comparison_section(html, data);
  write_error_section(html, data);
  write_hazard_section(html, data);
  write_storage_section(html, data);
  write_quality_section(html, data);
  write_recipe_section(html, data);
  write_environment_section(html, data);
  write_files_section(html, data);
  html.close();
  html.line();
  html.element(
      "footer", "Made by quern from the run's own records, which this file carries as JSON.");
  html.line();
  html.open("script", {{"type", "application/json"}, {"id", "quern-report"}});
  html.raw(embedded_data(data));
  html.close();
  html.close();
  html.close();
  html.line();
  return html.take();
}

}  // namespace quern
