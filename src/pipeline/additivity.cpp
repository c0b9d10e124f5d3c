// SPDX-License-Identifier: Apache-2.0
#include "pipeline/additivity.h"

#include "base/error.h"
#include "eval/divergence.h"
#include "kernels/kernels.h"
#include "nn/block_stream.h"
#include "nn/decoder.h"
#include "plan/sensitivity.h"
#include "quant/rtn.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>
#include <numeric>
#include <optional>

namespace quern {
namespace {

using Sequences = std::span<const std::vector<std::int32_t>>;

double mean_of(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// Residual streams of the original (0) and all variants (1 …) at a block boundary.
std::vector<ActivationStore> embedded_streams(
    const Context& ctx,
    const ModelGraph& graph,
    const Checkpoint& checkpoint,
    Sequences sequences,
    int variants) {
  std::vector<std::int64_t> rows;
  for (const auto& sequence : sequences) {
    rows.push_back(static_cast<std::int64_t>(sequence.size()));
  }
  const LinearWeights table = load_linear_weights(graph.embedding, checkpoint);
  std::vector<ActivationStore> streams;
  for (int v = 0; v <= variants; ++v) {
    streams.emplace_back(graph.config.hidden_size, rows, std::filesystem::path());
  }
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    const std::vector<float> x = embed_tokens(ctx.kernels, table, sequences[i]);
    for (ActivationStore& stream : streams) {
      stream.write(static_cast<std::int64_t>(i), x.data());
    }
  }
  release_linear_weights(graph.embedding, checkpoint);
  return streams;
}

double stream_work(const Block& block, const ModelConfig& config, Sequences sequences) {
  double work = 0;
  for (const auto& sequence : sequences) {
    const auto rows = static_cast<double>(sequence.size());
    for (const Linear& linear : block.linears) {
      work += rows * static_cast<double>(linear.parameters());
    }
    work += rows * rows * static_cast<double>(config.heads * config.head_dim);
  }
  return work;
}

void advance(
    const Context& ctx,
    Workspace& workspace,
    const ModelGraph& graph,
    const Block& block,
    const BlockWeights& weights,
    ActivationStore& stream) {
  advance_sequences(
      ctx, workspace, graph.config, block, weights, stream, stream, [&](std::int64_t) {
        if (ctx.interrupted()) {
          throw InterruptedError(
              "interrupted", "", "a plan is made in one go, nothing is saved", "run it again");
        }
      });
}

// Final norm and head, of which the variants have the same.
class Readout {
 public:
  Readout(const Context& ctx, const ModelGraph& graph, const Checkpoint& checkpoint) : ctx_(ctx) {
    model_.graph = graph;
    model_.final_norm = load_norm(graph.final_norm, checkpoint);
    model_.head = load_linear_weights(graph.head, checkpoint);
    decoder_.emplace(ctx, model_);
  }

  // Sum over the rows of KL(reference || variant), from the residual streams after the last block.
  double divergence(std::vector<float> reference, std::vector<float> variant) {
    decoder_->final_norm(reference);
    decoder_->final_norm(variant);
    const std::int64_t vocab = model_.graph.config.vocab_size;
    const std::int64_t width = model_.graph.config.hidden_size;
    const auto rows = static_cast<std::int64_t>(variant.size()) / width;
    std::vector<double> kl(static_cast<std::size_t>(rows));
    std::vector<float> scratch(static_cast<std::size_t>(ctx_.pool.size() * vocab));
    const std::int64_t chunk = decoder_->rows_per_chunk();
    for (std::int64_t begin = 0; begin < rows; begin += chunk) {
      const std::int64_t count = std::min(chunk, rows - begin);
      const auto slice = [&](const std::vector<float>& x) {
        return std::span(x).subspan(
            static_cast<std::size_t>(begin * width), static_cast<std::size_t>(count * width));
      };
      std::vector<float> p;
      decoder_->for_logits(
          slice(reference), [&](std::int64_t, std::int64_t n, const float* logits) {
            p.assign(logits, logits + n * vocab);
          });
      decoder_->for_logits(slice(variant), [&](std::int64_t, std::int64_t n, const float* q) {
        ctx_.pool.for_chunks(n, 8, [&](std::int64_t from, std::int64_t to, int worker) {
          for (std::int64_t r = from; r < to; ++r) {
            const float* a = p.data() + r * vocab;
            const float* b = q + r * vocab;
            kl[static_cast<std::size_t>(begin + r)] = kl_divergence(
                ctx_,
                a,
                b,
                ctx_.kernels.log_sum_exp(a, vocab),
                ctx_.kernels.log_sum_exp(b, vocab),
                vocab,
                scratch.data() + worker * vocab);
          }
        });
      });
    }
    return std::accumulate(kl.begin(), kl.end(), 0.0);
  }

