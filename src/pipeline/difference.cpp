// SPDX-License-Identifier: Apache-2.0
#include "pipeline/difference.h"

#include "base/error.h"
#include "quant/ggml_matrix.h"
#include "quant/packed_linear.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <span>
#include <utility>

namespace quern {
namespace {

// Row `row` of a stored matrix as floats.
void read_row(
    const Context& ctx,
    const StoredLinear& stored,
    std::int64_t row,
    std::span<std::uint8_t> scratch,
    std::span<float> out) {
  if (stored.quantized) {
    stored.quantized->dequantize_row(ctx.kernels, row, scratch, out);
  } else {
    to_float(stored.dense->rows(row, row + 1), out);
  }
}

struct RowDifference {
  double difference = 0;  // squared
  double norm_a = 0;
  double norm_b = 0;
  double largest = 0;
};

RowDifference row_difference(std::span<const float> a, std::span<const float> b) {
  RowDifference sums;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double d = static_cast<double>(a[i]) - b[i];
    sums.difference += d * d;
    sums.norm_a += static_cast<double>(a[i]) * a[i];
    sums.norm_b += static_cast<double>(b[i]) * b[i];
    sums.largest = std::max(sums.largest, std::fabs(d));
  }
  return sums;
}

MatrixDifference total_of(std::span<const RowDifference> rows) {
  RowDifference total;
  for (const RowDifference& row : rows) {
    total.difference += row.difference;
    total.norm_a += row.norm_a;
    total.norm_b += row.norm_b;
    total.largest = std::max(total.largest, row.largest);
  }
  MatrixDifference result;
  // A NaN in a row makes its sums one; std::max above may have passed it over.
  result.finite = std::isfinite(total.difference);
  result.relative = std::sqrt(total.norm_a > 0 ? total.difference / total.norm_a : total.norm_b);
  result.largest = total.largest;
  return result;
}

// The values of a norm or bias.
std::vector<float> vector_of(
    const Checkpoint& checkpoint, const std::string& name, std::int64_t size) {
  return to_float(checkpoint.tensors().require(name, {size}));
}

// Names and sizes of the tensors that are no matrices.
std::map<std::string, std::int64_t> vectors_of(const ModelGraph& graph) {
  std::map<std::string, std::int64_t> vectors = {{graph.final_norm.tensor, graph.final_norm.size}};
  for (const Block& block : graph.blocks) {
    for (const Norm* norm :
         {&block.attention_norm, &block.mlp_norm, &block.q_norm, &block.k_norm}) {
      if (norm->size > 0) {
        vectors.emplace(norm->tensor, norm->size);
      }
    }
    for (const Linear& linear : block.linears) {
      if (linear.has_bias) {
        vectors.emplace(linear.module + ".bias", linear.out_features);
      }
    }
  }
  return vectors;
}

std::vector<const Linear*> matrices_of(const ModelGraph& graph) {
  std::vector<const Linear*> matrices = {&graph.embedding};
  for (const Block& block : graph.blocks) {
    for (const Linear& linear : block.linears) {
      matrices.push_back(&linear);
    }
  }
  matrices.push_back(&graph.head);
  return matrices;
}

ModelGraph graph_of(const Checkpoint& checkpoint) {
  ModelGraph graph = build_graph(checkpoint);
  check_tensors(graph, checkpoint);
  return graph;
}

void require_same_architecture(const ModelGraph& a, const ModelGraph& b, const Checkpoint& other) {
  const auto left = matrices_of(a);
  const auto right = matrices_of(b);
  const bool same = std::equal(
      left.begin(), left.end() - 1, right.begin(), right.end() - 1, [](auto* x, auto* y) {
        return x->module == y->module && x->out_features == y->out_features &&
               x->in_features == y->in_features;
      });
  if (!same || vectors_of(a) != vectors_of(b)) {
    throw UsageError(
        "not two checkpoints of the same model",
        other.config_place(),
        fmt::format(
            "expected {} with {} layers of width {}, found {} with {} layers of width {}",
            a.config.family,
            a.config.layers,
            a.config.hidden_size,
            b.config.family,
            b.config.layers,
            b.config.hidden_size),
        "compare a checkpoint with its original, or two that were made from the same one");
  }
}

LinearDifference compare_linear(
    const Context& ctx,
    const Linear& in_a,
    const Linear& in_b,
    const Checkpoint& a,
    const Checkpoint& b) {
  const StoredLinear left = a.load_linear(in_a.module, in_a.out_features, in_a.in_features);
  const StoredLinear right = b.load_linear(in_b.module, in_b.out_features, in_b.in_features);
  LinearDifference result;
  result.name = in_a.module;
  result.role = in_a.role;
  result.shape = {in_a.out_features, in_a.in_features};
  result.form_a = describe_form(left);
  result.form_b = describe_form(right);
  result.difference = matrix_difference(ctx, left, right, in_a);
  for (const auto& [stored, checkpoint] : {std::pair{&left, &a}, {&right, &b}}) {
    if (stored->dense) {
      checkpoint->tensors().release(*stored->dense);
    }
  }
  return result;
}

}  // namespace

