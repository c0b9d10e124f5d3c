// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/json.h"
#include "format/imatrix.h"
#include "nn/activation_store.h"
#include "nn/block.h"
#include "pipeline/parts.h"
#include "pipeline/progress.h"
#include "plan/quant_plan.h"
#include "quant/method.h"
#include "quant/scaling.h"

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace quern {

// One quantized linear of a block, and what happened to it.
struct QuantizedLinear {
  const PlannedLinear* plan = nullptr;
  std::shared_ptr<const QuantizedMatrix> matrix;
  ActivationScheme activation;  // with its static scale
  LinearReport report;
  double seconds = 0;
};

// A tensor of the source that changed although it keeps its form: a norm or a bias into which
// channel factors were folded.
struct ReplacedTensor {
  std::string name;
  DType dtype = DType::kBF16;
  Shape shape;
  std::vector<std::byte> bytes;
};

// What calibration saw at the inputs of a linear, held-out rows included: an importance matrix.
struct InputSquares {
  std::string name;  // of the linear
  std::vector<float> sums;  // [in] of squares over the rows, before any channel factors
  std::int64_t rows = 0;
};

struct QuantizedBlock {
  std::vector<QuantizedLinear> linears;
  std::vector<ReplacedTensor> tensors;
  std::vector<InputSquares> inputs;  // of all linears, one that keeps its floats included
  Json transforms = Json::array();  // one entry a site: name, rule, error_ratio
};

// Where the finished parts of a block are kept; see parts.h.
struct BlockParts {
  std::function<std::optional<QuantizedBlock>(const std::string& part)> load;
  std::function<void(const std::string& part, const QuantizedBlock& done)> save;
};

// Rows that enter a mixture (block_mixture.cpp).
struct ExpertRows;
struct MixtureRows;
struct GatheredRows;

// Puts what became of a block into its weights.
void install(const Block& block, const QuantizedBlock& quantized, BlockWeights& weights);

// The residual stream of all calibration sequences at a block boundary, with the order in which
// they are walked (held-out ones last, so that each kind is summed in one go).
struct CalibrationState {
  ActivationStore x;
  std::optional<ActivationStore> reference;  // of the unquantized model, for mismatch targets
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
// Adds what passes between its making and its end to a part.
class PartTimer {
 public:
  explicit PartTimer(PartTime& part);
  PartTimer(const PartTimer&) = delete;
  PartTimer& operator=(const PartTimer&) = delete;
  ~PartTimer();

 private:
  PartTime& part_;
  double seconds_;
  double cpu_;
};
struct PartTimes {
  PartTime gather;  // second moments
  PartTime round;  // the method
  PartTime apply;  // forward pass
};

// Quantizes one block at a time in true-sequential order: at each calibration site gather the
// second moments, find and fold channel factors if the plan has a transform, round the linears of
// the site, and go on through the rounded ones. One forward pass in all: what a later site needs is
// kept (or spilled), not recomputed. Factors between two linears of the block must be known before
// the first is rounded, so a transform adds a pass over some sequences; a mismatch target adds the
// pass of the unquantized stream.
class BlockQuantizer {
 public:
  // `spill_directory` empty: what a block carries between sites stays in memory.
  BlockQuantizer(
      const Context& ctx,
      const ModelGraph& graph,
      const TensorStore& source,
      const QuantPlan& plan,
      const MethodOptions& options,
      std::filesystem::path spill_directory);

  // Rounds the planned linears of `block`, part by part, and moves `state` to the next block
  // boundary. Parts that were saved before are taken from there, with the same values. `weights`
  // hold what was rounded, except experts. Throws InterruptedError when ctx says so.
  void run(
      const Block& block,
      BlockWeights& weights,
      CalibrationState& state,
      const BlockParts& parts,
      Progress& progress);

  // Without activations: data-free methods, and with an importance matrix (null: none) what needs
  // no more of the second moments than their diagonal.
  void run_data_free(
      const Block& block,
      BlockWeights& weights,
      const Imatrix* imatrix,
      const BlockParts& parts,
      Progress& progress);

  [[nodiscard]] const PartTimes& times() const noexcept { return times_; }

 private:
  // One of the two streams inside a block.
  struct Stream {
    ActivationStore& x;
    const BlockWeights& weights;
    std::optional<ActivationStore> carried;
  };
  // Factors of a block: what each linear's rows are divided and columns multiplied by before it is
  // rounded. Empty: 1.
  struct LinearFactors {
    std::vector<float> rows;
    std::vector<float> columns;
  };

  void stop_if_interrupted() const;
  // Only moves `state` through an already rounded block; the same values as run() leaves.
  void advance(
      const Block& block,
      const BlockWeights& original,
      const BlockWeights& weights,
      CalibrationState& state,
      Progress& progress);
  // Rounds all linears outside the experts, and moves the streams to the end of the block or to its
  // mixture.
  [[nodiscard]] QuantizedBlock quantize_sites(
      const Block& block,
      BlockWeights& weights,
      CalibrationState& state,
      Stream& quantized,
      Stream* reference,
      Progress& progress);
  [[nodiscard]] LinearResult round_linear(
      const PlannedLinear& planned, const LinearProblem& problem) const;
  void add_range_facts(const LinearProblem& problem, bool compared, QuantizedLinear& row) const;
  [[nodiscard]] bool all_quantized(const Block& block, const std::vector<int>& linears) const;
  [[nodiscard]] ScalingProblem site_scaling_problem(
      const Block& block,
      int site,
      const SiteStats& stats,
      const std::vector<std::vector<float>>& W) const;
  void fold_between_linears(
      const Block& block,
      BlockWeights& weights,
      const CalibrationState& state,
      QuantizedBlock& done,
      Progress& progress);
  void fold_into_norm(
      const Block& block, BlockWeights& weights, int site, SiteStats& stats, QuantizedBlock& done);
  [[nodiscard]] std::vector<SiteStats> gather_before_rounding(
      const Block& block,
      const BlockWeights& weights,
      const CalibrationState& state,
      Progress& progress);
  [[nodiscard]] SiteStats gather(
      const Block& block,
      int site,
      const CalibrationState& state,
      const Stream& quantized,
      const Stream* reference,
      Progress& progress);
  // Rounds linears that read the same input, of which `stats` (null: nothing) is known.
  void quantize_linears(
      const Block& block,
      BlockWeights& weights,
      std::span<const int> linears,
      const SiteStats* stats,
      QuantizedBlock& done,
      Progress& progress);
  // Mixtures of experts: block_mixture.cpp.
  [[nodiscard]] MixtureRows route_all(
      const Block& block, const CalibrationState& state, const Stream& quantized);
  void quantize_shared_expert(
      const Block& block,
      BlockWeights& weights,
      const CalibrationState& state,
      const Stream& quantized,
      const Stream* reference,
      QuantizedBlock& done,
      Progress& progress);
  [[nodiscard]] std::vector<float> hidden_of(
      const BlockWeights& weights, int first, const float* X, std::int64_t rows);
  [[nodiscard]] std::vector<GatheredRows> gather_rows(
      const MixtureRows& all,
      const ExpertRange& experts,
      bool with_borrowed,
      const CalibrationState& state,
      const Stream* reference);
  void quantize_expert(
      const Block& block,
      BlockWeights& weights,
      int expert,
      const ExpertRows& rows,
      const GatheredRows& gathered,
      const BlockWeights* reference,
      QuantizedBlock& done,
      Progress& progress);
  // Adds what experts make of their rows to the residual.
  void add_experts(
      const Block& block,
      const BlockWeights& weights,
      const MixtureRows& all,
      const ExpertRange& experts,
      std::vector<GatheredRows> gathered,
      const CalibrationState& state,
      Stream& stream);
  // Rounds the experts part by part (or takes them from disk), and moves `quantized` to the end of
  // the block.
  void run_experts(
      const Block& block,
      BlockWeights& weights,
      const CalibrationState& state,
      Stream& quantized,
      const Stream* reference,
      const BlockParts& parts,
      Progress& progress);
  void record_inputs(
      const Block& block,
      std::span<const int> linears,
      const SiteStats& stats,
      QuantizedBlock& done) const;
  // Runs the linears of a site for all sequences; what they carry to the next site, if anything.
  void apply_to_all(
      const Block& block,
      int site,
      const CalibrationState& state,
      Stream& stream,
      Progress& progress);
  // X of the site for one sequence, and the residual it may come from.
  void load_site_input(
      const Stream& stream,
      int site,
      std::int64_t sequence,
      std::vector<float>& x,
      std::vector<float>& X) const;

  const Context& ctx_;
  const ModelGraph& graph_;
  const TensorStore& source_;
  const QuantPlan& plan_;
  MethodOptions options_;
  const Transform* transform_;  // null: none
  std::filesystem::path spill_directory_;
  Workspace workspace_;
  PartTimes times_;
  std::vector<LinearFactors> factors_;  // of the block in hand
  std::vector<float> x_;  // residual rows of one sequence
  std::vector<float> X_;  // inputs of a site
  std::vector<float> reference_X_;
  std::vector<float> carried_;  // outputs of a site
};

// Whether a second stream of activations, of the unquantized model, has to run along.
[[nodiscard]] bool needs_reference(const QuantPlan& plan, const MethodOptions& options);

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
    const QuantPlan& plan,
    const MethodOptions& options);

}  // namespace quern
