// SPDX-License-Identifier: Apache-2.0
#include "calib/gradients.h"

#include "base/error.h"
#include "base/philox.h"
#include "calib/calibration_set.h"
#include "nn/attention.h"
#include "nn/backward.h"
#include "nn/block_stream.h"
#include "nn/decoder.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <utility>

namespace quern {
namespace {

using Sequences = std::span<const std::vector<std::int32_t>>;

// A number in [0, 1) that belongs to one position of one sequence.
double uniform_at(std::uint64_t seed, std::int64_t sequence, std::int64_t position) {
  const auto s = static_cast<std::uint64_t>(sequence);
  const auto t = static_cast<std::uint64_t>(position);
  const auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
  const auto high = [](std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32U); };
  const auto bits = philox4x32({low(t), high(t), low(s), high(s)}, {low(seed), high(seed)});
  const std::uint64_t word = (std::uint64_t{bits[0]} << 32U) | bits[1];
  return static_cast<double>(word >> 11U) * 0x1p-53;
}

std::int64_t label_count(Sequences sequences, Labels labels) {
  std::int64_t count = 0;
  for (const auto& sequence : sequences) {
    const auto length = static_cast<std::int64_t>(sequence.size());
    count += labels == Labels::kText ? std::max<std::int64_t>(length - 1, 0) : length;
  }
  return count;
}

std::vector<std::int64_t> lengths_of(Sequences sequences) {
  std::vector<std::int64_t> lengths;
  for (const auto& sequence : sequences) {
    lengths.push_back(static_cast<std::int64_t>(sequence.size()));
  }
  return lengths;
}

GradientParts parts_of(const GradientOptions& options, const Linear& linear) {
  return options.parts ? options.parts(linear) : GradientParts{};
}

// Multiply-adds for one sequence of `rows` tokens.
double linears_work(const Block& block, std::int64_t rows) {
  double work = 0;
  for (const Linear& linear : block.linears) {
    work += static_cast<double>(rows * linear.parameters());
  }
  return work;
}

// One product of queries and keys, half of which is masked.
double attention_work(const ModelConfig& config, std::int64_t rows) {
  return static_cast<double>(rows * rows) * static_cast<double>(config.heads * config.head_dim) / 2;
}

double forward_work(const Block& block, const ModelConfig& config, std::int64_t rows) {
  return linears_work(block, rows) + 2 * attention_work(config, rows);
}

// Forward once more (without down_proj) and back: two products per linear, two and five of
// attention.
double backward_work(const Block& block, const ModelConfig& config, std::int64_t rows) {
  return 2 * linears_work(block, rows) + 7 * attention_work(config, rows);
}

double statistics_work(const Linear& linear, const GradientParts& parts, std::int64_t rows) {
  const auto width = static_cast<double>(linear.in_features);
  const double products = (parts.weight ? 1 : 0) + (parts.fisher ? 1 : 0);
  return static_cast<double>(rows) * (products * static_cast<double>(linear.parameters()) +
                                      parts.guided_groups * width * width / 2);
}

// Bytes of the accumulators of some linears and of the scratch of one of them.
std::uint64_t statistics_memory(
    std::span<const Linear> linears,
    const GradientOptions& options,
    std::int64_t rows,
    bool holdout) {
  std::uint64_t sums = 0;
  std::int64_t scratch = 0;
  for (const Linear& linear : linears) {
    const GradientParts parts = parts_of(options, linear);
    sums +=
        LinearGradientAccumulator::memory(linear.out_features, linear.in_features, parts, holdout);
    if (parts.fisher || parts.guided_groups > 0) {
      scratch = std::max(scratch, rows * (linear.out_features + linear.in_features));
    }
  }
  return sums + static_cast<std::uint64_t>(scratch) * sizeof(float);
}

double head_work(const Linear& head, std::int64_t rows) {
  return 2 * static_cast<double>(rows * head.parameters());
}

// The forward and the backward walk over all sequences.
class GradientPass {
 public:
  GradientPass(
      const Context& ctx,
      const ModelGraph& graph,
      const Checkpoint& checkpoint,
      Sequences sequences,
      const GradientOptions& options,
      const GradientSink& sink)
      : ctx_(ctx),
        graph_(graph),
        checkpoint_(checkpoint),
        sequences_(sequences),
        options_(options),
        sink_(sink),
        lengths_(lengths_of(sequences)),
        workspace_(ctx) {
    for (std::int64_t i = 0; i < count(); ++i) {
      (is_holdout(i, count()) ? held_ : order_).push_back(i);
    }
    order_.insert(order_.end(), held_.begin(), held_.end());
  }

  GradientSummary run() {
    embed();
    for (const Block& block : graph_.blocks) {
      forward(block);
    }
    const LabelLoss loss = head();
    for (auto block = graph_.blocks.rbegin(); block != graph_.blocks.rend(); ++block) {
      backward(*block);
    }
    return {
        loss.sum / static_cast<double>(loss.labels),
        loss.labels,
        std::accumulate(lengths_.begin(), lengths_.end(), std::int64_t{0}),
        embedding_square()};
  }