 private:
  const Context& ctx_;
  Model model_;  // without blocks
  std::optional<Decoder> decoder_;
};

}  // namespace

double AdditivityCheck::correlation() const {
  const double p = mean_of(predicted);
  const double m = mean_of(measured);
  double pp = 0;
  double mm = 0;
  double pm = 0;
  for (std::size_t i = 0; i < predicted.size(); ++i) {
    pp += (predicted[i] - p) * (predicted[i] - p);
    mm += (measured[i] - m) * (measured[i] - m);
    pm += (predicted[i] - p) * (measured[i] - m);
  }
  return pp > 0 && mm > 0 ? pm / std::sqrt(pp * mm) : 0.0;
}

double AdditivityCheck::slope() const {
  const double pp = std::inner_product(predicted.begin(), predicted.end(), predicted.begin(), 0.0);
  const double pm = std::inner_product(predicted.begin(), predicted.end(), measured.begin(), 0.0);
  return pp > 0 ? pm / pp : 1.0;
}

Json additivity_json(const AdditivityCheck& check) {
  return {
      {"correlation", check.correlation()},
      {"slope", check.slope()},
      {"predicted", check.predicted},
      {"measured", check.measured}};
}

std::vector<double> measure_variants(
    const Context& ctx,
    const ModelGraph& graph,
    const Checkpoint& checkpoint,
    Sequences sequences,
    int variants,
    const VariantWeights& weights_of,
    const std::function<void(double work)>& progress) {
  std::vector<ActivationStore> streams =
      embedded_streams(ctx, graph, checkpoint, sequences, variants);
  Workspace workspace(ctx);
  for (const Block& block : graph.blocks) {
    const BlockWeights original = load_block_weights(block, checkpoint);
    const double work = stream_work(block, graph.config, sequences);
    advance(ctx, workspace, graph, block, original, streams.front());
    progress(work);
    for (int v = 0; v < variants; ++v) {
      const BlockWeights weights = weights_of(block, original, v);
      advance(ctx, workspace, graph, block, weights, streams[static_cast<std::size_t>(v) + 1]);
      progress(work);
    }
    release_block_weights(block, checkpoint);
  }
  Readout readout(ctx, graph, checkpoint);
  std::vector<double> means;
  for (int v = 1; v <= variants; ++v) {
    double sum = 0;
    double positions = 0;
    for (std::int64_t i = 0; i < streams.front().count(); ++i) {
      const auto values =
          static_cast<std::size_t>(streams.front().rows(i) * graph.config.hidden_size);
      std::vector<float> reference(values);
      std::vector<float> variant(values);
      streams.front().read(i, reference.data());
      streams[static_cast<std::size_t>(v)].read(i, variant.data());
      sum += readout.divergence(std::move(reference), std::move(variant));
      positions += static_cast<double>(streams.front().rows(i));
      progress(
          2 * static_cast<double>(streams.front().rows(i)) *
          static_cast<double>(graph.head.parameters()));
    }
    means.push_back(sum / positions);
  }
  return means;
}

double variants_work(const ModelGraph& graph, Sequences sequences, int variants) {
  double work = 0;
  for (const Block& block : graph.blocks) {
    work += (variants + 1) * stream_work(block, graph.config, sequences);
  }
  for (const auto& sequence : sequences) {
    work += 2.0 * variants * static_cast<double>(sequence.size()) *
            static_cast<double>(graph.head.parameters());
  }
  return work;
}

LinearWeights with_rounding_errors(
    const Context& ctx,
    const LinearWeights& original,
    const QuantScheme& scheme,
    const LinearScore& score,
    double loss) {
  const std::vector<float> W = to_float(original.dense);
  const auto n = static_cast<std::size_t>(original.in_features);
  const auto factor = [&](std::size_t j) {
    return score.factors.empty() ? 1.0F : score.factors[j];
  };
  std::vector<float> scaled = W;
  for (std::size_t i = 0; i < scaled.size(); ++i) {
    scaled[i] *= factor(i % n);
  }
  MethodOptions options;
  options.range = RangeSearch::kMinMax;  // only the direction of the errors matters
  LinearProblem problem;
  problem.W = scaled;
  problem.out_features = original.out_features;
  problem.in_features = original.in_features;
  problem.scheme = scheme;
  const std::vector<float> alike(n, 1.0F);
  std::vector<float> D = round_to_nearest(ctx, problem, options, alike)->dequantize(ctx.kernels);
  double error = 0;
  for (std::size_t i = 0; i < D.size(); ++i) {
    D[i] = (D[i] - scaled[i]) / factor(i % n);
    error += 0.5 * score.row_weights[i / n] * score.variances[i % n] * D[i] * D[i];
  }
  const auto strength = static_cast<float>(error > 0 ? std::sqrt(loss / error) : 0.0);
  for (std::size_t i = 0; i < D.size(); ++i) {
    D[i] = W[i] + strength * D[i];
  }
  LinearWeights changed = original;
  changed.aligned_copy = std::make_shared<const std::vector<std::byte>>(from_float(D, DType::kF32));
  changed.dense.dtype = DType::kF32;
  changed.dense.bytes = *changed.aligned_copy;
  return changed;
}

}  // namespace quern
