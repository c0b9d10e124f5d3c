// SPDX-License-Identifier: Apache-2.0
#include "nn/delta_net.h"

#include "kernels/blas.h"
#include "kernels/kernels.h"
#include "nn/linear.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace quern {
namespace {

constexpr std::int64_t kRowChunk = 32;
constexpr std::int64_t kChunk = 64;  // tokens of the chunked form
constexpr std::int64_t kRecurrentRows = 16;  // up to here token by token is faster
constexpr float kNormEps = 1e-6F;  // of queries and keys, whatever rms_norm_eps says

float sigmoid(float x) {
  return 1.0F / (1.0F + std::exp(-x));
}

float softplus(float x) {
  return x > 20.0F ? x : std::log1p(std::exp(x));
}

// What the linears of a DeltaNet layer give, heads in their order.
struct Projected {
  std::vector<float> channels;  // [rows, channels] queries, keys, values, before the convolution
  std::vector<float> gates;  // [rows, value width]
  std::vector<float> strengths;  // [rows, value heads] before the sigmoid
  std::vector<float> decays;  // [rows, value heads]
};

std::vector<float> project(
    const Context& ctx,
    Workspace& workspace,
    const LinearWeights& linear,
    const float* x,
    std::int64_t rows) {
  std::vector<float> y(static_cast<std::size_t>(rows * linear.out_features));
  linear_forward(ctx, workspace, linear, x, rows, y.data());
  return y;
}

// Qwen3-Next: for each key head its query, its key, the values and the gates of its value heads;
// for each key head the strengths, then the decays.
Projected part_fused(
    const DeltaNetConfig& shape,
    const std::vector<float>& qkvz,
    const std::vector<float>& ba,
    std::int64_t rows) {
  const std::int64_t group = shape.value_heads / shape.key_heads;
  const std::int64_t values = group * shape.value_dim;
  Projected result;
  result.channels.resize(static_cast<std::size_t>(rows * shape.channels()));
  result.gates.resize(static_cast<std::size_t>(rows * shape.value_width()));
  result.strengths.resize(static_cast<std::size_t>(rows * shape.value_heads));
  result.decays.resize(result.strengths.size());
  const float* from = qkvz.data();
  const float* scalar = ba.data();
  for (std::int64_t t = 0; t < rows; ++t) {
    float* q = result.channels.data() + t * shape.channels();
    float* k = q + shape.key_width();
    float* v = k + shape.key_width();
    float* z = result.gates.data() + t * shape.value_width();
    float* b = result.strengths.data() + t * shape.value_heads;
    float* a = result.decays.data() + t * shape.value_heads;
    for (std::int64_t head = 0; head < shape.key_heads; ++head) {
      std::copy_n(from, shape.key_dim, q + head * shape.key_dim);
      from += shape.key_dim;
      std::copy_n(from, shape.key_dim, k + head * shape.key_dim);
      from += shape.key_dim;
      std::copy_n(from, values, v + head * values);
      from += values;
      std::copy_n(from, values, z + head * values);
      from += values;
      std::copy_n(scalar, group, b + head * group);
      std::copy_n(scalar + group, group, a + head * group);
      scalar += 2 * group;
    }
  }
  return result;
}

Projected project_all(
    const Context& ctx,
    Workspace& workspace,
    const DeltaNetConfig& shape,
    const DeltaNet& delta,
    const BlockWeights& weights,
    const float* x,
    std::int64_t rows) {
  const auto of = [&](int linear) {
    return project(ctx, workspace, weights.linears[static_cast<std::size_t>(linear)], x, rows);
  };
  if (shape.fused) {
    return part_fused(shape, of(delta.qkv), of(delta.b), rows);
  }
  return {of(delta.qkv), of(delta.z), of(delta.b), of(delta.a)};
}

// silu of the causal convolution of each channel; `padded` [kernel - 1 + rows, channels] begins
// with the inputs before the first row.
std::vector<float> convolve(
    const Context& ctx,
    const DeltaNetConfig& shape,
    const std::vector<float>& kernel,
    const std::vector<float>& padded,
    std::int64_t rows) {
  const std::int64_t channels = shape.channels();
  std::vector<float> result(static_cast<std::size_t>(rows * channels));
  ctx.pool.for_chunks(rows, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      const float* window = padded.data() + t * channels;
      float* out = result.data() + t * channels;
      for (std::int64_t c = 0; c < channels; ++c) {
        float sum = 0;
        for (std::int64_t j = 0; j < shape.kernel; ++j) {
          sum += kernel[static_cast<std::size_t>(c * shape.kernel + j)] * window[j * channels + c];
        }
        out[c] = sum * sigmoid(sum);
      }
    }
  });
  return result;
}

