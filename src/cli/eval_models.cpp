// SPDX-License-Identifier: Apache-2.0
#include "cli/eval_models.h"

#include "base/process.h"
#include "base/units.h"

#include <fmt/format.h>

#include <utility>
#include <vector>

namespace quern {
namespace {

ModelGraph checked_graph(const Checkpoint& checkpoint) {
  ModelGraph graph = build_graph(checkpoint);
  check_tensors(graph, checkpoint);
  return graph;
}

}  // namespace

StageClock::StageClock() : started_(steady_seconds()), last_(started_) {}

std::string StageClock::remaining(const std::string& stage, double done, double total) {
  if (stage != stage_) {
    stage_ = stage;
    started_ = last_;
  }
  last_ = steady_seconds();
  return human_duration(done > 0 ? (last_ - started_) / done * (total - done) : 0);
}

EvalModels::EvalModels(
    const Context& ctx,
    std::unique_ptr<Checkpoint> model,
    std::unique_ptr<Checkpoint> reference,
    std::int64_t windows,
    std::int64_t context,
    Streaming streaming,
    const std::filesystem::path& work_directory)
    : ctx_(ctx) {
  const ModelGraph graph = checked_graph(*model);
  const ModelGraph reference_graph = reference ? checked_graph(*reference) : ModelGraph();
  std::vector<EvalSide> sides = {{graph, *model}};
  if (reference) {
    sides.push_back({reference_graph, *reference});
  }
  memory_ = plan_eval_memory(ctx, sides, windows, context, streaming);
  if (memory_.streamed) {
    ctx.log.detail(fmt::format(
        "block by block, {} windows at once{}",
        memory_.group,
        memory_.spilled ? ", rows on disk" : ""));
  }
  model_ = open(std::move(model), work_directory, "model");
  if (reference) {
    reference_ = open(std::move(reference), work_directory, "reference");
  }
}

std::unique_ptr<EvalModel> EvalModels::open(
    std::unique_ptr<Checkpoint> checkpoint,
    const std::filesystem::path& work_directory,
    const std::string& what) {
  const auto progress = [this, what](double done, std::int64_t total) {
    (void)process_usage();  // samples the peak
    ctx_.log.progress(fmt::format(
        "{}  layer {:.1f}/{}  eta {}",
        what,
        done,
        total,
        clock_.remaining(what, done, static_cast<double>(total))));
  };
  return open_eval_model(
      ctx_,
      std::move(checkpoint),
      memory_,
      work_directory.empty() ? std::filesystem::temp_directory_path() : work_directory,
      progress);
}

}  // namespace quern
