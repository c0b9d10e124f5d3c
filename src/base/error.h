// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>
#include <string>

namespace quern {

// What kind of failure ended a request. Each kind maps to one exit code of the command line.
enum class ErrorKind { kFailed, kUsage, kInput, kResource, kGate, kNetwork, kInterrupted };

// Base of every exception that quern throws on purpose. Four facts, so that a person can act:
// `what` failed, `where` (file, byte offset, tensor, config key or option; may be empty),
// `reason` (the measured facts: expected X, found Y) and `hint` (one thing to do).
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, std::string what, std::string where, std::string reason, std::string hint);

  [[nodiscard]] ErrorKind kind() const noexcept { return kind_; }
  [[nodiscard]] const std::string& failed() const noexcept { return failed_; }
  [[nodiscard]] const std::string& where() const noexcept { return where_; }
  [[nodiscard]] const std::string& reason() const noexcept { return reason_; }
  [[nodiscard]] const std::string& hint() const noexcept { return hint_; }

  // The three lines of the contract: `error: what, where` / `reason: …` / `try: …`.
  // Control characters and line ends that came from a file are escaped, so it is always 3 lines.
  [[nodiscard]] std::string three_lines() const;

 private:
  ErrorKind kind_;
  std::string failed_;
  std::string where_;
  std::string reason_;
  std::string hint_;
};

// Bytes or values that break the rules of their format. Exit code 3.
class ParseError : public Error {
 public:
  ParseError(std::string what, std::string where, std::string reason, std::string hint)
      : Error(
            ErrorKind::kInput,
            std::move(what),
            std::move(where),
            std::move(reason),
            std::move(hint)) {}
};

// Well-formed input that quern does not handle. Exit code 3.
class UnsupportedError : public Error {
 public:
  UnsupportedError(std::string what, std::string where, std::string reason, std::string hint)
      : Error(
            ErrorKind::kInput,
            std::move(what),
            std::move(where),
            std::move(reason),
            std::move(hint)) {}
};

// The operating system refused: a file is missing, unreadable or cannot be written. Exit code 3
// for inputs; use ErrorKind::kFailed through Error for outputs.
class IoError : public Error {
 public:
  IoError(
      std::string what,
      std::string where,
      std::string reason,
      std::string hint,
      ErrorKind kind = ErrorKind::kInput)
      : Error(kind, std::move(what), std::move(where), std::move(reason), std::move(hint)) {}
};

// Memory or disk that is not there. Exit code 4.
class ResourceError : public Error {
 public:
  ResourceError(std::string what, std::string where, std::string reason, std::string hint)
      : Error(
            ErrorKind::kResource,
            std::move(what),
            std::move(where),
            std::move(reason),
            std::move(hint)) {}
};

// An option, combination or file name that the person typed. Exit code 2.
class UsageError : public Error {
 public:
  UsageError(std::string what, std::string where, std::string reason, std::string hint)
      : Error(
            ErrorKind::kUsage,
            std::move(what),
            std::move(where),
            std::move(reason),
            std::move(hint)) {}
};

// SIGINT; the state is saved. Exit code 130.
class InterruptedError : public Error {
 public:
  InterruptedError(std::string what, std::string where, std::string reason, std::string hint)
      : Error(
            ErrorKind::kInterrupted,
            std::move(what),
            std::move(where),
            std::move(reason),
            std::move(hint)) {}
};

// 0 done, 1 failed, 2 usage, 3 input, 4 resource, 5 gate, 6 network, 130 interrupted.
[[nodiscard]] int exit_code(ErrorKind kind) noexcept;

// Text from files made safe for a terminal line: control bytes and invalid UTF-8 become \xNN, and
// what is longer than `limit` bytes is cut.
[[nodiscard]] std::string printable(const std::string& text, std::size_t limit = 200);

}  // namespace quern
