// SPDX-License-Identifier: Apache-2.0
// AVX-512 F, BW, VL and DQ. Loads and stores of a part are masked: no memory beyond it is touched.
#include "kernels/kernel_ops.h"

// g++ 12 takes the deliberately undefined registers of its own intrinsics for mistakes (GCC bug
// 105593). Clang does not, nor does it know the second warning.
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

namespace quern {
namespace {

constexpr int64_t kLanes = 16;

struct Vec {
  __m512 v;
};

struct Wide {
  __m512d low;
  __m512d high;
};

struct All {};

struct First {
  __mmask16 mask;
  explicit First(int64_t count) : mask(static_cast<__mmask16>((1U << count) - 1U)) {}
};

inline Vec broadcast(float value) {
  return {_mm512_set1_ps(value)};
}

inline Vec load(const float* p, All /*lanes*/) {
  return {_mm512_loadu_ps(p)};
}

inline Vec load(const float* p, First lanes) {
  return {_mm512_maskz_loadu_ps(lanes.mask, p)};
}

inline Vec load_or(const float* p, All lanes, Vec /*other*/) {
  return load(p, lanes);
}

inline Vec load_or(const float* p, First lanes, Vec other) {
  return {_mm512_mask_loadu_ps(other.v, lanes.mask, p)};
}

inline __m256i load_16bit(const uint16_t* p, All /*lanes*/) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

inline __m256i load_16bit(const uint16_t* p, First lanes) {
  return _mm256_maskz_loadu_epi16(lanes.mask, p);
}

template <class Lanes>
inline Vec load(const uint16_t* p, Lanes lanes) {
  const __m512i wide = _mm512_cvtepu16_epi32(load_16bit(p, lanes));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

template <class Lanes>
inline Vec load_f16(const uint16_t* p, Lanes lanes) {
  return {_mm512_cvtph_ps(load_16bit(p, lanes))};
}

inline Vec load_u8(const uint8_t* p, All /*lanes*/) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}

inline Vec load_u8(const uint8_t* p, First lanes) {
  const __m128i bytes = _mm_maskz_loadu_epi8(lanes.mask, p);
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))};
}

inline void store(float* p, Vec x, All /*lanes*/) {
  _mm512_storeu_ps(p, x.v);
}

inline void store(float* p, Vec x, First lanes) {
  _mm512_mask_storeu_ps(p, lanes.mask, x.v);
}

inline Vec add(Vec a, Vec b) {
  return {_mm512_add_ps(a.v, b.v)};
}

inline Vec sub(Vec a, Vec b) {
  return {_mm512_sub_ps(a.v, b.v)};
}

inline Vec mul(Vec a, Vec b) {
  return {_mm512_mul_ps(a.v, b.v)};
}

inline Vec div(Vec a, Vec b) {
  return {_mm512_div_ps(a.v, b.v)};
}

inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}

inline Vec negate(Vec a) {
  return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0F))};
}

inline Vec minimum(Vec a, Vec b) {
  return {_mm512_min_ps(a.v, b.v)};
}

inline Vec maximum(Vec a, Vec b) {
  return {_mm512_max_ps(a.v, b.v)};
}

inline Vec round_to_even(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

inline Vec scale_by_power(Vec a, Vec n) {
  return {_mm512_scalef_ps(a.v, n.v)};
}

inline float highest_lane(Vec a) {
  return _mm512_reduce_max_ps(a.v);
}

inline Wide wide_zero() {
  return {_mm512_setzero_pd(), _mm512_setzero_pd()};
}

inline Wide widen(Vec a) {
  return {
      _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)),
      _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))};
}

inline Wide wide_add(Wide a, Vec b) {
  const Wide w = widen(b);
  return {_mm512_add_pd(a.low, w.low), _mm512_add_pd(a.high, w.high)};
}

inline Wide wide_add_square(Wide a, Vec b) {
  const Wide w = widen(b);
  return {_mm512_fmadd_pd(w.low, w.low, a.low), _mm512_fmadd_pd(w.high, w.high, a.high)};
}

inline double wide_sum(Wide a) {
  return _mm512_reduce_add_pd(_mm512_add_pd(a.low, a.high));
}

}  // namespace
}  // namespace quern

#include "kernels/simd_body.inl"

namespace quern {
namespace {

// 32 codes of one width are `bits` words, so that every step of 32 reads the same layout. A quarter
// of the register takes the 8 codes of `bits` bytes: first whole words that hold them, then for
// every code the two bytes that it lies in, then the shift to its bit.
void unpack_codes(const uint32_t* words, int bits, int64_t first, int64_t n, uint8_t* out) {
  const auto width = static_cast<int16_t>(bits);
  const __m512i words_of_quarter = _mm512_add_epi32(
      _mm512_srli_epi32(
          _mm512_mullo_epi32(
              _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
              _mm512_set1_epi32(bits)),
          2),
      _mm512_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3));
  // In 16-bit lanes: the quarter's first byte within those words, and the code's number in it.
  const __m512i quarter_byte = _mm512_and_si512(
      _mm512_mullo_epi16(
          _mm512_cvtepu8_epi16(
              _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303)),
          _mm512_set1_epi16(width)),
      _mm512_set1_epi16(3));
  const __m512i bit = _mm512_mullo_epi16(
      _mm512_broadcast_i32x4(_mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7)), _mm512_set1_epi16(width));
  const __m512i byte = _mm512_add_epi16(quarter_byte, _mm512_srli_epi16(bit, 3));
  const __m512i next = _mm512_add_epi16(byte, _mm512_set1_epi16(1));
  const __m512i bytes = _mm512_or_si512(byte, _mm512_slli_epi16(next, 8));
  const __m512i shift = _mm512_and_si512(bit, _mm512_set1_epi16(7));
  const __m512i mask = _mm512_set1_epi16(static_cast<int16_t>((1 << bits) - 1));

  const auto codes_at = [=](const uint8_t* in, __mmask8 present) {
    const __m512i block = _mm512_zextsi256_si512(_mm256_maskz_loadu_epi32(present, in));
    const __m512i quarters = _mm512_permutexvar_epi32(words_of_quarter, block);
    const __m512i pairs = _mm512_shuffle_epi8(quarters, bytes);
    return _mm512_cvtepi16_epi8(_mm512_and_si512(_mm512_srlv_epi16(pairs, shift), mask));
  };
  const auto* in = reinterpret_cast<const uint8_t*>(words + first / 32 * bits);
  const auto all = static_cast<__mmask8>((1U << bits) - 1U);
  const int64_t step = 4 * static_cast<int64_t>(bits);
  for (; n >= 32; n -= 32, in += step, out += 32) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), codes_at(in, all));
  }
  if (n > 0) {
    const auto present = static_cast<__mmask8>((1U << ((n * bits + 31) / 32)) - 1U);
    _mm256_mask_storeu_epi8(out, (1U << n) - 1U, codes_at(in, present));
  }
}

}  // namespace

void install_avx512(KernelOps& ops) {
#define QUERN_OP(name, signature) ops.name = name;
#include "kernels/model_ops.def"
#undef QUERN_OP
  install_avx512_quant(ops);
}

}  // namespace quern