// to = from / |from| * scale
void normalise(const float* from, std::int64_t n, float scale, float* to) {
  float squares = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    squares += from[i] * from[i];
  }
  const float factor = scale / std::sqrt(squares + kNormEps);
  for (std::int64_t i = 0; i < n; ++i) {
    to[i] = from[i] * factor;
  }
}

DeltaHead head_of(
    const DeltaNetConfig& shape,
    const DeltaWeights& weights,
    const std::vector<float>& convolved,
    const Projected& projected,
    std::int64_t value_head,
    std::int64_t rows) {
  const std::int64_t key_head = value_head / (shape.value_heads / shape.key_heads);
  DeltaHead head;
  head.rows = rows;
  head.key_dim = shape.key_dim;
  head.value_dim = shape.value_dim;
  head.queries.resize(static_cast<std::size_t>(rows * shape.key_dim));
  head.keys.resize(head.queries.size());
  head.values.resize(static_cast<std::size_t>(rows * shape.value_dim));
  const float scale = 1.0F / std::sqrt(static_cast<float>(shape.key_dim));
  const auto h = static_cast<std::size_t>(value_head);
  for (std::int64_t t = 0; t < rows; ++t) {
    const float* q = convolved.data() + t * shape.channels() + key_head * shape.key_dim;
    const float* v = convolved.data() + t * shape.channels() + 2 * shape.key_width() +
                     value_head * shape.value_dim;
    normalise(q, shape.key_dim, scale, head.queries.data() + t * shape.key_dim);
    normalise(q + shape.key_width(), shape.key_dim, 1.0F, head.keys.data() + t * shape.key_dim);
    std::copy_n(v, shape.value_dim, head.values.data() + t * shape.value_dim);
    const std::size_t at = static_cast<std::size_t>(t * shape.value_heads) + h;
    head.strengths.push_back(sigmoid(projected.strengths[at]));
    head.log_decays.push_back(
        weights.decay[h] * softplus(projected.decays[at] + weights.decay_bias[h]));
  }
  return head;
}

// One chunk of delta_rule_chunked, tokens [first, first + n). In the names of methods: A holds
// beta_i (k_i . k_j) exp(c_i - c_j) below the diagonal, U and W the solutions of (I + A) X = beta V
// and (I + A) X = beta exp(c) K.
class DeltaChunk {
 public:
  DeltaChunk(const Context& ctx, const DeltaHead& head) : ctx_(ctx), head_(head) {}

