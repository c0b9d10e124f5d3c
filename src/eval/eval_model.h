// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "eval/eval_memory.h"
#include "nn/decoder.h"

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <vector>

namespace quern {

// A model as evaluation sees it: the final-normed hidden rows of the windows of a text, and the
// logits of such rows.
class EvalModel {
 public:
  EvalModel() = default;
  EvalModel(const EvalModel&) = delete;
  EvalModel& operator=(const EvalModel&) = delete;
  virtual ~EvalModel() = default;

  [[nodiscard]] virtual const ModelConfig& config() const = 0;
  // Announces all windows, which have to outlive the calls below.
  virtual void begin(std::span<const std::vector<std::int32_t>> windows) = 0;
  // Rows [length, hidden] of one of them; valid until the next call.
  [[nodiscard]] virtual std::span<const float> hidden(std::int64_t window) = 0;
  // As Decoder::for_logits.
  virtual void for_logits(
      std::span<const float> hidden, const Decoder::LogitsFunction& function) = 0;
};

// A model that was loaded as a whole: each window goes through it when it is asked for.
class ResidentModel : public EvalModel {
 public:
  explicit ResidentModel(Decoder& decoder) : decoder_(decoder) {}

  [[nodiscard]] const ModelConfig& config() const override { return decoder_.model().graph.config; }
  void begin(std::span<const std::vector<std::int32_t>> windows) override { windows_ = windows; }
  [[nodiscard]] std::span<const float> hidden(std::int64_t window) override;
  void for_logits(std::span<const float> hidden, const Decoder::LogitsFunction& function) override {
    decoder_.for_logits(hidden, function);
  }

 private:
  Decoder& decoder_;
  std::span<const std::vector<std::int32_t>> windows_;
  std::vector<float> hidden_;
};

// Called with the blocks that all windows have passed, and all blocks.
using StreamProgress = std::function<void(double done, std::int64_t total)>;

// Opens a checkpoint for evaluation as `memory` says. Loaded as a whole, or streamed: then begin()
// takes all windows through it block by block, and the values are the same to the last bit. Rows
// that are spilled go to an unnamed file in `work_directory`. begin() throws InterruptedError when
// ctx says so, ResourceError when the disk has no room.
[[nodiscard]] std::unique_ptr<EvalModel> open_eval_model(
    const Context& ctx,
    std::unique_ptr<Checkpoint> checkpoint,
    const EvalMemory& memory,
    const std::filesystem::path& work_directory,
    const StreamProgress& progress);

}  // namespace quern
