// SPDX-License-Identifier: Apache-2.0
#include "report/sections.h"

#include "base/units.h"
#include "report/charts.h"
#include "report/comparison.h"
#include "report/facts.h"
#include "report/tables.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>

namespace quern {
namespace {

constexpr const char* kNothing = "-";
constexpr std::size_t kWorst = 10;

std::string number_or_nothing(std::optional<double> value) {
  return value ? short_number(*value) : kNothing;
}

std::string text_or_nothing(const std::string& text) {
  return text.empty() ? kNothing : text;
}

void write_tile(HtmlWriter& html, std::string_view label, const std::string& value) {
  html.open("div", {{"class", "tile"}});
  html.element("span", label, {{"class", "label"}});
  html.element("strong", value);
  html.close();
  html.line();
}

std::string before_after(
    std::optional<double> before, std::optional<double> after, std::string (*format)(double)) {
  if (!after) {
    return kNothing;
  }
  return before ? format(*before) + " → " + format(*after) : format(*after);
}

std::string bits_text(double bits) {
  return fmt::format("{:.2f}", bits);
}

const char* verdict_class(VerdictKind kind) {
  switch (kind) {
    case VerdictKind::kPass: return "verdict pass";
    case VerdictKind::kWarn: return "verdict warn";
    case VerdictKind::kFail: return "verdict fail";
    case VerdictKind::kUnmeasured: break;
  }
  return "verdict unmeasured";
}

void write_worst(HtmlWriter& html, std::vector<LinearFacts> linears) {
  linears.erase(
      std::remove_if(
          linears.begin(),
          linears.end(),
          [](const auto& linear) { return !linear.relative_error; }),
      linears.end());
  const std::size_t count = std::min(kWorst, linears.size());
  if (count == 0) {
    return;
  }
  std::partial_sort(
      linears.begin(),
      linears.begin() + static_cast<std::ptrdiff_t>(count),
      linears.end(),
      [](const LinearFacts& a, const LinearFacts& b) {
        return *a.relative_error != *b.relative_error ? *a.relative_error > *b.relative_error
                                                      : a.name < b.name;
      });
  linears.resize(count);
  html.element("h3", "The linears with the largest error");
  std::vector<std::vector<std::string>> rows;
  rows.reserve(count);
  for (const LinearFacts& linear : linears) {
    rows.push_back(
        {linear.name,
         linear.shape,
         linear.method,
         number_or_nothing(linear.bits),
         text_or_nothing(linear.group),
         number_or_nothing(linear.relative_error),
         number_or_nothing(linear.holdout_error),
         number_or_nothing(linear.rtn_error),
         number_or_nothing(linear.rtn_ratio()),
         number_or_nothing(linear.damping),
         number_or_nothing(linear.dead_columns)});
  }
  write_table(
      html,
      {{"linear"},
       {"shape"},
       {"method"},
       {"bits", true},
       {"group", true},
       {"error", true},
       {"held out", true},
       {"rounded", true},
       {"ratio", true},
       {"damping", true},
       {"dead", true}},
      rows);
}

void write_fallbacks(HtmlWriter& html, const std::vector<LinearFacts>& linears) {
  std::vector<std::vector<std::string>> rows;
  for (const LinearFacts& linear : linears) {
    if (!linear.fallback.empty()) {
      rows.push_back(
          {linear.name, linear.method, linear.fallback, number_or_nothing(linear.relative_error)});
    }
  }
  html.element("h3", "Fallbacks");
  if (rows.empty()) {
    html.element("p", "None: every linear was quantized by the method asked for.");
    return;
  }
  html.element("p", fmt::format("{} of {} linears.", rows.size(), linears.size()));
  write_table(html, {{"linear"}, {"method used"}, {"why"}, {"error", true}}, rows);
}

void write_kept(HtmlWriter& html, const Json& manifest) {
  const std::vector<KeptFacts> kept = kept_of(manifest);
  if (kept.empty()) {
    return;
  }
  html.element("h3", "Kept unquantized");
  // Norms come by the hundred with one reason: they share a row, large tensors stand alone.
  std::map<std::string, std::size_t> place;
  std::vector<std::vector<KeptFacts>> groups;
  for (const KeptFacts& facts : kept) {
    const bool alone = facts.kind == "embedding" || facts.kind == "output head";
    const std::string key =
        (alone ? facts.name : facts.kind) + '\n' + facts.dtype + '\n' + facts.reason;
    const auto [found, added] = place.try_emplace(key, groups.size());
    if (added) {
      groups.emplace_back();
    }
    groups.at(found->second).push_back(facts);
  }
  std::vector<std::vector<std::string>> rows;
  for (const std::vector<KeptFacts>& group : groups) {
    double bytes = 0;
    for (const KeptFacts& facts : group) {
      bytes += facts.bytes;
    }
    const KeptFacts& first = group.front();
    const std::string name =
        group.size() == 1 ? first.name : fmt::format("{} {}", group.size(), first.kind);
    rows.push_back({name, first.dtype, human_bytes(bytes), text_or_nothing(first.reason)});
  }
  write_table(html, {{"tensor"}, {"type"}, {"size", true}, {"why"}}, rows);
}

void write_census(HtmlWriter& html, const Json& manifest) {
  const auto in = find_number(manifest, {"census", "in"});
  const auto out = find_number(manifest, {"census", "out"});
  if (!in || !out) {
    return;
  }
  const Json& skipped = find_list(manifest, {"census", "skipped"});
  html.element(
      "p",
      fmt::format(
          "Census: {} tensors in the source, {} in the result, {} skipped.",
          with_thousands(*in),
          with_thousands(*out),
          skipped.size()));
  std::vector<std::vector<std::string>> rows;
  for (const Json& entry : skipped) {
    rows.push_back({find_text(entry, {"name"}), find_text(entry, {"reason"})});
  }
  if (!rows.empty()) {
    write_table(html, {{"skipped"}, {"why"}}, rows);
  }
}

void write_storage_table(HtmlWriter& html, const std::vector<StorageShare>& shares) {
  double total = 0;
  for (const StorageShare& share : shares) {
    total += share.bytes;
  }
  html.open("div", {{"class", "wide"}});
  html.open("table");
  html.open("thead");
  html.open("tr");
  for (const Column& column :
       std::vector<Column>{{"part"}, {"size", true}, {"share", true}, {"bits per weight", true}}) {
    html.element("th", column.title, {{"scope", "col"}, {"class", column.number ? "n" : "t"}});
  }
  html.close();
  html.close();
  html.open("tbody");
  for (std::size_t i = 0; i < shares.size(); ++i) {
    const StorageShare& share = shares[i];
    html.open("tr");
    html.open("td", {{"class", "t"}});
    html.open(
        "svg", {{"class", "swatch"}, {"width", "12"}, {"height", "12"}, {"aria-hidden", "true"}});
    html.empty("rect", {{"width", "12"}, {"height", "12"}, {"fill", storage_colour(shares, i)}});
    html.close();
    html.text(share.label + (share.quantized ? "" : " (not quantized)"));
    html.close();
    html.element("td", human_bytes(share.bytes), {{"class", "n"}});
    html.element(
        "td", fmt::format("{:.1f} %", total > 0 ? 100 * share.bytes / total : 0), {{"class", "n"}});
    html.element(
        "td",
        share.parameters > 0 ? bits_text(8 * share.bytes / share.parameters) : kNothing,
        {{"class", "n"}});
    html.close();
    html.line();
  }
  html.close();
  html.close();
  html.close();
}

// "vocab_size 151936, share_of_file 0.31"
std::string facts_text(const Json& facts) {
  std::string text;
  for (const auto& [key, value] : facts.items()) {
    text += (text.empty() ? "" : ", ") + key + " " + plain_value(value);
  }
  return text;
}

// Thresholds and errors of the linears for which ways to find ranges were compared.
std::vector<std::vector<std::string>> range_rows(const Json& manifest) {
  std::vector<std::vector<std::string>> rows;
  for (const Json& linear : find_list(manifest, {"linears"})) {
    const auto minmax = find_number(linear, {"range_errors", "minmax"});
    if (!minmax) {
      continue;
    }
    const auto weighted = find_number(linear, {"range_errors", "weighted"});
    const auto output = find_number(linear, {"range_errors", "output"});
    std::optional<double> best = weighted;
    best = output && (!best || *output < *best) ? output : best;
    rows.push_back(
        {find_text(linear, {"name"}),
         number_or_nothing(find_number(linear, {"clip_threshold"})),
         number_or_nothing(minmax),
         number_or_nothing(find_number(linear, {"range_errors", "power-2.4"})),
         number_or_nothing(weighted),
         number_or_nothing(output),
         best && *minmax > 0 ? fmt::format("{:.1f} %", 100 * (1 - *best / *minmax)) : kNothing});
  }
  return rows;
}

const Json* original_of(const ReportData& data) {
  return data.original_eval ? &*data.original_eval : nullptr;
}

// Calls `visit(model, file, entry)` for each entry of a section of both evaluations.
template <class Visit>
void for_each_entry(const ReportData& data, const char* section, const Visit& visit) {
  const std::pair<const char*, const Json*> documents[] = {
      {"original", original_of(data)}, {"result", result_evaluation(data)}};
  for (const auto& [model, document] : documents) {
    const Json* entries = document == nullptr ? nullptr : find_json(*document, {section});
    if (entries != nullptr && entries->is_object()) {
      for (const auto& item : entries->items()) {
        visit(model, item.key(), item.value());
      }
    }
  }
}

std::string count_of(const Json& entry, const char* key) {
  const auto value = find_number(entry, {key});
  return value ? with_thousands(*value) : kNothing;
}

std::string number_of(const Json& entry, const char* key) {
  return number_or_nothing(find_number(entry, {key}));
}

void write_perplexity(HtmlWriter& html, const ReportData& data) {
  std::vector<std::vector<std::string>> rows;
  for_each_entry(
      data, "perplexity", [&](const char* model, const std::string& file, const Json& entry) {
        rows.push_back(
            {file,
             model,
             perplexity_text(entry),
             number_of(entry, "nll_mean"),
             count_of(entry, "tokens"),
             count_of(entry, "windows"),
             count_of(entry, "context"),
             text_or_nothing(find_text(entry, {"protocol"}))});
      });
  if (rows.empty()) {
    return;
  }
  html.element("h3", "Perplexity");
  std::stable_sort(
      rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a[0] < b[0]; });
  write_table(
      html,
      {{"text"},
       {"model"},
       {"perplexity", true},
       {"mean loss", true},
       {"tokens", true},
       {"windows", true},
       {"context", true},
       {"protocol"}},
      rows);
}

void write_divergence(HtmlWriter& html, const ReportData& data) {
  std::vector<std::vector<std::string>> rows;
  for_each_entry(
      data, "divergence", [&](const char* model, const std::string& file, const Json& entry) {
        if (std::string_view(model) == "result") {
          rows.push_back(
              {file,
               divergence_text(entry),
               number_of(entry, "kl_median"),
               number_of(entry, "kl_p99"),
               agreement_text(entry),
               number_of(entry, "ppl_ratio"),
               count_of(entry, "tokens")});
        }
      });
  if (rows.empty()) {
    return;
  }
  html.element("h3", "Divergence of the result from the original");
  write_table(
      html,
      {{"text"},
       {"mean KL", true},
       {"median", true},
       {"99th percentile", true},
       {"top-1 agreement", true},
       {"perplexity ratio", true},
       {"tokens", true}},
      rows);
}

std::string accuracy_text(const Json& entry, const char* value, const char* error) {
  const auto accuracy = find_number(entry, {value});
  if (!accuracy) {
    return kNothing;
  }
  std::optional<double> spread = find_number(entry, {error});
  if (spread) {
    *spread *= 100;
  }
  return with_error(100 * *accuracy, spread, 2) + " %";
}

void write_tasks(HtmlWriter& html, const ReportData& data) {
  std::vector<std::vector<std::string>> rows;
  for_each_entry(data, "tasks", [&](const char* model, const std::string& task, const Json& entry) {
    rows.push_back(
        {task,
         model,
         accuracy_text(entry, "acc", "acc_stderr"),
         accuracy_text(entry, "acc_norm", "acc_norm_stderr"),
         count_of(entry, "n"),
         count_of(entry, "shots")});
  });
  if (rows.empty()) {
    return;
  }
  html.element("h3", "Tasks");
  std::stable_sort(
      rows.begin(), rows.end(), [](const auto& a, const auto& b) { return a[0] < b[0]; });
  write_table(
      html,
      {{"task"},
       {"model"},
       {"accuracy", true},
       {"normalised", true},
       {"items", true},
       {"shots", true}},
      rows);
}

void write_file_table(HtmlWriter& html, const Json& files, std::string_view title) {
  std::vector<std::vector<std::string>> rows;
  for (const Json& file : files) {
    const auto size = find_number(file, {"size"});
    rows.push_back(
        {find_text(file, {"name"}),
         size ? with_thousands(*size) : kNothing,
         text_or_nothing(find_text(file, {"sha256"}))});
  }
  if (!rows.empty()) {
    html.element("h3", title);
    write_table(html, {{"file"}, {"bytes", true}, {"SHA-256"}}, rows);
  }
}

void write_coverage(HtmlWriter& html, const Json& manifest) {
  std::vector<std::vector<std::string>> rows;
  for (const Json& each : find_list(manifest, {"experts"})) {
    std::vector<std::string> row;
    for (const char* key :
         {"layer",
          "experts",
          "tokens_least",
          "tokens_median",
          "tokens_most",
          "unreached",
          "pooled",
          "plain"}) {
      row.push_back(count_of(each, key));
    }
    rows.push_back(std::move(row));
  }
  if (rows.empty()) {
    return;
  }
  html.element("h3", "Experts");
  html.element(
      "p",
      "How many tokens of the calibration reach an expert of the layer; a rare one is rounded on "
      "its own tokens pooled with those nearest to it, or plainly.",
      {{"class", "note"}});
  write_table(
      html,
      {{"layer", true},
       {"experts", true},
       {"fewest tokens", true},
       {"median", true},
       {"most", true},
       {"unreached", true},
       {"pooled", true},
       {"plain", true}},
      rows);
}

}  // namespace

