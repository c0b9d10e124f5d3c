// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/process.h"
#include "base/units.h"
#include "cli/verb.h"

#include <fmt/format.h>

#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <utility>

namespace quern {
namespace {

// A signal handler can reach nothing else.
std::atomic<int> interrupts = 0;  // NOLINT(cppcoreguidelines-avoid-non-const-global-variables)

void on_interrupt(int) {
  if (interrupts.fetch_add(1) >= 1) {
    constexpr int kInterrupted = 130;
    ::_exit(kInterrupted);  // files appear by rename only: stopping at once is safe
  }
}

LogLevel level_of(const GlobalOptions& options) {
  if (options.quiet) {
    return LogLevel::kError;
  }
  return options.verbose ? LogLevel::kDetail : LogLevel::kInfo;
}

int thread_count(int asked) {
  return asked > 0 ? asked : usable_cpus();
}

}  // namespace

Session::Session(const GlobalOptions& options, std::vector<std::string> arguments)
    : options_(options),
      arguments_(std::move(arguments)),
      cpu_(detect_cpu()),
      log_({level_of(options), options.log_format == "json"}),
      pool_(thread_count(options.threads)),
      kernels_(make_kernel_table(cpu_, options.isa)),
      blas_(cpu_) {
  Context context{pool_, kernels_, blas_, log_};
  context.seed = options.seed;
  context.memory_budget =
      options.memory.empty() ? memory_limit() / 10 * 9 : parse_size(options.memory, "--memory");
  context.interrupts = &interrupts;
  context_.emplace(context);
  std::signal(SIGINT, on_interrupt);
}

std::string Session::command() const {
  std::string text = "quern";
  for (const std::string& argument : arguments_) {
    const bool plain =
        !argument.empty() &&
        argument.find_first_not_of(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:=@,+") ==
            std::string::npos;
    std::string quoted;
    for (const char c : argument) {
      quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
    }
    text += plain ? " " + argument : " '" + quoted + "'";
  }
  return text;
}

void Session::print_json(const Json& document) const {
  if (options_.json) {
    const std::string text = document.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  }
}

void Session::print_text(const std::string& text) const {
  if (!options_.json) {
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fflush(stdout);
  }
}

void add_footer(CLI::App& app, const std::string& examples) {
  app.footer(
      "Examples:\n" + examples +
      "\nExit codes: 0 done, 1 failed, 2 usage, 3 input unreadable or unsupported, 4 not enough "
      "memory or disk,\n"
      "            5 quality gate not met, 6 network or offline miss, 130 interrupted with the "
      "state saved\n");
}

}  // namespace quern
