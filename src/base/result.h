// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <utility>
#include <variant>

namespace quern {

// A value, or why there is none. For failures that the caller expects and answers (a factorisation
// that fails, a format probe); what ends the request is thrown instead.
template <class T>
class Result {
 public:
  Result(T value)
      : state_(std::in_place_index<0>, std::move(value)) {}  // NOLINT(google-explicit-constructor)
  static Result failure(std::string reason) { return Result(Failure{std::move(reason)}); }

  [[nodiscard]] bool ok() const noexcept { return state_.index() == 0; }
  explicit operator bool() const noexcept { return ok(); }
  [[nodiscard]] T& value() & { return std::get<0>(state_); }
  [[nodiscard]] const T& value() const& { return std::get<0>(state_); }
  [[nodiscard]] T&& value() && { return std::get<0>(std::move(state_)); }
  [[nodiscard]] const std::string& reason() const { return std::get<1>(state_).reason; }

 private:
  struct Failure {
    std::string reason;
  };
  explicit Result(Failure failure) : state_(std::in_place_index<1>, std::move(failure)) {}
  std::variant<T, Failure> state_;
};

}  // namespace quern