void write_header_section(HtmlWriter& html, const ReportData& data) {
  const Json& manifest = data.manifest;
  const std::string model = find_text(manifest, {"source", "id"});
  html.open("header");
  html.element("h1", model.empty() ? "Quantized model" : model);
  html.element("p", target_of(manifest), {{"class", "target"}});
  const Verdict verdict = judge(data);
  html.open("p", {{"class", verdict_class(verdict.kind)}});
  html.element("strong", verdict.word);
  html.text(" " + verdict.reason);
  html.close();
  html.element(
      "p",
      fmt::format(
          "Verdict by the mean divergence from the original, on the text where it is largest: pass "
          "below {}, warn below {}, fail from there on (nats a token).",
          kPassBelow,
          kWarnBelow),
      {{"class", "note"}});
  html.open("div", {{"class", "tiles"}});
  write_tile(
      html,
      "size",
      before_after(
          find_number(manifest, {"source", "bytes"}),
          find_number(manifest, {"bytes"}),
          human_bytes));
  write_tile(
      html,
      "bits per weight",
      before_after(
          find_number(manifest, {"source", "bits_per_weight"}),
          find_number(manifest, {"bits_per_weight"}),
          bits_text));
  write_tile(
      html,
      "time to quantize",
      before_after(std::nullopt, find_number(manifest, {"seconds"}), human_duration));
  write_tile(
      html,
      "peak memory",
      before_after(std::nullopt, find_number(manifest, {"peak_rss_bytes"}), human_bytes));
  html.close();
  html.close();
  html.line();
}

