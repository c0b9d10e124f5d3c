// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/half.h"
#include "golden.h"
#include "nn/attention.h"
#include "nn/weights.h"
#include "quant/packed_linear.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace quern::testing {

// The forward pass of a decoder block in double, as plain as it can be written: what central
// differences are taken of.

using Doubles = std::vector<double>;

inline Doubles rms_norm(const Doubles& x, const Doubles& gain, double eps) {
  const double square = std::inner_product(x.begin(), x.end(), x.begin(), 0.0);
  const double r = 1 / std::sqrt(square / static_cast<double>(x.size()) + eps);
  Doubles y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    y[i] = gain[i] * x[i] * r;
  }
  return y;
}

inline Doubles rotate(const Doubles& x, const Doubles& cosines, const Doubles& sines) {
  const std::size_t half = x.size() / 2;
  Doubles y(x.size());
  for (std::size_t m = 0; m < half; ++m) {
    y[m] = x[m] * cosines[m] - x[m + half] * sines[m];
    y[m + half] = x[m + half] * cosines[m] + x[m] * sines[m];
  }
  return y;
}

inline Doubles swiglu(const Doubles& gate, const Doubles& up) {
  Doubles y(gate.size());
  for (std::size_t i = 0; i < y.size(); ++i) {
    y[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
  }
  return y;
}

inline Doubles softmax(Doubles x) {
  const double highest = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double& value : x) {
    value = std::exp(value - highest);
    sum += value;
  }
  for (double& value : x) {
    value /= sum;
  }
  return x;
}

// [rows, heads * head_dim] from queries and the keys and values [rows, kv_heads * head_dim].
inline Doubles attention(
    const AttentionShape& shape,
    std::int64_t rows,
    const Doubles& q,
    const Doubles& k,
    const Doubles& v) {
  const std::int64_t dim = shape.head_dim;
  Doubles out(q.size(), 0.0);
  for (std::int64_t t = 0; t < rows; ++t) {
    const std::int64_t first =
        shape.window == 0 ? 0 : std::max<std::int64_t>(0, t - shape.window + 1);
    for (std::int64_t h = 0; h < shape.heads; ++h) {
      const std::size_t query = static_cast<std::size_t>(t * shape.q_width() + h * dim);
      const auto key = [&](std::int64_t s) {
        return static_cast<std::size_t>(s * shape.kv_width() + h / shape.group() * dim);
      };
      Doubles scores;
      for (std::int64_t s = first; s <= t; ++s) {
        double sum = 0;
        for (std::size_t i = 0; i < static_cast<std::size_t>(dim); ++i) {
          sum += q[query + i] * k[key(s) + i];
        }
        scores.push_back(sum / std::sqrt(static_cast<double>(dim)));
      }
      const Doubles p = softmax(scores);
      for (std::int64_t s = first; s <= t; ++s) {
        for (std::size_t i = 0; i < static_cast<std::size_t>(dim); ++i) {
          out[query + i] += p[static_cast<std::size_t>(s - first)] * v[key(s) + i];
        }
      }
    }
  }
  return out;
}

enum class Stored { kF32, kBF16, kF16, kPacked, kPackedActOrder };

// A linear with random weights, stored one way or the other, that owns its bytes.
class OwnedLinear {
 public:
  OwnedLinear(std::int64_t out, std::int64_t in, Stored stored, unsigned seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal(0, 1 / std::sqrt(static_cast<float>(in)));
    weights.out_features = out;
    weights.in_features = in;
    if (stored == Stored::kPacked || stored == Stored::kPackedActOrder) {
      pack(stored == Stored::kPackedActOrder, random);
      return;
    }
    std::vector<float> values(static_cast<std::size_t>(out * in));
    std::generate(values.begin(), values.end(), [&] { return normal(random); });
    const DType dtype = stored == Stored::kF32    ? DType::kF32
                        : stored == Stored::kBF16 ? DType::kBF16
                                                  : DType::kF16;
    weights.aligned_copy =
        std::make_shared<const std::vector<std::byte>>(from_float(values, dtype));
    weights.dense = {dtype, {out, in}, *weights.aligned_copy};
    const std::vector<float> rounded = to_float(weights.dense);
    values_.assign(rounded.begin(), rounded.end());
  }

