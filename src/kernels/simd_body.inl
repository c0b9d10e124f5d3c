// SPDX-License-Identifier: Apache-2.0
// The operations that read the same at every vector width. A level's file defines, in an unnamed
// namespace and before it includes this one:
//   kLanes, Vec       a register of that many floats
//   All, First        which lanes a load or store touches: every one, or the first `count`
//                     (1 ... kLanes - 1); memory of the other lanes is not read or written
//   Wide              the lanes of a Vec as doubles, for sums
//   and the functions used below. Two rules hold for them: minimum and maximum return their second
//   argument when either is NaN, and scale_by_power(v, n) is v * 2^n rounded once.
//
// Elements are processed alike wherever they stand, and the order of additions depends on n only:
// results do not change with alignment or with how rows are split among threads.

namespace quern {
namespace {

constexpr float kInfinity = __builtin_inff();

// Calls body(i, lanes) for every vector of [0, n), the last one possibly partial.
template <class Body>
inline void for_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    body(i, All{});
  }
  if (i < n) {
    body(i, First(n - i));
  }
}

// e^x within 1 ulp (0.988, measured over all floats), denormal results included.
// -inf gives 0, +inf and all above the float range +inf, NaN stays NaN.
inline Vec exponential(Vec x) {
  // Beyond these the result is 0 or infinite. NaN passes as the second argument.
  x = minimum(broadcast(89.0F), maximum(broadcast(-104.0F), x));
  // x = n ln 2 + r with |r| <= ln 2 / 2; ln 2 in two floats, the fused product is exact.
  const Vec n = round_to_even(mul(x, broadcast(0x1.715476p+0F)));
  Vec r = fma(n, broadcast(-0x1.62e43p-1F), x);
  r = fma(n, broadcast(0x1.05c61p-29F), r);
  // e^r = 1 + r + r^2 q(r); q interpolates at the Chebyshev nodes, 0.02 ulp from the function.
  Vec q = broadcast(0x1.a1256cp-13F);
  q = fma(q, r, broadcast(0x1.6d43bp-10F));
  q = fma(q, r, broadcast(0x1.1110ep-7F));
  q = fma(q, r, broadcast(0x1.5554e8p-5F));
  q = fma(q, r, broadcast(0x1.555556p-3F));
  q = fma(q, r, broadcast(0.5F));
  const Vec small = fma(mul(r, r), q, r);
  return scale_by_power(add(small, broadcast(1.0F)), n);
}

// 16-bit loads without a name of their own are bfloat16.
void bf16_to_f32(const uint16_t* in, float* out, int64_t n) {
  for_lanes(n, [=](int64_t i, auto lanes) { store(out + i, load(in + i, lanes), lanes); });
}

void f16_to_f32(const uint16_t* in, float* out, int64_t n) {
  for_lanes(n, [=](int64_t i, auto lanes) { store(out + i, load_f16(in + i, lanes), lanes); });
}

// Float sums run over at most this many elements before they are added to a double: the error stays
// that of short sums however long the vectors are.
constexpr int64_t kBlock = 4096;

// Four sums hide the latency of the fused multiply-add: each needs two loads, so that more could
// not be fed. Doubles take the four partial sums of a block, then all blocks.
template <class Element>
inline float dot(const float* a, const Element* b, int64_t n) {
  Wide total = wide_zero();
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = n - begin < kBlock ? n : begin + kBlock;
    Vec sum0 = broadcast(0.0F);
    Vec sum1 = sum0;
    Vec sum2 = sum0;
    Vec sum3 = sum0;
    int64_t i = begin;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      sum0 = fma(load(a + i, All{}), load(b + i, All{}), sum0);
      sum1 = fma(load(a + i + kLanes, All{}), load(b + i + kLanes, All{}), sum1);
      sum2 = fma(load(a + i + 2 * kLanes, All{}), load(b + i + 2 * kLanes, All{}), sum2);
      sum3 = fma(load(a + i + 3 * kLanes, All{}), load(b + i + 3 * kLanes, All{}), sum3);
    }
    for_lanes(end - i, [&](int64_t j, auto lanes) {
      sum0 = fma(load(a + i + j, lanes), load(b + i + j, lanes), sum0);
    });
    total = wide_add(wide_add(total, add(sum0, sum1)), add(sum2, sum3));
  }
  return static_cast<float>(wide_sum(total));
}

float dot_f32(const float* a, const float* b, int64_t n) {
  return dot(a, b, n);
}

float dot_bf16(const float* a, const uint16_t* b, int64_t n) {
  return dot(a, b, n);
}

