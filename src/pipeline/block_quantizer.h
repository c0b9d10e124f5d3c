// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "calib/activation_store.h"
#include "nn/block.h"
#include "pipeline/progress.h"
#include "plan/quant_plan.h"
#include "quant/method.h"

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace quern {

// One quantized linear of a block, and what happened to it.
struct QuantizedLinear {
  const PlannedLinear* plan = nullptr;
  std::shared_ptr<const QuantizedMatrix> matrix;
  LinearReport report;
  double seconds = 0;
};

// The residual stream of all calibration sequences at a block boundary, with the order in which
// they are walked (held-out ones last, so that each kind is summed in one go).
struct CalibrationState {
  ActivationStore x;
  std::vector<std::int64_t> order;
  std::int64_t holdout_count = 0;  // the last ones of `order`

  [[nodiscard]] bool is_holdout(std::int64_t position) const noexcept {
    return position >= static_cast<std::int64_t>(order.size()) - holdout_count;
  }
};

// What one kind of work took: multiply-adds, and CPU seconds of all threads, which other jobs on
// the machine do not stretch as they stretch the clock.
struct PartTime {
  double work = 0;
  double seconds = 0;
  double cpu_seconds = 0;
};
struct PartTimes {
  PartTime gather;  // second moments
  PartTime round;  // the method
  PartTime apply;  // forward pass
};

// Quantizes one block at a time in true-sequential order: at each calibration site gather the
// second moments, round the linears of the site, and go on through the rounded ones. One forward
// pass in all: what a later site needs is kept (or spilled), not recomputed.
class BlockQuantizer {
 public:
  // `spill_directory` empty: what a block carries between sites stays in memory.
  BlockQuantizer(
      const Context& ctx,
      const ModelGraph& graph,
      const QuantPlan& plan,
      const MethodOptions& options,
      std::filesystem::path spill_directory);

  // Rounds the planned linears of `block`, puts them into `weights`, and moves `state` to the next
  // block boundary. Throws InterruptedError when ctx says so.
  [[nodiscard]] std::vector<QuantizedLinear> run(
      const Block& block, BlockWeights& weights, CalibrationState& state, Progress& progress);

  // Only moves `state` through an already quantized block; the same values as run() leaves.
  void advance(
      const Block& block, const BlockWeights& weights, CalibrationState& state, Progress& progress);

  // Without activations: data-free methods only.
  [[nodiscard]] std::vector<QuantizedLinear> run_data_free(
      const Block& block, BlockWeights& weights, Progress& progress);

  [[nodiscard]] const PartTimes& times() const noexcept { return times_; }

 private:
  void stop_if_interrupted() const;
  [[nodiscard]] LinearResult round_linear(
      const PlannedLinear& planned, const LinearProblem& problem) const;
  [[nodiscard]] SiteStats gather(
      const Block& block,
      const BlockWeights& weights,
      int site,
      const CalibrationState& state,
      const ActivationStore* carried,
      Progress& progress);
  void quantize_site(
      const Block& block,
      BlockWeights& weights,
      int site,
      const SiteStats* stats,
      std::vector<QuantizedLinear>& done,
      Progress& progress);
  // Runs the linears of a site for all sequences; what they carry to the next site, if anything.
  [[nodiscard]] std::optional<ActivationStore> apply_to_all(
      const Block& block,
      const BlockWeights& weights,
      int site,
      CalibrationState& state,
      const ActivationStore* carried,
      Progress& progress);
  void load_site_input(
      const BlockWeights& weights,
      int site,
      const CalibrationState& state,
      const ActivationStore* carried,
      std::int64_t sequence);

  const Context& ctx_;
  const ModelGraph& graph_;
  const QuantPlan& plan_;
  MethodOptions options_;
  std::filesystem::path spill_directory_;
  Workspace workspace_;
  PartTimes times_;
  std::vector<float> x_;  // residual rows of one sequence
  std::vector<float> X_;  // inputs of a site
  std::vector<float> carried_;  // outputs of a site
};

// Work of one block in multiply-adds, the unit of the progress line: per site gathering, rounding
// and applying.
struct BlockWork {
  double gather = 0;
  double round = 0;
  double apply = 0;
  [[nodiscard]] double total() const { return gather + round + apply; }
};
[[nodiscard]] BlockWork block_work(
    const Block& block,
    const ModelConfig& config,
    double tokens,
    double length,
    const MethodOptions& options);

}  // namespace quern
