// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "report/report.h"

#include <optional>
#include <string>
#include <vector>

namespace quern {

// The result's evaluation: the document given, or the one that the manifest carries.
[[nodiscard]] const Json* result_evaluation(const ReportData& data);

// A quantity before and after, as text; "-" for what was not measured.
struct ComparisonRow {
  std::string label;
  std::string original;
  std::string result;
  std::string ratio;  // result over original
};
[[nodiscard]] std::vector<ComparisonRow> compare_runs(const ReportData& data);

// The gate: mean Kullback-Leibler divergence from the original in nats a token, on the text where
// it is largest. A divergence of 0.05 is about what good 4-bit files of a few billion parameters
// show; from 0.2 on the answers differ visibly.
inline constexpr double kPassBelow = 0.05;
inline constexpr double kWarnBelow = 0.2;

enum class VerdictKind { kPass, kWarn, kFail, kUnmeasured };
struct Verdict {
  VerdictKind kind = VerdictKind::kUnmeasured;
  std::string word;  // "pass", "warn", "fail", "not measured"
  std::string reason;  // the number, the text and the threshold
};
[[nodiscard]] Verdict judge(const ReportData& data);

// "7.123 ± 0.045", or without the error when there is none.
[[nodiscard]] std::string with_error(double value, std::optional<double> error, int digits);
// Perplexity's standard error from that of the mean loss: d exp(x) = exp(x) dx.
[[nodiscard]] std::string perplexity_text(const Json& entry);
[[nodiscard]] std::string divergence_text(const Json& entry);
[[nodiscard]] std::string agreement_text(const Json& entry);  // "93.1 % ± 0.1"
[[nodiscard]] std::string ratio_text(std::optional<double> result, std::optional<double> original);

}  // namespace quern