 private:
  [[nodiscard]] std::int64_t count() const { return static_cast<std::int64_t>(lengths_.size()); }
  [[nodiscard]] std::int64_t rows(std::int64_t sequence) const {
    return lengths_[static_cast<std::size_t>(sequence)];
  }
  [[nodiscard]] ActivationStore store(DType dtype) const {
    return {graph_.config.hidden_size, lengths_, options_.spill_directory, dtype};
  }

  void stop_if_interrupted() const {
    if (ctx_.interrupted()) {
      throw InterruptedError(
          "interrupted",
          "",
          "gradients are gathered in one go, nothing of them is saved",
          "run the same command again");
    }
  }

  void progress(double work) const {
    if (options_.progress) {
      options_.progress(work);
    }
  }

  // Calls function(sequence, rows) for all sequences, the held-out ones last.
  template <class Function>
  void for_sequences(const Function& function) {
    for (const std::int64_t sequence : order_) {
      stop_if_interrupted();
      const auto values = static_cast<std::size_t>(rows(sequence) * graph_.config.hidden_size);
      x_.resize(values);
      gradient_.resize(values);
      function(sequence, rows(sequence));
    }
  }

  void embed() {
    const LinearWeights table = load_linear_weights(graph_.embedding, checkpoint_);
    inputs_.push_back(store(options_.stored_as));
    for (std::int64_t i = 0; i < count(); ++i) {
      const auto& ids = sequences_[static_cast<std::size_t>(i)];
      inputs_.back().write(i, embed_tokens(ctx_.kernels, table, ids).data());
    }
    release_linear_weights(graph_.embedding, checkpoint_);
  }

  void forward(const Block& block) {
    const BlockWeights weights = load_block_weights(block, checkpoint_);
    inputs_.push_back(store(options_.stored_as));
    const auto passed = [&](std::int64_t sequence) {
      stop_if_interrupted();
      progress(forward_work(block, graph_.config, rows(sequence)));
    };
    ActivationStore& before = inputs_[inputs_.size() - 2];
    advance_sequences(
        ctx_, workspace_, graph_.config, block, weights, before, inputs_.back(), passed);
    release_block_weights(block, checkpoint_);
  }

  [[nodiscard]] std::int32_t label(
      std::int64_t sequence, std::int64_t row, std::span<const float> probabilities) const {
    if (options_.labels == Labels::kSampled) {
      return sample_label(probabilities, uniform_at(ctx_.seed, sequence, row));
    }
    const std::vector<std::int32_t>& ids = sequences_[static_cast<std::size_t>(sequence)];
    const auto next = static_cast<std::size_t>(row) + 1;
    return next < ids.size() ? ids[next] : -1;
  }

  // Leaves the gradients at the output of the last block in gradients_.
  LabelLoss head() {
    const std::vector<float> norm = load_norm(graph_.final_norm, checkpoint_);
    const LinearWeights weights = load_linear_weights(graph_.head, checkpoint_);
    const GradientParts parts = parts_of(options_, graph_.head);
    LinearGradientAccumulator accumulator(weights.out_features, weights.in_features, parts);
    const float scale =
        options_.labels == Labels::kSampled
            ? 1.0F
            : static_cast<float>(
                  1.0 / static_cast<double>(label_count(sequences_, options_.labels)));
    gradients_.emplace(store(DType::kF32));
    LabelLoss total;
    for_sequences([&](std::int64_t sequence, std::int64_t rows) {
      inputs_.back().read(sequence, x_.data());
      const LabelLoss loss = head_backward(
          ctx_,
          workspace_,
          graph_.config,
          norm,
          weights,
          rows,
          x_.data(),
          [&](std::int64_t row, std::span<const float> probabilities) {
            return label(sequence, row, probabilities);
          },
          scale,
          gradient_.data(),
          [&](std::int64_t n, const float* X, const float* delta) {
            accumulator.add(ctx_, X, delta, n, is_holdout(sequence, count()));
          });
      gradients_->write(sequence, gradient_.data());
      total.sum += loss.sum;
      total.labels += loss.labels;
      progress(head_work(graph_.head, rows) + statistics_work(graph_.head, parts, rows));
    });
    inputs_.pop_back();
    release_linear_weights(graph_.head, checkpoint_);
    sink_(nullptr, graph_.head, accumulator.finish(ctx_, graph_.head.module));
    return total;
  }

  // Moves gradients_ from the output of `block` to its input, and gathers on the way.
  void backward(const Block& block) {
    const BlockWeights weights = load_block_weights(block, checkpoint_);
    std::vector<GradientParts> parts;
    std::vector<LinearGradientAccumulator> accumulators;
    for (const Linear& linear : block.linears) {
      parts.push_back(parts_of(options_, linear));
      accumulators.emplace_back(linear.out_features, linear.in_features, parts.back());
    }
    for_sequences([&](std::int64_t sequence, std::int64_t rows) {
      inputs_.back().read(sequence, x_.data());
      gradients_->read(sequence, gradient_.data());
      const bool holdout = is_holdout(sequence, count());
      block_backward(
          ctx_,
          workspace_,
          graph_.config,
          block,
          weights,
          rows,
          x_.data(),
          gradient_.data(),
          gradient_.data(),
          [&](int linear, std::int64_t n, const float* X, const float* delta) {
            accumulators[static_cast<std::size_t>(linear)].add(ctx_, X, delta, n, holdout);
          });
      gradients_->write(sequence, gradient_.data());
      double work = backward_work(block, graph_.config, rows);
      for (std::size_t i = 0; i < parts.size(); ++i) {
        work += statistics_work(block.linears[i], parts[i], rows);
      }
      progress(work);
    });
    inputs_.pop_back();
    release_block_weights(block, checkpoint_);
    for (std::size_t i = 0; i < accumulators.size(); ++i) {
      const Linear& linear = block.linears[i];
      sink_(&block, linear, accumulators[i].finish(ctx_, linear.module));
    }
  }

