// SPDX-License-Identifier: Apache-2.0
#include "base/process.h"
#include "base/units.h"
#include "cli/verb.h"
#include "pipeline/estimate.h"

#include <fmt/format.h>

#include <filesystem>
#include <system_error>

namespace quern {
namespace {

// One thing looked at: what was found, and whether it will do.
struct Finding {
  std::string name;
  bool good;
  std::string found;
  std::string advice;  // when it will not
};

std::vector<Finding> examine(const Session& session) {
  const Context& ctx = session.context();
  std::vector<Finding> findings;
  findings.push_back(
      {"cpu",
       session.cpu().avx2,
       session.cpu().name + ", kernels for " + ctx.kernels.isa,
       "without AVX2 everything is many times slower"});
  constexpr double kSlow = 10e9;
  const double flops = 2 * measure_rate(ctx);
  findings.push_back(
      {"dense products",
       flops / ctx.pool.size() > kSlow,
       fmt::format(
           "{}: {:.0f} GFLOP/s on {} threads",
           ctx.blas.description(),
           flops / 1e9,
           ctx.pool.size()),
       "the library does not know this CPU: set OPENBLAS_CORETYPE (HASWELL suits any with AVX2)"});
  constexpr std::uint64_t kSmall = std::uint64_t{2} << 30U;
  const std::uint64_t memory = memory_limit();
  findings.push_back(
      {"memory",
       memory > kSmall,
       human_bytes(static_cast<double>(memory)),
       "large models need more; --memory bounds what quern takes"});
  std::error_code code;
  const auto here = std::filesystem::current_path(code);
  const auto space = std::filesystem::space(here, code);
  findings.push_back(
      {"disk here",
       !code && space.available > kSmall,
       code ? code.message() : human_bytes(static_cast<double>(space.available)) + " free",
       "choose another place for the output and --work-dir"});
  const auto temporary = std::filesystem::temp_directory_path(code);
  findings.push_back(
      {"temporary files", !code, code ? code.message() : temporary.string(), "set TMPDIR"});
  return findings;
}

int run_doctor(Session& session) {
  Json rows = Json::array();
  std::string text;
  bool good = true;
  for (const Finding& finding : examine(session)) {
    good = good && finding.good;
    rows.push_back(
        {{"name", finding.name},
         {"ok", finding.good},
         {"found", finding.found},
         {"advice", finding.good ? Json(nullptr) : Json(finding.advice)}});
    text +=
        fmt::format("{:<5} {:<16} {}\n", finding.good ? "ok" : "look", finding.name, finding.found);
    if (!finding.good) {
      text += fmt::format("{:<22} {}\n", "", finding.advice);
    }
  }
  text +=
      "\nexit code 137 of an earlier run means that the system killed it for memory: give --memory "
      "a smaller size;\n"
      "the same command again goes on where it stopped.\n";
  session.print_json({{"schema", "quern.doctor/1"}, {"ok", good}, {"findings", std::move(rows)}});
  session.print_text(text);
  return good ? 0 : 1;
}

}  // namespace

std::function<int(Session&)> configure_doctor(CLI::App& app) {
  add_footer(app, "  quern doctor\n");
  return run_doctor;
}

}  // namespace quern
