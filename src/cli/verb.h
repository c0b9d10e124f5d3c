// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "base/json.h"
#include "kernels/blas.h"
#include "kernels/kernels.h"

#include <CLI/CLI.hpp>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace quern {

// The options that every verb takes.
struct GlobalOptions {
  int threads = 0;  // 0: all usable CPUs
  std::string memory;
  std::string isa;
  std::uint64_t seed = 0;
  bool json = false;
  bool quiet = false;
  bool verbose = false;
  std::string log_format = "text";
};

// What main makes once for the verb that runs: pool, kernels, BLAS, log, in one Context.
class Session {
 public:
  Session(const GlobalOptions& options, std::vector<std::string> arguments);

  [[nodiscard]] const Context& context() const { return *context_; }
  [[nodiscard]] const CpuFeatures& cpu() const { return cpu_; }
  [[nodiscard]] const GlobalOptions& options() const { return options_; }
  // The command as the person typed it, quoted for a shell.
  [[nodiscard]] std::string command() const;

  // With --json, the one document on stdout.
  void print_json(const Json& document) const;
  // Without --json, a result for people on stdout.
  void print_text(const std::string& text) const;

 private:
  GlobalOptions options_;
  std::vector<std::string> arguments_;
  CpuFeatures cpu_;
  Log log_;
  ThreadPool pool_;
  KernelTable kernels_;
  Blas blas_;
  std::optional<Context> context_;
};

// A verb: one file, one line in main.cpp. `configure` declares the options and returns what runs
// when the verb was typed; its result is the exit code.
struct Verb {
  const char* name;
  const char* summary;
  std::function<int(Session&)> (*configure)(CLI::App& app);
};

[[nodiscard]] std::function<int(Session&)> configure_compare(CLI::App& app);
[[nodiscard]] std::function<int(Session&)> configure_doctor(CLI::App& app);
[[nodiscard]] std::function<int(Session&)> configure_eval(CLI::App& app);
[[nodiscard]] std::function<int(Session&)> configure_export(CLI::App& app);
[[nodiscard]] std::function<int(Session&)> configure_generate(CLI::App& app);
[[nodiscard]] std::function<int(Session&)> configure_info(CLI::App& app);
[[nodiscard]] std::function<int(Session&)> configure_inspect(CLI::App& app);
[[nodiscard]] std::function<int(Session&)> configure_logits(CLI::App& app);
[[nodiscard]] std::function<int(Session&)> configure_plan(CLI::App& app);
[[nodiscard]] std::function<int(Session&)> configure_quantize(CLI::App& app);
[[nodiscard]] std::function<int(Session&)> configure_report(CLI::App& app);
[[nodiscard]] std::function<int(Session&)> configure_tokenize(CLI::App& app);
[[nodiscard]] std::function<int(Session&)> configure_verify(CLI::App& app);

// MODEL as typed: a local directory or file; a hub id `org/name[@revision]` is looked up in the
// local hub cache. Throws UsageError, or Error(kNetwork) for a hub id that is not there.
[[nodiscard]] std::filesystem::path resolve_model(const std::string& text);

// For ->check(): a number from `low` to `high`; unlike CLI::Range, NaN is none.
[[nodiscard]] CLI::Validator number_within(double low, double high);

// The example and the exit codes at the end of a verb's help.
void add_footer(CLI::App& app, const std::string& examples);

}  // namespace quern
