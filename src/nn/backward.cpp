// SPDX-License-Identifier: Apache-2.0
#include "nn/backward.h"

#include "kernels/kernels.h"
#include "nn/attention_tile.h"
#include "nn/backward_ops.h"
#include "nn/block.h"
#include "nn/decoder.h"
#include "nn/linear.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

namespace quern {
namespace {

constexpr std::int64_t kRowChunk = 32;

std::vector<float> matrix(std::int64_t rows, std::int64_t columns) {
  return std::vector<float>(static_cast<std::size_t>(rows * columns));
}

// dx = the norm's gradient + residual (null: 0), both [rows, width]; dX, the gradient at the norm's
// output, is overwritten. dx may be x or the residual.
void norm_branch_backward(
    const Context& ctx,
    const ModelConfig& config,
    const std::vector<float>& gain,
    std::int64_t rows,
    const float* x,
    float* dX,
    const float* residual,
    float* dx) {
  const auto width = static_cast<std::int64_t>(gain.size());
  ctx.pool.for_chunks(rows, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* row = dX + t * width;
      rms_norm_backward(x + t * width, gain.data(), config.norm_eps, row, width, row);
      if (residual != nullptr) {
        ctx.kernels.add_f32(residual + t * width, row, width);
      }
      std::copy_n(row, width, dx + t * width);
    }
  });
}

// Back from after norm and rotation of every head to the projection, in place of d [rows, heads *
// head_dim]; raw holds the projection.
void finish_heads_backward(
    const Context& ctx,
    const ModelConfig& config,
    const std::vector<float>& gain,
    const Rotation& rotation,
    std::int64_t heads,
    std::int64_t rows,
    const float* raw,
    float* d) {
  const std::int64_t dim = config.head_dim;
  const auto half = static_cast<std::int64_t>(config.rope.inverse_frequencies.size());
  ctx.pool.for_chunks(rows, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t h = 0; h < heads; ++h) {
        float* head = d + (t * heads + h) * dim;
        rope_backward(
            rotation.cosines.data() + t * half, rotation.sines.data() + t * half, half, head);
        if (!gain.empty()) {
          const float* x = raw + (t * heads + h) * dim;
          rms_norm_backward(x, gain.data(), config.norm_eps, head, dim, head);
        }
      }
    }
  });
}

// One block and one sequence: what the forward pass computes and the way back needs.
class BlockGradient {
 public:
  BlockGradient(
      const Context& ctx,
      Workspace& workspace,
      const ModelConfig& config,
      const Block& block,
      const BlockWeights& weights,
      std::int64_t rows,
      const LinearObserver& observer)
      : ctx_(ctx),
        workspace_(workspace),
        config_(config),
        block_(block),
        weights_(weights),
        rows_(rows),
        observer_(observer),
        shape_(attention_shape(config, block)),
        rotation_(make_rotation(ctx, config.rope, 0, rows)) {}

  void run(const float* x, const float* dy, float* dx) {
    forward_attention(x);
    mlp_backward(dy);
    attention_backward(x, dx);
  }

 private:
  void observe(int linear, const float* X, const float* delta) const {
    if (observer_) {
      observer_(linear, rows_, X, delta);
    }
  }

  void input_backward(int linear, const float* delta, bool accumulate, float* dX) {
    linear_backward_input(
        ctx_,
        workspace_,
        weights_.linears[static_cast<std::size_t>(linear)],
        delta,
        rows_,
        accumulate,
        dX);
  }

  // Norm and rotation of a projection; the projection itself is only kept when its norm needs it.
  [[nodiscard]] std::vector<float> finished(
      std::vector<float>& raw, const std::vector<float>& gain, std::int64_t heads) const {
    std::vector<float> done = gain.empty() ? std::move(raw) : raw;
    finish_heads(ctx_, config_, gain, rotation_, heads, rows_, done.data());
    return done;
  }

  [[nodiscard]] std::vector<float> project(int linear) {
    const LinearWeights& projection = weights_.linears[static_cast<std::size_t>(linear)];
    std::vector<float> y = matrix(rows_, projection.out_features);
    linear_forward(ctx_, workspace_, projection, attention_input_.data(), rows_, y.data());
    return y;
  }

