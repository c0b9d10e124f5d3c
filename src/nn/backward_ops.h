// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "base/context.h"
#include "nn/attention.h"

#include <cstdint>

namespace quern {

// Backward functions of the operations of a block (methods.md 12): given dy, the gradient of a loss
// at an output, they return dx, the gradient at an input. In float, which is what runs, and in
// double, which the tests hold against central differences. The linear's is in nn/linear.h.

// y = gain * x * r with r = (mean(x^2) + eps)^-1/2, over n values:
//   dx = r * (gain * dy - x * r^2 * mean(gain * dy * x)).
// Sums in double; dx may be dy.
template <class T>
void rms_norm_backward(const T* x, const T* gain, float eps, const T* dy, std::int64_t n, T* dx);

// In place: the rotation's transpose, which is that by -theta with the same attention factor inside
// cos and sin [half]. x holds the pairs (x[m], x[m + half]).
template <class T>
void rope_backward(const T* cosines, const T* sines, std::int64_t half, T* x);

// h = silu(gate) * up, over n values, with s = sigmoid(gate):
//   dup = dh * gate * s,  dgate = dh * up * s * (1 + gate * (1 - s)).
// In place of gate and up.
template <class T>
void swiglu_backward(const Context& ctx, const T* dh, std::int64_t n, T* gate, T* up);

// p = softmax(s), over n values: ds = p * (dp - sum(p * dp)), in place of dp.
template <class T>
void softmax_backward(const Context& ctx, const T* p, std::int64_t n, T* dp);

// loss = -scale * log(softmax(logits)[label]): dlogits = scale * (p - onehot(label)), in place of
// p = softmax(logits) [n]. A label below 0 means no loss and no gradient.
template <class T>
void cross_entropy_backward(std::int64_t n, std::int64_t label, T scale, T* p);

// attend() of one sequence from position 0: from dout [rows, q_width] the gradients dq [rows,
// q_width], dk and dv [rows, kv_width], those of the query heads of a group summed. Probabilities
// are computed again tile by tile, one head a worker: scratch is 2 x 256 x rows values a worker and
// 2 x rows x q_width in all. Same result for any thread count.
template <class T>
void attend_backward(
    const Context& ctx,
    const AttentionShape& shape,
    std::int64_t rows,
    const T* queries,
    const T* keys,
    const T* values,
    const T* dout,
    T* dq,
    T* dk,
    T* dv);

}  // namespace quern
