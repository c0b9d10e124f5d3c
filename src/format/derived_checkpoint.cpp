// SPDX-License-Identifier: Apache-2.0
#include "format/derived_checkpoint.h"

#include "format/formats.h"
#include "tensor/divided.h"

#include <mutex>
#include <utility>

namespace quern {
namespace {

class DerivedStore : public DividedStore {
 public:
  DerivedStore(
      const TensorStore& source,
      std::map<std::string, DerivedTensor> derived,
      const std::set<std::string>& dropped)
      : source_(source), derived_(std::move(derived)), tensors_(source.tensors()) {
    for (const std::string& name : dropped) {
      tensors_.erase(name);
    }
    for (const auto& [name, tensor] : derived_) {
      tensors_[name] = {tensor.dtype, tensor.shape, {}};
    }
  }

  [[nodiscard]] const TensorView* find(const std::string& name) const override {
    const auto recipe = derived_.find(name);
    if (recipe == derived_.end()) {
      const auto plain = tensors_.find(name);
      return plain == tensors_.end() ? nullptr : &plain->second;
    }
    const std::lock_guard lock(mutex_);
    const auto [made, fresh] = made_.try_emplace(name);
    if (fresh) {
      made->second.bytes = recipe->second.make();
      made->second.view = {recipe->second.dtype, recipe->second.shape, made->second.bytes};
    }
    ++made->second.holders;
    return &made->second.view;
  }
  [[nodiscard]] const std::map<std::string, TensorView>& tensors() const override {
    return tensors_;
  }
  void release(const TensorView& view) const override {
    {
      const std::lock_guard lock(mutex_);
      for (auto made = made_.begin(); made != made_.end(); ++made) {
        if (made->second.view.bytes.data() == view.bytes.data()) {
          if (--made->second.holders == 0) {
            made_.erase(made);
          }
          return;
        }
      }
    }
    source_.release(view);
  }
  [[nodiscard]] std::map<std::string, std::int64_t> divided() const override {
    return divided_tensors(source_);
  }

 private:
  struct Made {
    std::vector<std::byte> bytes;
    TensorView view;
    int holders = 0;
  };
  const TensorStore& source_;
  std::map<std::string, DerivedTensor> derived_;
  std::map<std::string, TensorView> tensors_;
  mutable std::mutex mutex_;
  mutable std::map<std::string, Made> made_;
};

class DerivedCheckpoint : public Checkpoint {
 public:
  DerivedCheckpoint(
      std::unique_ptr<Checkpoint> source,
      Json config,
      std::map<std::string, DerivedTensor> derived,
      const std::set<std::string>& dropped)
      : source_(std::move(source)),
        config_(std::move(config)),
        tensors_(source_->tensors(), std::move(derived), dropped) {}

  [[nodiscard]] const std::filesystem::path& directory() const override {
    return source_->directory();
  }
  [[nodiscard]] const Json& config() const override { return config_; }
  [[nodiscard]] std::string config_place() const override { return source_->config_place(); }
  [[nodiscard]] const TensorStore& tensors() const override { return tensors_; }
  [[nodiscard]] std::string format() const override { return "dense"; }
  [[nodiscard]] bool is_quantized(const std::string& module) const override {
    (void)module;
    return false;
  }
  [[nodiscard]] StoredLinear load_linear(
      const std::string& module,
      std::int64_t out_features,
      std::int64_t in_features) const override {
    return load_dense_linear(tensors_, module, out_features, in_features);
  }

 private:
  std::unique_ptr<Checkpoint> source_;
  Json config_;
  DerivedStore tensors_;
};

}  // namespace

std::unique_ptr<Checkpoint> derive_checkpoint(
    std::unique_ptr<Checkpoint> source,
    Json config,
    std::map<std::string, DerivedTensor> derived,
    const std::set<std::string>& dropped) {
  return std::make_unique<DerivedCheckpoint>(
      std::move(source), std::move(config), std::move(derived), dropped);
}

}  // namespace quern
