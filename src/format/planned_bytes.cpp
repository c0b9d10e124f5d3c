// SPDX-License-Identifier: Apache-2.0
#include "format/planned_bytes.h"

#include <fmt/format.h>

#include <stdexcept>

namespace quern {
namespace {

[[noreturn]] void misuse(const std::string& name, const std::string& reason) {
  throw std::logic_error("tensor " + name + ": " + reason);
}

}  // namespace

void PlannedBytes::plan(const std::string& name, std::uint64_t bytes) {
  items_.emplace(name, Item{bytes, 0, false});
}

PlannedBytes::Item& PlannedBytes::at(const std::string& name) {
  const auto item = items_.find(name);
  if (item == items_.end()) {
    misuse(name, "not declared");
  }
  return item->second;
}

std::uint64_t PlannedBytes::append(const std::string& name, std::uint64_t bytes) {
  Item& item = at(name);
  if (bytes > item.bytes - item.written) {
    misuse(name, fmt::format("more than its {} bytes", item.bytes));
  }
  item.touched = true;
  item.written += bytes;
  return item.written - bytes;
}

void PlannedBytes::write(const std::string& name, std::uint64_t bytes) {
  const Item& item = at(name);
  if (item.bytes != bytes) {
    misuse(name, fmt::format("expected {} bytes, got {}", item.bytes, bytes));
  }
  if (item.touched) {
    misuse(name, "written twice");
  }
  (void)append(name, bytes);
}

void PlannedBytes::check_complete() const {
  for (const auto& [name, item] : items_) {
    if (!item.touched || item.written != item.bytes) {
      misuse(name, "not written completely");
    }
  }
}

}  // namespace quern
