// SPDX-License-Identifier: Apache-2.0
#include "report/comparison.h"

#include "base/error.h"
#include "base/units.h"
#include "report/facts.h"

#include <fmt/format.h>
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

namespace quern {
namespace {

constexpr const char* kNothing = "-";

// The entries of `section` ("perplexity", "divergence") by file name, of either document.
std::vector<std::string> files_of(const Json* first, const Json* second, const char* section) {
  std::vector<std::string> names;
  for (const Json* document : {first, second}) {
    const Json* entries = document == nullptr ? nullptr : find_json(*document, {section});
    if (entries == nullptr || !entries->is_object()) {
      continue;
    }
    for (const auto& item : entries->items()) {
      if (std::find(names.begin(), names.end(), item.key()) == names.end()) {
        names.push_back(item.key());
      }
    }
  }
  return names;
}

const Json* entry_of(const Json* document, const char* section, const std::string& name) {
  return document == nullptr ? nullptr : find_json(*document, {section, name.c_str()});
}

using Format = std::function<std::string(double)>;

ComparisonRow number_row(
    const std::string& label,
    std::optional<double> original,
    std::optional<double> result,
    const Format& format) {
  return {
      label,
      original ? format(*original) : kNothing,
      result ? format(*result) : kNothing,
      ratio_text(result, original)};
}

std::optional<double> number_of(const Json* document, JsonPath path) {
  return document == nullptr ? std::nullopt : find_number(*document, path);
}

std::size_t width_of(const std::string& text) {
  std::size_t width = 0;
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  auto left = static_cast<utf8proc_ssize_t>(text.size());
  while (left > 0) {
    utf8proc_int32_t point = 0;
    const utf8proc_ssize_t length =
        std::max<utf8proc_ssize_t>(utf8proc_iterate(bytes, left, &point), 1);
    width += static_cast<std::size_t>(std::max(0, utf8proc_charwidth(point)));
    bytes += length;
    left -= length;
  }
  return width;
}

}  // namespace

const Json* result_evaluation(const ReportData& data) {
  return data.result_eval ? &*data.result_eval : find_json(data.manifest, {"evaluation"});
}

std::string with_error(double value, std::optional<double> error, int digits) {
  return error ? fmt::format("{:.{}f} ± {:.{}f}", value, digits, *error, digits)
               : fmt::format("{:.{}f}", value, digits);
}

std::string perplexity_text(const Json& entry) {
  const auto perplexity = find_number(entry, {"ppl"});
  if (!perplexity) {
    return kNothing;
  }
  std::optional<double> error = find_number(entry, {"nll_stderr"});
  if (error) {
    *error *= *perplexity;
  }
  return *perplexity < 1e5 ? with_error(*perplexity, error, 3) : fmt::format("{:.4g}", *perplexity);
}

std::string divergence_text(const Json& entry) {
  const auto mean = find_number(entry, {"kl_mean"});
  return mean ? with_error(*mean, find_number(entry, {"kl_stderr"}), 5) : kNothing;
}

std::string agreement_text(const Json& entry) {
  const auto share = find_number(entry, {"top1_agreement"});
  if (!share) {
    return kNothing;
  }
  const auto tokens = find_number(entry, {"tokens"});
  std::optional<double> error;
  if (tokens && *tokens > 1 && *share >= 0 && *share <= 1) {
    error = 100 * std::sqrt(*share * (1 - *share) / *tokens);
  }
  return with_error(100 * *share, error, 2) + " %";
}

std::string ratio_text(std::optional<double> result, std::optional<double> original) {
  if (!result || !original || *original == 0) {
    return kNothing;
  }
  return fmt::format("{:.3f} x", *result / *original);
}

std::vector<ComparisonRow> compare_runs(const ReportData& data) {
  const Json* before = data.original_eval ? &*data.original_eval : nullptr;
  const Json* after = result_evaluation(data);
  const Json& manifest = data.manifest;

  std::vector<ComparisonRow> rows;
  rows.push_back(number_row(
      "size",
      find_number(manifest, {"source", "bytes"}),
      find_number(manifest, {"bytes"}),
      human_bytes));
  rows.push_back(number_row(
      "bits per weight",
      find_number(manifest, {"source", "bits_per_weight"}),
      find_number(manifest, {"bits_per_weight"}),
      [](double bits) { return fmt::format("{:.3f}", bits); }));
  for (const std::string& name : files_of(before, after, "perplexity")) {
    const Json* original = entry_of(before, "perplexity", name);
    const Json* result = entry_of(after, "perplexity", name);
    rows.push_back(
        {"perplexity, " + name,
         original == nullptr ? kNothing : perplexity_text(*original),
         result == nullptr ? kNothing : perplexity_text(*result),
         ratio_text(number_of(result, {"ppl"}), number_of(original, {"ppl"}))});
  }
  for (const std::string& name : files_of(nullptr, after, "divergence")) {
    const Json& result = *entry_of(after, "divergence", name);
    rows.push_back({"mean KL, " + name, "reference", divergence_text(result), kNothing});
    rows.push_back({"top-1 agreement, " + name, "reference", agreement_text(result), kNothing});
  }
  rows.push_back(number_row(
      "evaluation time",
      number_of(before, {"seconds"}),
      number_of(after, {"seconds"}),
      human_duration));
  rows.push_back(number_row(
      "peak memory",
      number_of(before, {"peak_rss_bytes"}),
      number_of(after, {"peak_rss_bytes"}),
      human_bytes));
  return rows;
}

Verdict judge(const ReportData& data) {
  const Json* after = result_evaluation(data);
  std::optional<double> worst;
  std::string where;
  for (const std::string& name : files_of(nullptr, after, "divergence")) {
    const auto mean = number_of(after, {"divergence", name.c_str(), "kl_mean"});
    if (mean && (!worst || *mean > *worst)) {
      worst = mean;
      where = name;
    }
  }
  if (!worst) {
    return {
        VerdictKind::kUnmeasured,
        "not measured",
        "no divergence from the original was measured; evaluate with a reference for a verdict"};
  }
  const std::string found = fmt::format("mean KL {:.5f} nats a token on {}", *worst, where);
  if (*worst < kPassBelow) {
    return {VerdictKind::kPass, "pass", fmt::format("{}, below {}", found, kPassBelow)};
  }
  if (*worst < kWarnBelow) {
    return {
        VerdictKind::kWarn,
        "warn",
        fmt::format("{}, between {} and {}", found, kPassBelow, kWarnBelow)};
  }
  return {VerdictKind::kFail, "fail", fmt::format("{}, not below {}", found, kWarnBelow)};
}

std::string render_text_summary(const ReportData& data) {
  std::vector<ComparisonRow> rows = {{"", "original", "result", "ratio"}};
  const std::vector<ComparisonRow> measured = compare_runs(data);
  rows.insert(rows.end(), measured.begin(), measured.end());

  std::vector<std::array<std::string, 4>> cells;
  std::array<std::size_t, 4> widths = {};
  for (const ComparisonRow& row : rows) {
    cells.push_back({printable(row.label, 60), row.original, row.result, row.ratio});
    for (std::size_t i = 0; i < widths.size(); ++i) {
      widths.at(i) = std::max(widths.at(i), width_of(cells.back().at(i)));
    }
  }
  std::string out;
  for (const auto& row : cells) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string padding(widths.at(i) - width_of(row.at(i)), ' ');
      // The labels are flush left, the numbers right: no line ends in a space.
      out += i == 0 ? row.at(i) + padding : "  " + padding + row.at(i);
    }
    out += '\n';
  }
  const Verdict verdict = judge(data);
  return out + fmt::format("{}: {}\n", verdict.word, printable(verdict.reason, 160));
}

}  // namespace quern
