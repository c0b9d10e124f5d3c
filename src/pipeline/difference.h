// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "base/json.h"
#include "model/graph.h"
#include "tensor/checkpoint.h"

#include <string>
#include <vector>

namespace quern {

// How far two matrices [out, in] are apart, row by row on the pool.
struct MatrixDifference {
  double relative = 0;  // |A - B| / |A| in the Frobenius norm; |B| when A is zero
  double largest = 0;  // max |A - B|
  bool finite = true;  // of both matrices
};
[[nodiscard]] MatrixDifference matrix_difference(
    const Context& ctx, const StoredLinear& a, const StoredLinear& b, const Linear& linear);

// "BF16", "4 bits, groups of 128, symmetric", "Q4_K", with the inputs when they are integers.
[[nodiscard]] std::string describe_form(const StoredLinear& stored);

// Two checkpoints of one model, tensor by tensor.
struct LinearDifference {
  std::string name;
  Role role = Role::kQuery;
  Shape shape;
  std::string form_a;
  std::string form_b;
  MatrixDifference difference;
};
struct TensorDifference {
  std::string name;
  double relative = 0;
  double largest = 0;
};
struct CheckpointDifference {
  std::vector<LinearDifference>
      linears;  // all, with embeddings and head, in the order of the graph
  std::vector<TensorDifference> tensors;  // norms and biases that differ
  std::int64_t equal_tensors = 0;  // norms and biases that do not
};

// Throws UsageError when the two are not checkpoints of the same architecture.
[[nodiscard]] CheckpointDifference compare_checkpoints(
    const Context& ctx, const Checkpoint& a, const Checkpoint& b);

// Whether all matrices and vectors of two checkpoints stand for the same floats.
[[nodiscard]] bool equal_checkpoints(const Context& ctx, const Checkpoint& a, const Checkpoint& b);

// `linears`, `tensors` and `summary` of `quern compare`.
[[nodiscard]] Json difference_json(const CheckpointDifference& difference);

}  // namespace quern