void write_comparison_section(HtmlWriter& html, const ReportData& data) {
  open_section(html, "Before and after");
  std::vector<std::vector<std::string>> rows;
  for (const ComparisonRow& row : compare_runs(data)) {
    rows.push_back({row.label, row.original, row.result, row.ratio});
  }
  write_table(html, {{""}, {"original", true}, {"result", true}, {"ratio", true}}, rows);
  if (!data.original_eval && result_evaluation(data) == nullptr) {
    html.element("p", "Neither model was evaluated in this run.", {{"class", "note"}});
  } else {
    html.element("p", "± is one standard error.", {{"class", "note"}});
  }
  html.close();
}

void write_error_section(HtmlWriter& html, const ReportData& data) {
  const std::vector<LinearFacts> linears = linears_of(data.manifest);
  open_section(html, "Error by layer");
  if (linears.empty()) {
    html.element("p", "No linear was quantized.");
    html.close();
    return;
  }
  html.element(
      "p",
      "Each number is log10 of tr((W-Q) H (W-Q)ᵀ) / tr(W H Wᵀ), the squared error of a linear's "
      "output over the squared output, on the calibration inputs: -3 means a thousandth.",
      {{"class", "note"}});
  html.open("div", {{"class", "legend"}});
  write_heat_legend(html);
  html.close();
  html.open("div", {{"class", "maps"}});
  write_heat_map(html, linears);
  html.close();
  if (std::any_of(linears.begin(), linears.end(), [](const LinearFacts& linear) {
        return linear.rtn_ratio().has_value();
      })) {
    html.element("h3", "Against plain rounding");
    html.element(
        "p",
        "Error over that of rounding to the nearest on the same grid, by layer; below 1 (the heavy "
        "line) the method helped.",
        {{"class", "note"}});
    html.open("div", {{"class", "maps"}});
    write_ratio_panels(html, linears);
    html.close();
  }
  write_worst(html, linears);
  write_fallbacks(html, linears);
  write_coverage(html, data.manifest);
  html.close();
}

