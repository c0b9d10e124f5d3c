// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace quern {

enum class LogLevel { kError, kWarning, kInfo, kDetail };

// Lines for people (or, with the json format, one object a line) on stderr. Passed by Context; the
// library itself never writes to stdout.
class Log {
 public:
  struct Options {
    LogLevel level = LogLevel::kInfo;
    bool json = false;
  };
  explicit Log(Options options);
  Log(const Log&) = delete;
  Log& operator=(const Log&) = delete;
  ~Log();

  void error(std::string_view text) { write(LogLevel::kError, text); }
  void warning(std::string_view text) { write(LogLevel::kWarning, text); }
  void info(std::string_view text) { write(LogLevel::kInfo, text); }
  void detail(std::string_view text) { write(LogLevel::kDetail, text); }
  [[nodiscard]] bool shows(LogLevel level) const noexcept { return level <= options_.level; }
  [[nodiscard]] const Options& options() const noexcept { return options_; }

  // One sticky line at the bottom of a terminal, redrawn after each log line; on anything else a
  // plain line every 30 seconds. Empty text removes it.
  void progress(std::string_view text);

 private:
  struct State;
  void write(LogLevel level, std::string_view text);

  Options options_;
  std::unique_ptr<State> state_;
};

}  // namespace quern
