// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace quern {

// How much of each planned tensor a writer has written. Mistakes are std::logic_error.
class PlannedBytes {
 public:
  void plan(const std::string& name, std::uint64_t bytes);

  // Accounts for a piece of a tensor; returns how many of its bytes were written before.
  std::uint64_t append(const std::string& name, std::uint64_t bytes);
  // The same for the whole tensor at once.
  void write(const std::string& name, std::uint64_t bytes);
  void check_complete() const;

 private:
  struct Item {
    std::uint64_t bytes = 0;
    std::uint64_t written = 0;
    bool touched = false;
  };
  [[nodiscard]] Item& at(const std::string& name);

  std::map<std::string, Item> items_;
};

}  // namespace quern