void write_hazard_section(HtmlWriter& html, const ReportData& data) {
  std::vector<std::vector<std::string>> rows;
  for (const Json& each : find_list(data.manifest, {"hazards"})) {
    const Json* facts = find_json(each, {"facts"});
    rows.push_back(
        {find_text(each, {"id"}),
         find_text(each, {"severity"}),
         facts == nullptr ? kNothing : facts_text(*facts),
         text_or_nothing(find_text(each, {"handled"}))});
  }
  const std::vector<std::vector<std::string>> ranges = range_rows(data.manifest);
  if (rows.empty() && ranges.empty()) {
    return;
  }
  open_section(html, "Hazards of the model");
  if (!rows.empty()) {
    write_table(html, {{"hazard"}, {"severity"}, {"facts"}, {"handled"}}, rows);
  }
  if (!ranges.empty()) {
    html.element("h3", "Ranges of down_proj");
    html.element(
        "p",
        "The mean of scale over min-max scale, and the relative error that plain rounding has with "
        "each way to find ranges; gain is that of the way used over min-max.",
        {{"class", "note"}});
    write_table(
        html,
        {{"linear"},
         {"threshold", true},
         {"min-max", true},
         {"MSE", true},
         {"weighted", true},
         {"output", true},
         {"gain", true}},
        ranges);
  }
  html.close();
}