  // Of gradients_, which have arrived at the input of the first block.
  [[nodiscard]] std::vector<double> embedding_square() {
    const auto width = static_cast<std::size_t>(graph_.config.hidden_size);
    std::vector<double> sums(width, 0.0);
    for_sequences([&](std::int64_t sequence, std::int64_t) {
      gradients_->read(sequence, gradient_.data());
      for (std::size_t i = 0; i < gradient_.size(); ++i) {
        sums[i % width] += static_cast<double>(gradient_[i]) * gradient_[i];
      }
    });
    return sums;
  }

  const Context& ctx_;
  const ModelGraph& graph_;
  const Checkpoint& checkpoint_;
  Sequences sequences_;
  const GradientOptions& options_;
  const GradientSink& sink_;
  std::vector<std::int64_t> lengths_;
  std::vector<std::int64_t> order_;  // sequences, the held-out ones last
  std::vector<std::int64_t> held_;
  std::vector<ActivationStore> inputs_;  // of the blocks still to go back through
  std::optional<ActivationStore> gradients_;
  Workspace workspace_;
  std::vector<float> x_;  // rows of one sequence
  std::vector<float> gradient_;
};

}  // namespace

GradientSummary gather_gradients(
    const Context& ctx,
    const ModelGraph& graph,
    const Checkpoint& checkpoint,
    std::span<const std::vector<std::int32_t>> sequences,
    const GradientOptions& options,
    const GradientSink& sink) {
  if (label_count(sequences, options.labels) == 0) {
    throw UsageError(
        "there is nothing to predict",
        "--calibration",
        fmt::format("{} sequences without a token to compare a prediction with", sequences.size()),
        "give longer sequences");
  }
  return GradientPass(ctx, graph, checkpoint, sequences, options, sink).run();
}

double gradient_work(
    const ModelGraph& graph,
    std::span<const std::vector<std::int32_t>> sequences,
    const GradientOptions& options) {
  double work = 0;
  for (const std::int64_t rows : lengths_of(sequences)) {
    for (const Block& block : graph.blocks) {
      work += forward_work(block, graph.config, rows) + backward_work(block, graph.config, rows);
      for (const Linear& linear : block.linears) {
        work += statistics_work(linear, parts_of(options, linear), rows);
      }
    }
    work += head_work(graph.head, rows) +
            statistics_work(graph.head, parts_of(options, graph.head), rows);
  }
  return work;
}

GradientMemory gradient_memory(
    const Context& ctx,
    const ModelGraph& graph,
    std::span<const std::vector<std::int32_t>> sequences,
    const GradientOptions& options) {
  const std::vector<std::int64_t> lengths = lengths_of(sequences);
  const std::int64_t longest =
      lengths.empty() ? 0 : *std::max_element(lengths.begin(), lengths.end());
  const auto count = static_cast<std::int64_t>(lengths.size());
  bool holdout = false;
  for (std::int64_t i = 0; i < count; ++i) {
    holdout = holdout || is_holdout(i, count);
  }
  const std::int64_t hidden = graph.config.hidden_size;
  GradientMemory memory;
  memory.stored =
      (graph.blocks.size() + 1) * ActivationStore::bytes(hidden, lengths, options.stored_as) +
      ActivationStore::bytes(hidden, lengths);
  std::uint64_t block_bytes = 0;
  for (const Block& block : graph.blocks) {
    block_bytes = std::max(
        block_bytes,
        statistics_memory(block.linears, options, longest, holdout) +
            block_backward_memory(ctx, graph.config, block, longest));
  }
  const std::uint64_t head_bytes = statistics_memory({&graph.head, 1}, options, longest, holdout) +
                                   head_backward_memory(graph.config, longest);
  memory.working = std::max(block_bytes, head_bytes) +
                   2 * static_cast<std::uint64_t>(longest * hidden) * sizeof(float);
  return memory;
}

std::int32_t sample_label(std::span<const float> probabilities, double uniform) {
  double cumulative = 0;
  std::int32_t last = 0;
  for (std::size_t i = 0; i < probabilities.size(); ++i) {
    cumulative += static_cast<double>(probabilities[i]);
    if (cumulative > uniform) {
      return static_cast<std::int32_t>(i);
    }
    last = probabilities[i] > 0 ? static_cast<std::int32_t>(i) : last;
  }
  return last;
}

}  // namespace quern
