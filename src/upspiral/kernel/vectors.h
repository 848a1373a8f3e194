// Sixteen numbers at a time, in float32, from and to memory in bfloat16 or float32.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int LANES = 16;

struct Bfloat16 {
  using Element = uint16_t;
  static constexpr int PACK = 2;  // neighbours in the summed dimension that one operation takes

  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
  static __m512 load(const Element* from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
  }
  // Elements of two rows, neighbours in turn.
  static __m512i interleaved(const Element* first, const Element* second) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)first));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)second));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
  }
  static void store(Element* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }
  static void store_pair(Element* to, __m512 first, __m512 second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
};

struct Float32 {
  using Element = float;
  static constexpr int PACK = 1;

  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  static __m512 load(const Element* from) { return _mm512_loadu_ps(from); }
  static __m512i interleaved(const Element* first, const Element*) { return _mm512_loadu_si512(first); }
  static void store(Element* to, __m512 x) { _mm512_storeu_ps(to, x); }
};

// e^x for x <= 0 to about one unit in the last place; exactly 1 at 0.
inline __m512 exp_of(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-103.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// Rows to columns, of 16 by 16 words of 32 bits.
inline void transpose(__m512i (&rows)[LANES]) {
  __m512i pairs[LANES], quads[LANES];
  for (int i = 0; i < LANES; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4)
    for (int j = 0; j < 2; ++j) {
      quads[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
      quads[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    const __m512i low = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0x88), high = _mm512_shuffle_i32x4(quads[i], quads[i + 4], 0xdd);
    const __m512i later_low = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0x88), later_high = _mm512_shuffle_i32x4(quads[i + 8], quads[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_i32x4(low, later_low, 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(low, later_low, 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(high, later_high, 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(high, later_high, 0xdd);
  }
}

// 1 / (1 + e^-x)
inline __m512 sigmoid_of(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 small = exp_of(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
  const __m512 above = _mm512_div_ps(one, _mm512_add_ps(one, small));
  return _mm512_mask_mul_ps(above, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), small, above);
}

}  // namespace