  void run(std::int64_t first, std::int64_t n, float* state, float* out) {
    const std::int64_t dk = head_.key_dim;
    const std::int64_t dv = head_.value_dim;
    const float* Q = head_.queries.data() + first * dk;
    const float* K = head_.keys.data() + first * dk;
    const float* V = head_.values.data() + first * dv;
    const float* beta = head_.strengths.data() + first;
    decays_.resize(static_cast<std::size_t>(n));
    float total = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      total += head_.log_decays[static_cast<std::size_t>(first + i)];
      decays_[static_cast<std::size_t>(i)] = total;
    }
    products_.resize(static_cast<std::size_t>(n * n));
    ctx_.blas.gemm(false, true, n, n, dk, 1.0F, K, dk, K, dk, 0.0F, products_.data(), n);
    decay(n, false);
    U_.resize(static_cast<std::size_t>(n * dv));
    W_.resize(static_cast<std::size_t>(n * dk));
    for (std::int64_t i = 0; i < n; ++i) {
      const float grown = std::exp(decays_[static_cast<std::size_t>(i)]);
      solve_row(i, n, beta[i], 1.0F, V + i * dv, dv, U_.data());
      solve_row(i, n, beta[i], grown, K + i * dk, dk, W_.data());
    }
    // N = U - W S
    ctx_.blas.gemm(false, false, n, dv, dk, -1.0F, W_.data(), dk, state, dv, 1.0F, U_.data(), dv);
    // o = exp(c) Q S + (Q K^T decayed) N
    scaled_.resize(static_cast<std::size_t>(n * dk));
    scale_rows(Q, n, dk, 0.0F, 1.0F);
    ctx_.blas.gemm(false, false, n, dv, dk, 1.0F, scaled_.data(), dk, state, dv, 0.0F, out, dv);
    ctx_.blas.gemm(false, true, n, n, dk, 1.0F, Q, dk, K, dk, 0.0F, products_.data(), n);
    decay(n, true);
    ctx_.blas.gemm(false, false, n, dv, n, 1.0F, products_.data(), n, U_.data(), dv, 1.0F, out, dv);
    // S = exp(c_last) S + (exp(c_last - c) K)^T N
    scale_rows(K, n, dk, total, -1.0F);
    ctx_.blas.gemm(
        true,
        false,
        dk,
        dv,
        n,
        1.0F,
        scaled_.data(),
        dk,
        U_.data(),
        dv,
        std::exp(total),
        state,
        dv);
  }

 private:
  // products_ [n, n] times exp(c_i - c_j), zero above the diagonal and, unless wanted, on it.
  void decay(std::int64_t n, bool diagonal) {
    for (std::int64_t i = 0; i < n; ++i) {
      float* row = products_.data() + i * n;
      for (std::int64_t j = 0; j < n; ++j) {
        const bool kept = j < i || (diagonal && j == i);
        // Above the diagonal the exponent is positive and may overflow.
        row[j] = kept ? row[j] * std::exp(
                                     decays_[static_cast<std::size_t>(i)] -
                                     decays_[static_cast<std::size_t>(j)])
                      : 0.0F;
      }
    }
  }

  // Row i of X in (I + beta products) X = beta factor B, the rows before it being there.
  void solve_row(
      std::int64_t i,
      std::int64_t n,
      float beta,
      float factor,
      const float* b,
      std::int64_t width,
      float* X) const {
    float* x = X + i * width;
    for (std::int64_t c = 0; c < width; ++c) {
      x[c] = beta * factor * b[c];
    }
    for (std::int64_t j = 0; j < i; ++j) {
      const float a = beta * products_[static_cast<std::size_t>(i * n + j)];
      const float* other = X + j * width;
      for (std::int64_t c = 0; c < width; ++c) {
        x[c] -= a * other[c];
      }
    }
  }

  // scaled_ = exp(offset + sign c) rows
  void scale_rows(const float* rows, std::int64_t n, std::int64_t width, float offset, float sign) {
    for (std::int64_t i = 0; i < n; ++i) {
      const float factor = std::exp(offset + sign * decays_[static_cast<std::size_t>(i)]);
      for (std::int64_t c = 0; c < width; ++c) {
        scaled_[static_cast<std::size_t>(i * width + c)] = factor * rows[i * width + c];
      }
    }
  }

  const Context& ctx_;
  const DeltaHead& head_;
  std::vector<float> decays_;  // sums of log decays from the beginning of the chunk on
  std::vector<float> products_;
  std::vector<float> U_;
  std::vector<float> W_;
  std::vector<float> scaled_;
};

// y = norm(o) * gate for the value heads of each row, in place.
void gate_outputs(
    const Context& ctx,
    const ModelConfig& config,
    const DeltaWeights& weights,
    const std::vector<float>& gates,
    std::int64_t rows,
    float* out) {
  const DeltaNetConfig& shape = *config.delta_net;
  const std::int64_t dim = shape.value_dim;
  ctx.pool.for_chunks(
      rows * shape.value_heads, kRowChunk, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t i = begin; i < end; ++i) {
          float* o = out + i * dim;
          const float* z = gates.data() + i * dim;
          ctx.kernels.rms_norm(o, weights.norm.data(), config.norm_eps, o, dim);
          for (std::int64_t c = 0; c < dim; ++c) {
            o[c] *= sigmoid(z[c]) * (shape.sigmoid_gate ? 1.0F : z[c]);
          }
        }
      });
}

}  // namespace