  void forward_attention(const float* x) {
    attention_input_ = matrix(rows_, config_.hidden_size);
    site_input(ctx_, config_, weights_, kAttentionInput, x, rows_, attention_input_.data());
    raw_queries_ = project(kQ);
    raw_keys_ = project(kK);
    values_ = project(kV);
    queries_ = finished(raw_queries_, weights_.q_norm, shape_.heads);
    keys_ = finished(raw_keys_, weights_.k_norm, shape_.kv_heads);
    attention_output_ = matrix(rows_, shape_.q_width());
    attend(
        ctx_,
        workspace_,
        shape_,
        queries_.data(),
        0,
        rows_,
        keys_.data(),
        values_.data(),
        attention_output_.data());
    middle_.assign(x, x + rows_ * config_.hidden_size);
    LayerCache unused;
    apply_site(
        ctx_,
        workspace_,
        config_,
        block_,
        weights_,
        kAttentionOutput,
        attention_output_.data(),
        rows_,
        unused,
        middle_.data(),
        nullptr);
  }

  // Leaves the gradient at the residual stream between attention and MLP in d_middle_.
  void mlp_backward(const float* dy) {
    const std::int64_t inner = weights_.linears[kDownProj].in_features;
    std::vector<float> X = matrix(rows_, config_.hidden_size);
    site_input(ctx_, config_, weights_, kMlpInput, middle_.data(), rows_, X.data());
    std::vector<float> gate = matrix(rows_, inner);
    std::vector<float> up = matrix(rows_, inner);
    std::vector<float> hidden = matrix(rows_, inner);
    mlp_hidden(
        ctx_,
        workspace_,
        weights_,
        block_.mlp,
        X.data(),
        rows_,
        gate.data(),
        up.data(),
        hidden.data());
    observe(kDownProj, hidden.data(), dy);
    input_backward(kDownProj, dy, false, hidden.data());
    ctx_.pool.for_chunks(rows_, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
      const std::int64_t offset = begin * inner;
      swiglu_backward(
          ctx_,
          hidden.data() + offset,
          (end - begin) * inner,
          gate.data() + offset,
          up.data() + offset);
    });
    observe(kUpProj, X.data(), up.data());
    observe(kGateProj, X.data(), gate.data());
    input_backward(kUpProj, up.data(), false, X.data());
    input_backward(kGateProj, gate.data(), true, X.data());
    d_middle_ = matrix(rows_, config_.hidden_size);
    norm_branch_backward(
        ctx_, config_, weights_.mlp_norm, rows_, middle_.data(), X.data(), dy, d_middle_.data());
  }

  void attention_backward(const float* x, float* dx) {
    observe(kO, attention_output_.data(), d_middle_.data());
    input_backward(kO, d_middle_.data(), false, attention_output_.data());
    std::vector<float> dq = matrix(rows_, shape_.q_width());
    std::vector<float> dk = matrix(rows_, shape_.kv_width());
    std::vector<float> dv = matrix(rows_, shape_.kv_width());
    attend_backward(
        ctx_,
        shape_,
        rows_,
        queries_.data(),
        keys_.data(),
        values_.data(),
        attention_output_.data(),
        dq.data(),
        dk.data(),
        dv.data());
    finish_heads_backward(
        ctx_,
        config_,
        weights_.q_norm,
        rotation_,
        shape_.heads,
        rows_,
        raw_queries_.data(),
        dq.data());
    finish_heads_backward(
        ctx_,
        config_,
        weights_.k_norm,
        rotation_,
        shape_.kv_heads,
        rows_,
        raw_keys_.data(),
        dk.data());
    std::vector<float>& X = attention_input_;
    observe(kV, X.data(), dv.data());
    observe(kK, X.data(), dk.data());
    observe(kQ, X.data(), dq.data());
    input_backward(kV, dv.data(), false, X.data());
    input_backward(kK, dk.data(), true, X.data());
    input_backward(kQ, dq.data(), true, X.data());
    norm_branch_backward(
        ctx_, config_, weights_.attention_norm, rows_, x, X.data(), d_middle_.data(), dx);
  }

  const Context& ctx_;
  Workspace& workspace_;
  const ModelConfig& config_;
  const Block& block_;
  const BlockWeights& weights_;
  std::int64_t rows_;
  const LinearObserver& observer_;
  AttentionShape shape_;
  Rotation rotation_;
  std::vector<float> attention_input_;  // normed
  std::vector<float> raw_queries_;
  std::vector<float> raw_keys_;
  std::vector<float> queries_;  // after norm and rotation
  std::vector<float> keys_;
  std::vector<float> values_;
  std::vector<float> attention_output_;  // what o_proj takes
  std::vector<float> middle_;  // residual stream between attention and MLP
  std::vector<float> d_middle_;
};

}  // namespace

