// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA and F16C. Parts of float vectors are loaded and stored under a mask, parts of
// narrower ones through a copy: no memory beyond them is touched.
#include "kernels/kernel_ops.h"

#include <immintrin.h>

namespace quern {
namespace {

constexpr int64_t kLanes = 8;

struct Vec {
  __m256 v;
};

struct Wide {
  __m256d low;
  __m256d high;
};

struct All {};

struct First {
  int64_t count;
  __m256i mask;
  explicit First(int64_t lanes)
      : count(lanes),
        mask(_mm256_cmpgt_epi32(
            _mm256_set1_epi32(static_cast<int>(lanes)),
            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))) {}
};

inline Vec broadcast(float value) {
  return {_mm256_set1_ps(value)};
}

inline Vec load(const float* p, All /*lanes*/) {
  return {_mm256_loadu_ps(p)};
}

inline Vec load(const float* p, First lanes) {
  return {_mm256_maskload_ps(p, lanes.mask)};
}

inline Vec load_or(const float* p, All lanes, Vec /*other*/) {
  return load(p, lanes);
}

inline Vec load_or(const float* p, First lanes, Vec other) {
  return {_mm256_blendv_ps(other.v, load(p, lanes).v, _mm256_castsi256_ps(lanes.mask))};
}

inline __m128i load_16bit(const uint16_t* p, All /*lanes*/) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

inline __m128i load_16bit(const uint16_t* p, First lanes) {
  uint16_t copy[8] = {};
  __builtin_memcpy(copy, p, static_cast<uint64_t>(lanes.count) * sizeof(uint16_t));
  return load_16bit(copy, All{});
}

template <class Lanes>
inline Vec load(const uint16_t* p, Lanes lanes) {
  const __m256i wide = _mm256_cvtepu16_epi32(load_16bit(p, lanes));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}

template <class Lanes>
inline Vec load_f16(const uint16_t* p, Lanes lanes) {
  return {_mm256_cvtph_ps(load_16bit(p, lanes))};
}

inline Vec load_u8(const uint8_t* p, All /*lanes*/) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))};
}

inline Vec load_u8(const uint8_t* p, First lanes) {
  uint8_t copy[8] = {};
  __builtin_memcpy(copy, p, static_cast<uint64_t>(lanes.count));
  return load_u8(copy, All{});
}

inline void store(float* p, Vec x, All /*lanes*/) {
  _mm256_storeu_ps(p, x.v);
}

inline void store(float* p, Vec x, First lanes) {
  _mm256_maskstore_ps(p, lanes.mask, x.v);
}

inline Vec add(Vec a, Vec b) {
  return {_mm256_add_ps(a.v, b.v)};
}

inline Vec sub(Vec a, Vec b) {
  return {_mm256_sub_ps(a.v, b.v)};
}

inline Vec mul(Vec a, Vec b) {
  return {_mm256_mul_ps(a.v, b.v)};
}

inline Vec div(Vec a, Vec b) {
  return {_mm256_div_ps(a.v, b.v)};
}

inline Vec fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}

inline Vec negate(Vec a) {
  return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0F))};
}

inline Vec minimum(Vec a, Vec b) {
  return {_mm256_min_ps(a.v, b.v)};
}

inline Vec maximum(Vec a, Vec b) {
  return {_mm256_max_ps(a.v, b.v)};
}

