// SPDX-License-Identifier: Apache-2.0
#include "kernels/kernel_ops.h"

#include <immintrin.h>

namespace quern {
namespace {

struct Vec {
  __m256 a;
  __m256 b;

  static Vec load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static Vec set1(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  void store(float* to) const {
    _mm256_storeu_ps(to, a);
    _mm256_storeu_ps(to + 8, b);
  }
  void store_codes(uint8_t* to) const {
    const __m256i words = _mm256_packus_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
    // The pack works per 128-bit half: quarters 0 2 1 3 are the order of the rows.
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(to),
        _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
  }
};

inline Vec operator+(Vec x, Vec y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
inline Vec operator-(Vec x, Vec y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
inline Vec operator*(Vec x, Vec y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
inline Vec operator/(Vec x, Vec y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
inline Vec min(Vec x, Vec y) {
  return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
inline Vec max(Vec x, Vec y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
inline Vec abs(Vec x) {
  const __m256 sign = _mm256_set1_ps(-0.0F);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline Vec fma(Vec x, Vec y, Vec z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Vec fnma(Vec x, Vec y, Vec z) {
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
inline Vec round(Vec x) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, kNearest), _mm256_round_ps(x.b, kNearest)};
}

inline __m256 above(__m256 x, __m256 bound, __m256 value) {
  return _mm256_and_ps(_mm256_cmp_ps(x, bound, _CMP_GT_OQ), value);
}
inline Vec above(Vec x, Vec bound, Vec value) {
  return {above(x.a, bound.a, value.a), above(x.b, bound.b, value.b)};
}
inline void store_sums(Vec x, Vec y, Vec z, Vec u, float* to) {
  const __m256 xy = _mm256_hadd_ps(_mm256_add_ps(x.a, x.b), _mm256_add_ps(y.a, y.b));
  const __m256 zu = _mm256_hadd_ps(_mm256_add_ps(z.a, z.b), _mm256_add_ps(u.a, u.b));
  const __m256 halves = _mm256_hadd_ps(xy, zu);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

// 0.4 of the bit pattern, with the bias of the exponent put back: within 4.5 % of x^0.4.
inline __m256 guess04(__m256 x) {
  const __m256 scaled =
      _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_castps_si256(x)), _mm256_set1_ps(0.4F));
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_cvtps_epi32(scaled), _mm256_set1_epi32(0x26168c59)));
}

// x^0.4 for x >= 0: a first guess from the bits, then Newton steps on y^5 = x^2, each squaring the
// relative error (times 2).
inline Vec power04(Vec x) {
  Vec y = {guess04(x.a), guess04(x.b)};
  const Vec square = x * x;
  for (int step = 0; step < 2; ++step) {
    const Vec y2 = y * y;
    y = fma(Vec::set1(0.8F), y, Vec::set1(0.2F) * (square / (y2 * y2)));
  }
  return y;
}

#include "kernels/quant_body.inl"

}  // namespace

void install_avx2_quant(KernelOps& ops) {
  install_quant(ops);
}

}  // namespace quern