void block_backward(
    const Context& ctx,
    Workspace& workspace,
    const ModelConfig& config,
    const Block& block,
    const BlockWeights& weights,
    std::int64_t rows,
    const float* x,
    const float* dy,
    float* dx,
    const LinearObserver& observer) {
  BlockGradient(ctx, workspace, config, block, weights, rows, observer).run(x, dy, dx);
}

LabelLoss head_backward(
    const Context& ctx,
    Workspace& workspace,
    const ModelConfig& config,
    const std::vector<float>& final_norm,
    const LinearWeights& head,
    std::int64_t rows,
    const float* x,
    const LabelFunction& label,
    float scale,
    float* dx,
    const DeltaObserver& observer) {
  const std::int64_t width = config.hidden_size;
  const std::int64_t vocab = head.out_features;
  const std::int64_t chunk = std::min(rows, logit_rows_per_chunk(vocab));
  std::vector<float> X = matrix(chunk, width);
  std::vector<float> logits = matrix(chunk, vocab);
  std::vector<std::int32_t> labels(static_cast<std::size_t>(rows));
  std::vector<double> losses(labels.size());
  for (std::int64_t first = 0; first < rows; first += chunk) {
    const std::int64_t n = std::min(chunk, rows - first);
    ctx.pool.for_chunks(n, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
      for (std::int64_t r = begin; r < end; ++r) {
        ctx.kernels.rms_norm(
            x + (first + r) * width, final_norm.data(), config.norm_eps, &X[r * width], width);
      }
    });
    linear_forward(ctx, workspace, head, X.data(), n, logits.data());
    ctx.pool.for_chunks(n, 1, [&](std::int64_t r, std::int64_t, int) {
      float* row = logits.data() + r * vocab;
      ctx.kernels.softmax(row, vocab);
      const std::int32_t id = label(first + r, {row, static_cast<std::size_t>(vocab)});
      const auto at = static_cast<std::size_t>(first + r);
      labels[at] = id;
      losses[at] = id < 0 ? 0.0 : -std::log(static_cast<double>(row[id]));
      cross_entropy_backward<float>(vocab, id, scale, row);
    });
    if (observer) {
      observer(n, X.data(), logits.data());
    }
    linear_backward_input(ctx, workspace, head, logits.data(), n, false, X.data());
    norm_branch_backward(
        ctx, config, final_norm, n, x + first * width, X.data(), nullptr, dx + first * width);
  }
  return {
      std::accumulate(losses.begin(), losses.end(), 0.0),
      std::count_if(labels.begin(), labels.end(), [](std::int32_t id) { return id >= 0; })};
}

std::uint64_t block_backward_memory(
    const Context& ctx, const ModelConfig& config, const Block& block, std::int64_t rows) {
  const AttentionShape shape = attention_shape(config, block);
  const std::int64_t inner = block.linears[kDownProj].in_features;
  // Those of BlockGradient, of the way back through attention, and the stripe of a linear.
  const std::int64_t per_row = 6 * config.hidden_size + 6 * shape.q_width() + 5 * shape.kv_width() +
                               3 * inner + config.head_dim;
  const std::int64_t per_worker = 2 * std::min(kQueryRows, rows) * rows;
  const std::int64_t stripe = linear_stripe_floats(std::max(inner, shape.q_width()));
  return static_cast<std::uint64_t>(rows * per_row + ctx.pool.size() * per_worker + stripe) *
         sizeof(float);
}

std::uint64_t head_backward_memory(const ModelConfig& config, std::int64_t rows) {
  const std::int64_t chunk = std::min(rows, logit_rows_per_chunk(config.vocab_size));
  return static_cast<std::uint64_t>(
             chunk * (config.vocab_size + config.hidden_size) + 4 * rows +
             linear_stripe_floats(config.hidden_size)) *
         sizeof(float);
}

}  // namespace quern