  [[nodiscard]] double at(std::int64_t o, std::int64_t i) const {
    return values_[static_cast<std::size_t>(o * weights.in_features + i)];
  }
  [[nodiscard]] const Doubles& values() const { return values_; }

  LinearWeights weights;

 private:
  void pack(bool act_order, std::mt19937_64& random) {
    const std::int64_t out = weights.out_features;
    const std::int64_t in = weights.in_features;
    QuantScheme scheme;
    scheme.bits = 3;
    scheme.symmetric = false;
    scheme.group_size = 32;
    PackedLinear packed = PackedLinear::make(scheme, out, in);
    for (std::int64_t o = 0; o < out; ++o) {
      std::vector<std::uint8_t> codes(static_cast<std::size_t>(in));
      std::generate(
          codes.begin(), codes.end(), [&] { return static_cast<std::uint8_t>(random() % 8); });
      packed.set_row_codes(o, codes);
    }
    for (float& scale : packed.scales) {
      scale = f16_to_float(float_to_f16(0.02F + 0.01F * static_cast<float>(random() % 16)));
    }
    for (std::uint8_t& zero : packed.zeros) {
      zero = static_cast<std::uint8_t>(random() % 8);
    }
    if (act_order) {
      for (std::int64_t i = 0; i < in; ++i) {
        packed.group_index.push_back(
            static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(packed.groups())));
      }
    }
    const std::vector<float> values = packed.dequantize(test_kernels());
    values_.assign(values.begin(), values.end());
    weights.quantized = std::make_shared<const PackedLinear>(std::move(packed));
  }

  Doubles values_;
};

struct BlockOptions {
  bool qkv_bias = false;
  bool output_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;
  std::int64_t window = 0;
  float attention_factor = 1;
  Stored stored = Stored::kF32;
};

// A random block of odd sizes: 6 heads of 4 in 3 groups beside a hidden size of 10. Weights, biases
// and gains are there twice: as the engine takes them, and as doubles that a test may change.
class ReferenceBlock {
 public:
  explicit ReferenceBlock(const BlockOptions& options) : random_(99) {
    config.vocab_size = 17;
    config.hidden_size = 10;
    config.layers = 1;
    config.heads = 6;
    config.kv_heads = 2;
    config.head_dim = 4;
    config.intermediate_size = 13;
    config.norm_eps = 1e-2F;  // large enough to matter
    config.rope = {{1.0F, 0.3F}, options.attention_factor};
    config.sliding_windows = {options.window};
    DecoderOptions dense;
    dense.qkv_bias = options.qkv_bias;
    dense.output_bias = options.output_bias;
    dense.mlp_bias = options.mlp_bias;
    dense.qk_norm = options.qk_norm;
    graph = decoder_graph(config, dense).blocks.front();
    for (const Linear& linear : graph.linears) {
      const OwnedLinear owned(
          linear.out_features,
          linear.in_features,
          options.stored,
          static_cast<unsigned>(weights.linears.size()) + 80);
      weights.linears.push_back(owned.weights);
      W.push_back(owned.values());
      weights.linears.back().bias = random_floats(linear.has_bias ? linear.out_features : 0, 0);
      biases.emplace_back(weights.linears.back().bias.begin(), weights.linears.back().bias.end());
    }
    weights.attention_norm = random_floats(config.hidden_size, 1);
    weights.mlp_norm = random_floats(config.hidden_size, 1);
    weights.q_norm = random_floats(options.qk_norm ? config.head_dim : 0, 1);
    weights.k_norm = random_floats(options.qk_norm ? config.head_dim : 0, 1);
  }

