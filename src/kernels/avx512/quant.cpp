// SPDX-License-Identifier: Apache-2.0
#include "kernels/kernel_ops.h"

// GCC 12 takes the undefined pass-through operands of its own intrinsics for a mistake of ours
// (gcc.gnu.org bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace quern {
namespace {

struct Vec {
  __m512 x;

  static Vec load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Vec set1(float value) { return {_mm512_set1_ps(value)}; }
  static Vec zero() { return {_mm512_setzero_ps()}; }
  void store(float* to) const { _mm512_storeu_ps(to, x); }
  void store_codes(uint8_t* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x)));
  }
};

inline Vec operator+(Vec a, Vec b) {
  return {_mm512_add_ps(a.x, b.x)};
}
inline Vec operator-(Vec a, Vec b) {
  return {_mm512_sub_ps(a.x, b.x)};
}
inline Vec operator*(Vec a, Vec b) {
  return {_mm512_mul_ps(a.x, b.x)};
}
inline Vec operator/(Vec a, Vec b) {
  return {_mm512_div_ps(a.x, b.x)};
}
inline Vec min(Vec a, Vec b) {
  return {_mm512_min_ps(a.x, b.x)};
}
inline Vec max(Vec a, Vec b) {
  return {_mm512_max_ps(a.x, b.x)};
}
inline Vec abs(Vec a) {
  return {_mm512_abs_ps(a.x)};
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.x, b.x, c.x)};
}
inline Vec fnma(Vec a, Vec b, Vec c) {
  return {_mm512_fnmadd_ps(a.x, b.x, c.x)};
}
inline Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

inline Vec above(Vec x, Vec bound, Vec value) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.x, bound.x, _CMP_GT_OQ), value.x)};
}
inline __m256 halves_added(Vec a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a.x), _mm512_extractf32x8_ps(a.x, 1));
}
inline void store_sums(Vec x, Vec y, Vec z, Vec u, float* to) {
  const __m256 xy = _mm256_hadd_ps(halves_added(x), halves_added(y));
  const __m256 zu = _mm256_hadd_ps(halves_added(z), halves_added(u));
  const __m256 halves = _mm256_hadd_ps(xy, zu);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

// x^0.4 for x >= 0: x = 2^e m with m in [1, 2); a first guess from the bits, then Newton steps on
// y^5 = x^2, each squaring the relative error (times 2).
inline Vec power04(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.x);
  // 0.4 of the bit pattern, with the bias of the exponent put back: within 4.5 % of x^0.4.
  const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(bits), _mm512_set1_ps(0.4F));
  const __m512i guess = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), _mm512_set1_epi32(0x26168c59));
  Vec y = {_mm512_castsi512_ps(guess)};
  const Vec square = x * x;
  for (int step = 0; step < 2; ++step) {
    const Vec y2 = y * y;
    y = fma(Vec::set1(0.8F), y, Vec::set1(0.2F) * (square / (y2 * y2)));
  }
  return y;
}

#include "kernels/quant_body.inl"

}  // namespace

void install_avx512_quant(KernelOps& ops) {
  install_quant(ops);
}

}  // namespace quern
