// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"
#include "base/process.h"
#include "base/units.h"
#include "cli/verb.h"

#include <fmt/format.h>

#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <string_view>
#include <system_error>
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

// Another process cut a file off that we have mapped, or its disk failed.
void on_bus_error(int) {
  constexpr std::string_view kText =
      "error: a file could not be read to its end\n"
      "reason: it became shorter while it was in use, or its disk failed\n"
      "try: check the model's files and run the same command again\n";
  const auto written = ::write(STDERR_FILENO, kText.data(), kText.size());
  ::_exit(written > 0 ? exit_code(ErrorKind::kInput) : 1);
}

void print(const std::string& text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw IoError(
        "cannot write the result",
        "standard output",
        std::error_code(errno, std::generic_category()).message(),
        "check where it is sent",
        ErrorKind::kFailed);
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
  std::signal(SIGBUS, on_bus_error);
}

std::string Session::command() const {
  std::string text = "quern";
  bool skips = false;
  for (const std::string& argument : arguments_) {
    // The number of threads changes no byte of a result, and so is not in its card either.
    const bool skipped = skips || argument == "--threads" || argument.starts_with("--threads=");
    skips = !skips && argument == "--threads";
    if (skipped) {
      continue;
    }
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
    print(document.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
  }
}

void Session::print_text(const std::string& text) const {
  if (!options_.json) {
    print(text);
  }
}

CLI::Validator number_within(double low, double high) {
  return CLI::Validator(
      [=](std::string& text) {
        double value = 0;
        const bool good = CLI::detail::lexical_cast(text, value) && value >= low && value <= high;
        return good ? std::string()
                    : fmt::format("Value {} not in range {} to {}", text, low, high);
      },
      fmt::format("FLOAT in [{} - {}]", low, high));
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
