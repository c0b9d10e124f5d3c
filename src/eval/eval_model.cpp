// SPDX-License-Identifier: Apache-2.0
#include "eval/eval_model.h"

#include "base/error.h"
#include "nn/block_stream.h"

#include <fmt/format.h>

#include <optional>
#include <utility>

namespace quern {
namespace {

class LoadedModel : public EvalModel {
 public:
  LoadedModel(const Context& ctx, std::unique_ptr<Checkpoint> checkpoint)
      : model_(load_model(std::move(checkpoint))), decoder_(ctx, model_), resident_(decoder_) {}

  [[nodiscard]] const ModelConfig& config() const override { return resident_.config(); }
  void begin(std::span<const std::vector<std::int32_t>> windows) override {
    resident_.begin(windows);
  }
  [[nodiscard]] std::span<const float> hidden(std::int64_t window) override {
    return resident_.hidden(window);
  }
  void for_logits(std::span<const float> hidden, const Decoder::LogitsFunction& function) override {
    resident_.for_logits(hidden, function);
  }

 private:
  Model model_;
  Decoder decoder_;
  ResidentModel resident_;
};

class StreamedModel : public EvalModel {
 public:
  StreamedModel(
      const Context& ctx,
      std::unique_ptr<Checkpoint> checkpoint,
      std::int64_t group,
      std::filesystem::path spill_directory,
      StreamProgress progress)
      : ctx_(ctx),
        group_(group),
        spill_directory_(std::move(spill_directory)),
        progress_(std::move(progress)),
        decoder_(ctx, model_) {
    model_.graph = build_graph(*checkpoint);
    check_tensors(model_.graph, *checkpoint);
    model_.final_norm = load_norm(model_.graph.final_norm, *checkpoint);
    model_.checkpoint = std::move(checkpoint);
  }

  [[nodiscard]] const ModelConfig& config() const override { return model_.graph.config; }

  void begin(std::span<const std::vector<std::int32_t>> windows) override {
    drop_head();
    embed(windows);
    const auto blocks = static_cast<std::int64_t>(model_.graph.blocks.size());
    double done = 0;
    BlockStream stream(ctx_, model_.graph, *model_.checkpoint, group_, [&](double part) {
      done += part;
      if (ctx_.interrupted()) {
        throw InterruptedError(
            "evaluation interrupted",
            "",
            fmt::format("{:.1f} of {} layers done", done, blocks),
            "run the same command again");
      }
      if (progress_) {
        progress_(done, blocks);
      }
    });
    stream.run(*x_);
    for (std::int64_t i = 0; i < x_->count(); ++i) {
      float* x = x_->values(i, buffer_);
      decoder_.final_norm({x, size(i)});
      x_->write(i, x);
    }
  }

  [[nodiscard]] std::span<const float> hidden(std::int64_t window) override {
    return {x_->values(window, buffer_), size(window)};
  }

  void for_logits(std::span<const float> hidden, const Decoder::LogitsFunction& function) override {
    if (model_.head.out_features == 0) {
      model_.head = load_linear_weights(model_.graph.head, *model_.checkpoint);
    }
    decoder_.for_logits(hidden, function);
  }

 private:
  [[nodiscard]] std::size_t size(std::int64_t window) const {
    return static_cast<std::size_t>(x_->rows(window) * x_->width());
  }

  void embed(std::span<const std::vector<std::int32_t>> windows) {
    std::vector<std::int64_t> rows;
    for (const std::vector<std::int32_t>& window : windows) {
      rows.push_back(static_cast<std::int64_t>(window.size()));
    }
    x_.emplace(config().hidden_size, std::move(rows), spill_directory_);
    const LinearWeights table = load_linear_weights(model_.graph.embedding, *model_.checkpoint);
    for (std::size_t i = 0; i < windows.size(); ++i) {
      x_->write(static_cast<std::int64_t>(i), embed_tokens(ctx_.kernels, table, windows[i]).data());
    }
    release_linear_weights(model_.graph.embedding, *model_.checkpoint);
  }

  void drop_head() {
    model_.head = {};
    release_linear_weights(model_.graph.head, *model_.checkpoint);
  }

  const Context& ctx_;
  std::int64_t group_;
  std::filesystem::path spill_directory_;
  StreamProgress progress_;
  Model model_;  // without embedding and blocks; the head from when it is needed on
  Decoder decoder_;
  std::optional<ActivationStore> x_;
  std::vector<float> buffer_;
};

}  // namespace

std::span<const float> ResidentModel::hidden(std::int64_t window) {
  hidden_ = decoder_.forward(windows_[static_cast<std::size_t>(window)]);
  return hidden_;
}

std::unique_ptr<EvalModel> open_eval_model(
    const Context& ctx,
    std::unique_ptr<Checkpoint> checkpoint,
    const EvalMemory& memory,
    const std::filesystem::path& work_directory,
    const StreamProgress& progress) {
  if (!memory.streamed) {
    return std::make_unique<LoadedModel>(ctx, std::move(checkpoint));
  }
  return std::make_unique<StreamedModel>(
      ctx,
      std::move(checkpoint),
      memory.group,
      memory.spilled ? work_directory : std::filesystem::path(),
      progress);
}

}  // namespace quern