void write_storage_section(HtmlWriter& html, const ReportData& data) {
  const std::vector<StorageShare> shares = storage_of(data.manifest);
  open_section(html, "Where the bytes are");
  if (!shares.empty()) {
    write_storage_bar(html, shares);
    write_storage_table(html, shares);
  }
  write_kept(html, data.manifest);
  write_census(html, data.manifest);
  html.close();
}

void write_quality_section(HtmlWriter& html, const ReportData& data) {
  if (!data.original_eval && result_evaluation(data) == nullptr) {
    return;
  }
  open_section(html, "Measured quality");
  write_perplexity(html, data);
  write_divergence(html, data);
  write_tasks(html, data);
  html.close();
}

void write_recipe_section(HtmlWriter& html, const ReportData& data) {
  const Json& manifest = data.manifest;
  open_section(html, "Recipe");
  if (const std::string command = find_text(manifest, {"command"}); !command.empty()) {
    html.element("h3", "Command");
    html.element("pre", command);
  }
  Json recipe = Json::object();
  for (const char* key : {"format", "method", "seed", "options", "calibration"}) {
    if (const Json* value = find_json(manifest, {key}); value != nullptr) {
      recipe[key] = *value;
    }
  }
  if (!recipe.empty()) {
    html.element("h3", "Settings");
    write_key_values(html, recipe);
  }
  // Rules of a plan are only worth a table where one was followed.
  std::map<std::string, std::size_t> rules;
  for (const LinearFacts& linear : linears_of(manifest)) {
    if (!linear.rule.empty()) {
      ++rules[linear.rule];
    }
  }
  if (!rules.empty()) {
    html.element("h3", "Rules");
    std::vector<std::vector<std::string>> rows;
    rows.reserve(rules.size());
    for (const auto& [rule, count] : rules) {
      rows.push_back({rule, fmt::format("{}", count)});
    }
    write_table(html, {{"rule"}, {"linears", true}}, rows);
  }
  html.close();
}

void write_environment_section(HtmlWriter& html, const ReportData& data) {
  const Json& manifest = data.manifest;
  open_section(html, "Environment and resources");
  if (const Json* program = find_json(manifest, {"program"}); program != nullptr) {
    write_key_values(html, *program);
  }
  std::vector<std::vector<std::string>> rows;
  const auto add = [&](const char* label, const char* key, std::string (*format)(double)) {
    const auto actual = find_number(manifest, {key});
    const auto predicted = find_number(manifest, {"predicted", key});
    if (actual || predicted) {
      rows.push_back(
          {label,
           predicted ? format(*predicted) : kNothing,
           actual ? format(*actual) : kNothing,
           ratio_text(actual, predicted)});
    }
  };
  add("size of the result", "bytes", human_bytes);
  add("bits per weight", "bits_per_weight", bits_text);
  add("time", "seconds", human_duration);
  add("processor time", "cpu_seconds", human_duration);
  add("peak memory", "peak_rss_bytes", human_bytes);
  add("peak memory, mapped files aside", "peak_anonymous_bytes", human_bytes);
  if (!rows.empty()) {
    write_table(
        html, {{""}, {"predicted", true}, {"actual", true}, {"actual / predicted", true}}, rows);
  }
  html.close();
}

void write_files_section(HtmlWriter& html, const ReportData& data) {
  const Json& source = find_list(data.manifest, {"source", "files"});
  const Json& output = find_list(data.manifest, {"files"});
  if (source.empty() && output.empty()) {
    return;
  }
  open_section(html, "Files");
  write_file_table(html, source, "Source");
  write_file_table(html, output, "Result");
  html.close();
}

}  // namespace quern