MatrixDifference matrix_difference(
    const Context& ctx, const StoredLinear& a, const StoredLinear& b, const Linear& linear) {
  const auto width = static_cast<std::size_t>(linear.in_features);
  std::vector<RowDifference> rows(static_cast<std::size_t>(linear.out_features));
  ctx.pool.for_chunks(linear.out_features, 16, [&](std::int64_t begin, std::int64_t end, int) {
    std::vector<std::uint8_t> scratch(width);
    std::vector<float> left(width);
    std::vector<float> right(width);
    for (std::int64_t r = begin; r < end; ++r) {
      read_row(ctx, a, r, scratch, left);
      read_row(ctx, b, r, scratch, right);
      rows[static_cast<std::size_t>(r)] = row_difference(left, right);
    }
  });
  return total_of(rows);
}

std::string describe_form(const StoredLinear& stored) {
  if (!stored.quantized) {
    return std::string(dtype_name(stored.dense->dtype));
  }
  std::string text(stored.quantized->kind());
  if (const auto* packed = dynamic_cast<const PackedLinear*>(stored.quantized.get())) {
    text = fmt::format(
        "{} bits, {}, {}{}",
        packed->scheme.bits,
        packed->scheme.group_size == 0 ? "by channel"
                                       : fmt::format("groups of {}", packed->scheme.group_size),
        packed->scheme.symmetric ? "symmetric" : "asymmetric",
        packed->group_index.empty() ? "" : ", act-order");
  } else if (const auto* ggml = dynamic_cast<const GgmlMatrix*>(stored.quantized.get())) {
    text = ggml_type_info(ggml->type).name;
  }
  if (stored.activation && stored.activation->active()) {
    text += fmt::format(
        ", {} inputs of {} bits",
        stored.activation->dynamic ? "dynamic" : "static",
        stored.activation->bits);
  }
  return text;
}

CheckpointDifference compare_checkpoints(
    const Context& ctx, const Checkpoint& a, const Checkpoint& b) {
  const ModelGraph graph_a = graph_of(a);
  const ModelGraph graph_b = graph_of(b);
  require_same_architecture(graph_a, graph_b, b);
  CheckpointDifference result;
  const auto left = matrices_of(graph_a);
  const auto right = matrices_of(graph_b);
  const bool one_table = graph_a.head_tied && graph_b.head_tied;
  for (std::size_t i = 0; i < left.size() - (one_table ? 1 : 0); ++i) {
    result.linears.push_back(compare_linear(ctx, *left[i], *right[i], a, b));
  }
  for (const auto& [name, size] : vectors_of(graph_a)) {
    const RowDifference sums = row_difference(vector_of(a, name, size), vector_of(b, name, size));
    const MatrixDifference difference = total_of(std::span(&sums, 1));
    if (difference.finite && difference.largest == 0) {
      ++result.equal_tensors;
    } else {
      result.tensors.push_back({name, difference.relative, difference.largest});
    }
  }
  return result;
}

bool equal_checkpoints(const Context& ctx, const Checkpoint& a, const Checkpoint& b) {
  const CheckpointDifference difference = compare_checkpoints(ctx, a, b);
  return difference.tensors.empty() &&
         std::all_of(
             difference.linears.begin(), difference.linears.end(), [](const LinearDifference& l) {
               return l.difference.finite && l.difference.largest == 0;
             });
}

Json difference_json(const CheckpointDifference& difference) {
  Json linears = Json::array();
  std::int64_t equal = 0;
  double squares = 0;
  const LinearDifference* worst = nullptr;
  for (const LinearDifference& linear : difference.linears) {
    linears.push_back(
        {{"name", linear.name},
         {"role", role_name(linear.role)},
         {"shape", linear.shape},
         {"a", linear.form_a},
         {"b", linear.form_b},
         {"relative_difference", linear.difference.relative},
         {"largest_difference", linear.difference.largest},
         {"finite", linear.difference.finite}});
    equal += linear.difference.finite && linear.difference.largest == 0 ? 1 : 0;
    squares += linear.difference.relative * linear.difference.relative;
    if (worst == nullptr || linear.difference.relative > worst->difference.relative) {
      worst = &linear;
    }
  }
  Json tensors = Json::array();
  for (const TensorDifference& tensor : difference.tensors) {
    tensors.push_back(
        {{"name", tensor.name},
         {"relative_difference", tensor.relative},
         {"largest_difference", tensor.largest}});
  }
  return {
      {"summary",
       {{"linears", difference.linears.size()},
        {"equal_linears", equal},
        {"rms_relative_difference",
         std::sqrt(squares / static_cast<double>(difference.linears.size()))},
        {"worst", worst->name},
        {"worst_relative_difference", worst->difference.relative},
        {"equal_tensors", difference.equal_tensors},
        {"different_tensors", difference.tensors.size()}}},
      {"linears", std::move(linears)},
      {"tensors", std::move(tensors)}};
}

}  // namespace quern
