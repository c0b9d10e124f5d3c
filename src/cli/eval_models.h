// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "eval/eval_memory.h"
#include "eval/eval_model.h"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

namespace quern {

// Time that is left, of stages that follow each other.
class StageClock {
 public:
  StageClock();
  // As text, when `done` of `total` in this stage is through by now.
  [[nodiscard]] std::string remaining(const std::string& stage, double done, double total);

 private:
  std::string stage_;
  double started_;
  double last_;
};

// A model and its reference (null: none), opened in the way that the memory allows; layers that
// they pass go to the progress line. Throws what plan_eval_memory and opening them throw.
class EvalModels {
 public:
  EvalModels(
      const Context& ctx,
      std::unique_ptr<Checkpoint> model,
      std::unique_ptr<Checkpoint> reference,
      std::int64_t windows,
      std::int64_t context,
      Streaming streaming = Streaming::kAuto,
      const std::filesystem::path& work_directory = {});
  EvalModels(const EvalModels&) = delete;
  EvalModels& operator=(const EvalModels&) = delete;

  EvalModel& model() { return *model_; }
  EvalModel* reference() { return reference_.get(); }
  StageClock& clock() { return clock_; }
  [[nodiscard]] const EvalMemory& memory() const { return memory_; }

 private:
  std::unique_ptr<EvalModel> open(
      std::unique_ptr<Checkpoint> checkpoint,
      const std::filesystem::path& work_directory,
      const std::string& what);

  const Context& ctx_;
  EvalMemory memory_;
  StageClock clock_;
  std::unique_ptr<EvalModel> model_;
  std::unique_ptr<EvalModel> reference_;
};

}  // namespace quern