  // The block's output for x [rows, hidden].
  [[nodiscard]] Doubles forward(const Doubles& x, std::int64_t rows) const {
    const Doubles attended = attention(
        attention_shape(config, graph),
        rows,
        heads(apply(kQ, norm(x, weights.attention_norm), rows), weights.q_norm, config.heads),
        heads(apply(kK, norm(x, weights.attention_norm), rows), weights.k_norm, config.kv_heads),
        apply(kV, norm(x, weights.attention_norm), rows));
    const Doubles middle = sum(x, apply(kO, attended, rows));
    const Doubles X = norm(middle, weights.mlp_norm);
    const Doubles hidden = swiglu(apply(kGateProj, X, rows), apply(kUpProj, X, rows));
    return sum(middle, apply(kDownProj, hidden, rows));
  }

  ModelConfig config;
  Block graph;
  BlockWeights weights;
  std::vector<Doubles> W;  // of each linear, [out, in]
  std::vector<Doubles> biases;

 private:
  std::vector<float> random_floats(std::int64_t n, float mean) {
    std::normal_distribution<float> normal(mean, 0.4F);
    std::vector<float> values(static_cast<std::size_t>(n));
    std::generate(values.begin(), values.end(), [&] { return normal(random_); });
    return values;
  }

  static Doubles sum(Doubles a, const Doubles& b) {
    std::transform(a.begin(), a.end(), b.begin(), a.begin(), std::plus<>());
    return a;
  }

  // Norm of consecutive rows of the gain's width.
  [[nodiscard]] Doubles norm(const Doubles& x, const std::vector<float>& gain) const {
    const Doubles wide(gain.begin(), gain.end());
    Doubles y;
    for (auto at = x.begin(); at != x.end(); at += static_cast<std::ptrdiff_t>(gain.size())) {
      const Doubles row = rms_norm(
          Doubles(at, at + static_cast<std::ptrdiff_t>(gain.size())),
          wide,
          static_cast<double>(config.norm_eps));
      y.insert(y.end(), row.begin(), row.end());
    }
    return y;
  }

  [[nodiscard]] Doubles apply(int linear, const Doubles& x, std::int64_t rows) const {
    const Linear& shape = graph.linears[static_cast<std::size_t>(linear)];
    const Doubles& matrix = W[static_cast<std::size_t>(linear)];
    const Doubles& bias = biases[static_cast<std::size_t>(linear)];
    Doubles y;
    for (std::int64_t t = 0; t < rows; ++t) {
      for (std::int64_t o = 0; o < shape.out_features; ++o) {
        const auto row = matrix.begin() + o * shape.in_features;
        y.push_back(std::inner_product(
            row,
            row + shape.in_features,
            x.begin() + t * shape.in_features,
            bias.empty() ? 0.0 : bias[static_cast<std::size_t>(o)]));
      }
    }
    return y;
  }

  // Norm, if any, and rotation of all heads of all rows.
  [[nodiscard]] Doubles heads(Doubles x, const std::vector<float>& gain, std::int64_t count) const {
    if (!gain.empty()) {
      x = norm(x, gain);
    }
    const auto dim = static_cast<std::size_t>(config.head_dim);
    Doubles y;
    for (std::size_t at = 0; at < x.size(); at += dim) {
      const std::size_t position = at / dim / static_cast<std::size_t>(count);
      Doubles cosines;
      Doubles sines;
      for (const float frequency : config.rope.inverse_frequencies) {
        // The tables are floats: rounding them is no part of what is tested here.
        const float angle = static_cast<float>(position) * frequency;
        cosines.push_back(
            static_cast<float>(std::cos(static_cast<double>(angle))) *
            config.rope.attention_factor);
        sines.push_back(
            static_cast<float>(std::sin(static_cast<double>(angle))) *
            config.rope.attention_factor);
      }
      const Doubles head(
          x.begin() + static_cast<std::ptrdiff_t>(at),
          x.begin() + static_cast<std::ptrdiff_t>(at + dim));
      const Doubles turned = rotate(head, cosines, sines);
      y.insert(y.end(), turned.begin(), turned.end());
    }
    return y;
  }

  std::mt19937_64 random_;
};

}  // namespace quern::testing
