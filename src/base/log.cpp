// SPDX-License-Identifier: Apache-2.0
#include "base/log.h"

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <sys/ioctl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <mutex>

namespace quern {
namespace {

using Clock = std::chrono::steady_clock;

bool stderr_is_terminal() {
  const char* term = std::getenv("TERM");  // NOLINT(concurrency-mt-unsafe): read at start only
  return ::isatty(STDERR_FILENO) == 1 && (term == nullptr || std::string_view(term) != "dumb");
}

const char* level_name(LogLevel level) {
  switch (level) {
    case LogLevel::kError: return "error";
    case LogLevel::kWarning: return "warning";
    case LogLevel::kInfo: return "info";
    case LogLevel::kDetail: return "detail";
  }
  return "info";
}

}  // namespace

struct Log::State {
  std::shared_ptr<spdlog::logger> logger;
  std::mutex mutex;
  bool terminal = stderr_is_terminal();
  std::string sticky;
  Clock::time_point last_plain = Clock::now() - std::chrono::hours(1);

  void clear_sticky() const {
    if (terminal && !sticky.empty()) {
      std::fputs("\r\x1b[K", stderr);
    }
  }
  void draw_sticky() const {
    if (terminal && !sticky.empty()) {
      struct winsize size {};
      std::size_t width = 80;
      if (::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 10) {
        width = size.ws_col;
      }
      std::fputs(("\r\x1b[K" + sticky.substr(0, width - 1)).c_str(), stderr);
      std::fflush(stderr);
    }
  }
};

Log::Log(Options options) : options_(options), state_(std::make_unique<State>()) {
  auto sink = std::make_shared<spdlog::sinks::stderr_sink_mt>();
  state_->logger = std::make_shared<spdlog::logger>("quern", std::move(sink));
  state_->logger->set_pattern("%v");
  state_->logger->set_level(spdlog::level::trace);
  state_->logger->flush_on(spdlog::level::trace);
}

Log::~Log() {
  state_->clear_sticky();
}

void Log::write(LogLevel level, std::string_view text) {
  if (!shows(level)) {
    return;
  }
  const std::lock_guard lock(state_->mutex);
  state_->clear_sticky();
  if (options_.json) {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    const nlohmann::ordered_json line = {
        {"time", std::chrono::duration<double>(now).count()},
        {"level", level_name(level)},
        {"message", text}};
    state_->logger->info(
        "{}", line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
  } else if (level == LogLevel::kWarning) {
    state_->logger->info("warning: {}", text);
  } else {
    state_->logger->info("{}", text);
  }
  state_->draw_sticky();
}

void Log::progress(std::string_view text) {
  if (!shows(LogLevel::kInfo)) {
    return;
  }
  std::unique_lock lock(state_->mutex);
  if (state_->terminal && !options_.json) {
    state_->clear_sticky();
    state_->sticky = text;
    state_->draw_sticky();
    return;
  }
  const auto now = Clock::now();
  if (text.empty() || now - state_->last_plain < std::chrono::seconds(30)) {
    return;
  }
  state_->last_plain = now;
  lock.unlock();
  write(LogLevel::kInfo, text);
}

}  // namespace quern
