// SPDX-License-Identifier: Apache-2.0
#include "nn/decoder.h"

#include "base/error.h"
#include "kernels/kernels.h"
#include "nn/linear.h"

#include <fmt/format.h>

#include <algorithm>

namespace quern {
namespace {

constexpr std::int64_t kLogitBytes = std::int64_t{128} << 20;

}  // namespace

std::int64_t logit_rows_per_chunk(std::int64_t vocab_size) {
  return std::clamp<std::int64_t>(kLogitBytes / 4 / vocab_size, 16, 1024);
}

std::vector<float> embed_tokens(
    const KernelTable& kernels, const LinearWeights& embedding, std::span<const std::int32_t> ids) {
  const std::int64_t vocab = embedding.out_features;
  const std::int64_t width = embedding.in_features;
  std::vector<std::uint8_t> scratch(static_cast<std::size_t>(width));
  std::vector<float> x(ids.size() * static_cast<std::size_t>(width));
  for (std::size_t t = 0; t < ids.size(); ++t) {
    if (ids[t] < 0 || ids[t] >= vocab) {
      throw UsageError(
          "a token id is outside the vocabulary",
          fmt::format("position {}", t),
          fmt::format("expected 0 to {}, found {}", vocab - 1, ids[t]),
          "use token ids of this model's tokenizer");
    }
    float* row = x.data() + t * static_cast<std::size_t>(width);
    const float* from = weight_row(kernels, embedding, ids[t], scratch.data(), row);
    if (from != row) {
      std::copy(from, from + width, row);
    }
  }
  return x;
}

void Decoder::final_norm(std::span<float> x) const {
  const std::int64_t width = model_.graph.config.hidden_size;
  const auto rows = static_cast<std::int64_t>(x.size()) / width;
  ctx_.pool.for_chunks(rows, 64, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* row = x.data() + t * width;
      ctx_.kernels.rms_norm(
          row, model_.final_norm.data(), model_.graph.config.norm_eps, row, width);
    }
  });
}

void Decoder::run_block(std::size_t index, LayerCache& cache, std::vector<float>& x) {
  const ModelConfig& config = model_.graph.config;
  block_forward(
      ctx_,
      workspace_,
      config,
      model_.graph.blocks[index],
      model_.blocks[index],
      static_cast<std::int64_t>(x.size()) / config.hidden_size,
      cache,
      x.data());
  for (const std::int64_t position : cache.router_ties) {
    router_ties_.push_back({static_cast<int>(index), position});
  }
  cache.router_ties.clear();
}

std::vector<float> Decoder::run(
    std::span<const std::int32_t> ids,
    Sequence& sequence,
    const HiddenObserver& observer,
    bool is_tentative) {
  sequence.layers.resize(model_.blocks.size());
  std::vector<float> x = embed_tokens(ctx_.kernels, model_.embedding, ids);
  if (sequence.images != nullptr) {
    sequence.images->place_features(sequence.tokens(), x, model_.graph.config.hidden_size);
    for (LayerCache& layer : sequence.layers) {
      layer.positions = &sequence.images->positions;
    }
  }
  router_ties_.clear();
  for (std::size_t i = 0; i < model_.blocks.size(); ++i) {
    if (observer) {
      observer(static_cast<int>(i), x);
    }
    sequence.layers[i].keeps_journal = is_tentative;
    run_block(i, sequence.layers[i], x);
  }
  if (observer) {
    observer(static_cast<int>(model_.blocks.size()), x);
  }
  final_norm(x);
  return x;
}

std::vector<float> Decoder::forward(
    std::span<const std::int32_t> ids, const HiddenObserver& observer) {
  std::vector<float> x = embed_tokens(ctx_.kernels, model_.embedding, ids);
  router_ties_.clear();
  LayerCache cache;
  for (std::size_t i = 0; i < model_.blocks.size(); ++i) {
    if (observer) {
      observer(static_cast<int>(i), x);
    }
    cache.clear();
    run_block(i, cache, x);
  }
  if (observer) {
    observer(static_cast<int>(model_.blocks.size()), x);
  }
  final_norm(x);
  return x;
}

std::vector<float> Decoder::forward(
    std::span<const std::int32_t> ids, Sequence& sequence, const HiddenObserver& observer) {
  return run(ids, sequence, observer, false);
}

std::vector<float> Decoder::forward_tentative(
    std::span<const std::int32_t> ids, Sequence& sequence) {
  return run(ids, sequence, nullptr, true);
}

void Decoder::rewind(Sequence& sequence, std::int64_t tokens) const {
  for (std::size_t i = 0; i < sequence.layers.size(); ++i) {
    block_rewind(model_.graph.config, model_.graph.blocks[i], tokens, sequence.layers[i]);
  }
}

void Decoder::for_logits(std::span<const float> hidden, const LogitsFunction& function) {
  const std::int64_t width = model_.graph.config.hidden_size;
  const auto rows = static_cast<std::int64_t>(hidden.size()) / width;
  const std::int64_t chunk = std::min(rows, rows_per_chunk());
  logits_.resize(static_cast<std::size_t>(chunk * model_.graph.config.vocab_size));
  for (std::int64_t begin = 0; begin < rows; begin += chunk) {
    const std::int64_t n = std::min(chunk, rows - begin);
    linear_forward(ctx_, workspace_, model_.head, hidden.data() + begin * width, n, logits_.data());
    function(begin, n, logits_.data());
  }
}

}  // namespace quern
