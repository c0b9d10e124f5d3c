// SPDX-License-Identifier: Apache-2.0
#include "format/fused_experts.h"

#include "tensor/divided.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>

namespace quern {
namespace {

constexpr std::string_view kGateUp = ".experts.gate_up_proj";
constexpr std::string_view kDown = ".experts.down_proj";

class SplitStore : public DividedStore {
 public:
  SplitStore(
      std::unique_ptr<TensorStore> store,
      std::map<std::string, TensorView> tensors,
      std::map<std::string, std::int64_t> divided)
      : store_(std::move(store)), tensors_(std::move(tensors)), divided_(std::move(divided)) {}

  [[nodiscard]] const TensorView* find(const std::string& name) const override {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : &found->second;
  }
  [[nodiscard]] const std::map<std::string, TensorView>& tensors() const override {
    return tensors_;
  }
  void release(const TensorView& view) const override { store_->release(view); }
  [[nodiscard]] std::map<std::string, std::int64_t> divided() const override { return divided_; }

 private:
  std::unique_ptr<TensorStore> store_;
  std::map<std::string, TensorView> tensors_;
  std::map<std::string, std::int64_t> divided_;
};

// Rows [begin, begin + rows) of all rows of a tensor [experts, …, width].
TensorView matrix_of(const TensorView& fused, std::int64_t begin, std::int64_t rows) {
  const std::int64_t width = fused.shape[2];
  const auto row = static_cast<std::size_t>(width) * dtype_size(fused.dtype);
  return {
      fused.dtype,
      {rows, width},
      fused.bytes.subspan(
          static_cast<std::size_t>(begin) * row, static_cast<std::size_t>(rows) * row)};
}

// The other orientation, [experts, hidden, 2 width], belongs to families that quern does not run.
bool fits(const TensorView& gate_up, const TensorView* down) {
  return down != nullptr && gate_up.shape.size() == 3 && down->shape.size() == 3 &&
         gate_up.shape[0] == down->shape[0] && gate_up.shape[1] == 2 * down->shape[2] &&
         gate_up.shape[2] == down->shape[1];
}

}  // namespace

std::unique_ptr<TensorStore> split_fused_experts(std::unique_ptr<TensorStore> store) {
  std::map<std::string, TensorView> tensors = store->tensors();
  std::map<std::string, std::int64_t> divided;
  for (const auto& [name, gate_up] : store->tensors()) {
    if (!name.ends_with(kGateUp)) {
      continue;
    }
    const std::string base = name.substr(0, name.size() - kGateUp.size());
    const TensorView* down = store->find(base + std::string(kDown));
    if (!fits(gate_up, down)) {
      continue;
    }
    divided[name] = 2 * gate_up.shape[0];
    divided[base + std::string(kDown)] = gate_up.shape[0];
    const std::int64_t width = down->shape[2];
    for (std::int64_t e = 0; e < gate_up.shape[0]; ++e) {
      const std::string expert = fmt::format("{}.experts.{}.", base, e);
      tensors[expert + "gate_proj.weight"] = matrix_of(gate_up, 2 * e * width, width);
      tensors[expert + "up_proj.weight"] = matrix_of(gate_up, (2 * e + 1) * width, width);
      tensors[expert + "down_proj.weight"] = matrix_of(*down, e * down->shape[1], down->shape[1]);
    }
    tensors.erase(name);
    tensors.erase(base + std::string(kDown));
  }
  if (divided.empty()) {
    return store;
  }
  return std::make_unique<SplitStore>(std::move(store), std::move(tensors), std::move(divided));
}

}  // namespace quern