inline Vec round_to_even(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

inline __m256 power_of_two(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

// In two factors, because 2^n itself may lie beyond the exponents of normal numbers. For the
// a in [1/2, 2] and |n| <= 150 of the exponential the first product is exact.
inline Vec scale_by_power(Vec a, Vec n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256 scaled = _mm256_mul_ps(a.v, power_of_two(half));
  return {_mm256_mul_ps(scaled, power_of_two(_mm256_sub_epi32(whole, half)))};
}

inline float highest_lane(Vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

inline Wide wide_zero() {
  return {_mm256_setzero_pd(), _mm256_setzero_pd()};
}

inline Wide widen(Vec a) {
  return {
      _mm256_cvtps_pd(_mm256_castps256_ps128(a.v)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))};
}

inline Wide wide_add(Wide a, Vec b) {
  const Wide w = widen(b);
  return {_mm256_add_pd(a.low, w.low), _mm256_add_pd(a.high, w.high)};
}

inline Wide wide_add_square(Wide a, Vec b) {
  const Wide w = widen(b);
  return {_mm256_fmadd_pd(w.low, w.low, a.low), _mm256_fmadd_pd(w.high, w.high, a.high)};
}

inline double wide_sum(Wide a) {
  const __m256d four = _mm256_add_pd(a.low, a.high);
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

}  // namespace
}  // namespace quern

#include "kernels/simd_body.inl"

namespace quern {
namespace {

// The layout of 16 codes of one width, one per 16-bit lane: code c lies in the bytes c * bits / 8
// and the next, at bit s = c * bits % 8 of the pair. Shifting right by s is multiplying by 2^(7-s)
// and shifting by 7, since AVX2 has no shift of 16-bit lanes by varying amounts.
struct CodeLayout {
  __m256i bytes;
  __m256i factors;
  __m256i mask;
};

inline CodeLayout code_layout(int bits) {
  const __m256i indices = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m256i bit = _mm256_mullo_epi16(indices, _mm256_set1_epi16(static_cast<int16_t>(bits)));
  // The pair of the last 8-bit code begins at byte 15: its second byte is any byte, and is cut off
  // by the mask.
  const __m256i byte = _mm256_srli_epi16(bit, 3);
  const __m256i next = _mm256_add_epi16(byte, _mm256_set1_epi16(1));
  const __m256i powers =
      _mm256_broadcastsi128_si256(_mm_set_epi64x(0, 0x0102040810204080));  // byte s: 2^(7-s)
  const __m256i shift = _mm256_and_si256(bit, _mm256_set1_epi16(7));
  const __m256i zero_above = _mm256_set1_epi16(static_cast<int16_t>(-0x8000));
  return {
      _mm256_or_si256(byte, _mm256_slli_epi16(next, 8)),
      _mm256_shuffle_epi8(powers, _mm256_or_si256(shift, zero_above)),
      _mm256_set1_epi16(static_cast<int16_t>((1 << bits) - 1))};
}

// 16 codes in 16-bit lanes; reads 16 bytes.
inline __m256i sixteen_codes(const uint8_t* in, const CodeLayout& layout) {
  const __m256i both =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  const __m256i pairs = _mm256_shuffle_epi8(both, layout.bytes);
  const __m256i shifted = _mm256_srli_epi16(_mm256_mullo_epi16(pairs, layout.factors), 7);
  return _mm256_and_si256(shifted, layout.mask);
}

// 32 codes to 32 bytes; reads 16 + 2 * bits bytes, of which 4 * bits are its own.
inline void unpack_32(const uint8_t* in, int64_t bits, const CodeLayout& layout, uint8_t* out) {
  const __m256i low = sixteen_codes(in, layout);
  const __m256i high = sixteen_codes(in + 2 * bits, layout);
  // The pack works within halves of the register; the permutation puts the quarters in order.
  const __m256i codes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), codes);
}

void unpack_codes(const uint32_t* words, int bits, int64_t first, int64_t n, uint8_t* out) {
  const CodeLayout layout = code_layout(bits);
  const auto* in = reinterpret_cast<const uint8_t*>(words + first / 32 * bits);
  int64_t bytes = (n * bits + 31) / 32 * 4;
  const int64_t step = 4 * static_cast<int64_t>(bits);
  for (; n >= 32 && bytes >= 32; n -= 32, in += step, bytes -= step, out += 32) {
    unpack_32(in, bits, layout, out);
  }
  // The last codes through copies, so that nothing past the last word is read.
  for (; n > 0; n -= 32, in += step, bytes -= step, out += 32) {
    uint8_t padded[32] = {};
    uint8_t codes[32];
    __builtin_memcpy(padded, in, static_cast<uint64_t>(bytes < step ? bytes : step));
    unpack_32(padded, bits, layout, codes);
    __builtin_memcpy(out, codes, static_cast<uint64_t>(n < 32 ? n : 32));
  }
}

}  // namespace

void install_avx2(KernelOps& ops) {
#define QUERN_OP(name, signature) ops.name = name;
#include "kernels/model_ops.def"
#undef QUERN_OP
  install_avx2_quant(ops);
}

}  // namespace quern
