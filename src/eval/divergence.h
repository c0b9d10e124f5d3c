// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"

#include <cstdint>

namespace quern {

// sum_i p_i (log p_i - log q_i) in nats, p and q the softmax of the logits a and b [n], whose
// log-sum-exps are a_norm and b_norm. `p` is scratch of n floats.
[[nodiscard]] double kl_divergence(
    const Context& ctx,
    const float* a,
    const float* b,
    double a_norm,
    double b_norm,
    std::int64_t n,
    float* p);

}  // namespace quern