void delta_rule(const DeltaHead& head, float* state, float* out) {
  const std::int64_t dk = head.key_dim;
  const std::int64_t dv = head.value_dim;
  std::vector<float> error(static_cast<std::size_t>(dv));
  for (std::int64_t t = 0; t < head.rows; ++t) {
    const float* q = head.queries.data() + t * dk;
    const float* k = head.keys.data() + t * dk;
    const float* v = head.values.data() + t * dv;
    const float decay = std::exp(head.log_decays[static_cast<std::size_t>(t)]);
    const float beta = head.strengths[static_cast<std::size_t>(t)];
    std::fill(error.begin(), error.end(), 0.0F);
    for (std::int64_t i = 0; i < dk; ++i) {
      float* row = state + i * dv;
      for (std::int64_t c = 0; c < dv; ++c) {
        row[c] *= decay;
        error[static_cast<std::size_t>(c)] += row[c] * k[i];
      }
    }
    for (std::int64_t c = 0; c < dv; ++c) {
      error[static_cast<std::size_t>(c)] = beta * (v[c] - error[static_cast<std::size_t>(c)]);
    }
    float* o = out + t * dv;
    std::fill_n(o, dv, 0.0F);
    for (std::int64_t i = 0; i < dk; ++i) {
      float* row = state + i * dv;
      for (std::int64_t c = 0; c < dv; ++c) {
        row[c] += k[i] * error[static_cast<std::size_t>(c)];
        o[c] += row[c] * q[i];
      }
    }
  }
}

void delta_rule_chunked(const Context& ctx, const DeltaHead& head, float* state, float* out) {
  DeltaChunk chunk(ctx, head);
  for (std::int64_t first = 0; first < head.rows; first += kChunk) {
    chunk.run(first, std::min(kChunk, head.rows - first), state, out + first * head.value_dim);
  }
}

void delta_net_forward(
    const Context& ctx,
    Workspace& workspace,
    const ModelConfig& config,
    const Block& block,
    const BlockWeights& weights,
    const float* x,
    std::int64_t rows,
    LayerCache& cache,
    float* out) {
  const DeltaNetConfig& shape = *config.delta_net;
  const Projected projected =
      project_all(ctx, workspace, shape, *block.delta_net, weights, x, rows);
  const auto history = static_cast<std::size_t>((shape.kernel - 1) * shape.channels());
  std::vector<float> inputs = std::move(cache.convolved);
  inputs.resize(history);  // zeros before the first token
  inputs.insert(inputs.end(), projected.channels.begin(), projected.channels.end());
  const std::vector<float> convolved =
      convolve(ctx, shape, weights.delta.convolution, inputs, rows);
  cache.convolved.assign(inputs.end() - static_cast<std::ptrdiff_t>(history), inputs.end());
  const std::int64_t state_size = shape.key_dim * shape.value_dim;
  cache.state.resize(static_cast<std::size_t>(shape.value_heads * state_size));
  if (cache.keeps_journal) {
    cache.journal = {cache.state, std::move(inputs), {}};
    cache.journal.heads.resize(static_cast<std::size_t>(shape.value_heads));
  }
  ctx.pool.for_chunks(shape.value_heads, 1, [&](std::int64_t h, std::int64_t, int) {
    DeltaHead head = head_of(shape, weights.delta, convolved, projected, h, rows);
    std::vector<float> o(head.values.size());
    float* state = cache.state.data() + h * state_size;
    if (rows <= kRecurrentRows || cache.keeps_journal) {
      delta_rule(head, state, o.data());
    } else {
      delta_rule_chunked(ctx, head, state, o.data());
    }
    for (std::int64_t t = 0; t < rows; ++t) {
      std::copy_n(
          o.data() + t * shape.value_dim,
          shape.value_dim,
          out + t * shape.value_width() + h * shape.value_dim);
    }
    if (cache.keeps_journal) {
      cache.journal.heads[static_cast<std::size_t>(h)] = std::move(head);
    }
  });
  gate_outputs(ctx, config, weights.delta, projected.gates, rows, out);
  cache.tokens += rows;
}

void delta_net_rewind(const DeltaNetConfig& shape, std::int64_t tokens, LayerCache& cache) {
  DeltaJournal journal = std::move(cache.journal);
  cache.journal = {};
  const std::int64_t kept = tokens - (cache.tokens - journal.heads.front().rows);
  cache.tokens = tokens;
  const float* first = journal.inputs.data() + kept * shape.channels();
  cache.convolved.assign(first, first + (shape.kernel - 1) * shape.channels());
  cache.state = std::move(journal.state);
  float* state = cache.state.data();
  for (DeltaHead& head : journal.heads) {
    head.rows = kept;
    std::vector<float> unused(static_cast<std::size_t>(kept * head.value_dim));
    delta_rule(head, state, unused.data());
    state += head.key_dim * head.value_dim;
  }
}

}  // namespace quern