// One row at a time: the matrix is then one sequential stream, which the prefetchers follow across
// the ends of rows, and decoding reads it from memory. Interleaving 2, 4 or 8 rows to hide latency
// was tried on Zen 4: 13 GB/s against 26 (docs/gemm.md); software prefetch lost as well.
void matvec_bf16(const uint16_t* W, const float* x, float* y, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) {
    y[row] = dot(x, W + row * columns, columns);
  }
}

void axpy_f32(float a, const float* x, float* y, int64_t n) {
  const Vec factor = broadcast(a);
  for_lanes(n, [=](int64_t i, auto lanes) {
    store(y + i, fma(factor, load(x + i, lanes), load(y + i, lanes)), lanes);
  });
}

void add_f32(const float* x, float* y, int64_t n) {
  for_lanes(n, [=](int64_t i, auto lanes) {
    store(y + i, add(load(x + i, lanes), load(y + i, lanes)), lanes);
  });
}

void rms_norm(const float* x, const float* gain, float eps, float* y, int64_t n) {
  Wide sum = wide_zero();
  for_lanes(n, [&](int64_t i, auto lanes) { sum = wide_add_square(sum, load(x + i, lanes)); });
  const double mean = wide_sum(sum) / static_cast<double>(n);
  const Vec inverse =
      broadcast(static_cast<float>(1.0 / __builtin_sqrt(mean + static_cast<double>(eps))));
  for_lanes(n, [=](int64_t i, auto lanes) {
    store(y + i, mul(load(gain + i, lanes), mul(load(x + i, lanes), inverse)), lanes);
  });
}

void rope_half(float* x, const float* cos, const float* sin, int64_t half) {
  for_lanes(half, [=](int64_t i, auto lanes) {
    const Vec low = load(x + i, lanes);
    const Vec high = load(x + half + i, lanes);
    const Vec c = load(cos + i, lanes);
    const Vec s = load(sin + i, lanes);
    store(x + i, fma(low, c, negate(mul(high, s))), lanes);
    store(x + half + i, fma(high, c, mul(low, s)), lanes);
  });
}

void exp_f32(const float* x, float* out, int64_t n) {
  for_lanes(
      n, [=](int64_t i, auto lanes) { store(out + i, exponential(load(x + i, lanes)), lanes); });
}

void swiglu(const float* gate, const float* up, float* out, int64_t n) {
  for_lanes(n, [=](int64_t i, auto lanes) {
    const Vec g = load(gate + i, lanes);
    const Vec below = add(broadcast(1.0F), exponential(negate(g)));
    store(out + i, mul(div(g, below), load(up + i, lanes)), lanes);
  });
}

// A NaN in x may be lost here; the exponential of (x - maximum) brings it back.
float maximum_of(const float* x, int64_t n) {
  Vec highest = broadcast(x[0]);
  for_lanes(n, [&](int64_t i, auto lanes) {
    highest = maximum(load_or(x + i, lanes, highest), highest);
  });
  return highest_lane(highest);
}

void softmax(float* x, int64_t n) {
  const Vec highest = broadcast(maximum_of(x, n));
  Wide sum = wide_zero();
  for_lanes(n, [&](int64_t i, auto lanes) {
    const Vec e = exponential(sub(load_or(x + i, lanes, broadcast(-kInfinity)), highest));
    store(x + i, e, lanes);
    sum = wide_add(sum, e);
  });
  const Vec inverse = broadcast(static_cast<float>(1.0 / wide_sum(sum)));
  for_lanes(
      n, [=](int64_t i, auto lanes) { store(x + i, mul(load(x + i, lanes), inverse), lanes); });
}

double log_sum_exp(const float* x, int64_t n) {
  const float highest = maximum_of(x, n);
  Wide sum = wide_zero();
  for_lanes(n, [&](int64_t i, auto lanes) {
    const Vec shifted = sub(load_or(x + i, lanes, broadcast(-kInfinity)), broadcast(highest));
    sum = wide_add(sum, exponential(shifted));
  });
  return __builtin_log(wide_sum(sum)) + static_cast<double>(highest);
}

void dequantize_group(const uint8_t* codes, float scale, float zero, float* out, int64_t n) {
  const Vec factor = broadcast(scale);
  const Vec offset = broadcast(zero);
  for_lanes(n, [=](int64_t i, auto lanes) {
    store(out + i, mul(factor, sub(load_u8(codes + i, lanes), offset)), lanes);
  });
}

}  // namespace
}  // namespace quern
