// The vector layer for AVX-512 F/BW/DQ/VL; see sweeps.cpp for what a layer provides.

#pragma once

#include <immintrin.h>

#include "elements.h"

#define FASTGRPO_ISA avx512
#define FASTGRPO_TRANSPOSE
#define FASTGRPO_STREAM
#ifdef __AVX512BF16__
#define FASTGRPO_PAIRS
#endif
#ifdef __AMX_BF16__
#define FASTGRPO_AMX
#endif

namespace fastgrpo {
namespace {

struct Simd {
  using Vec = __m512;
  static constexpr int kWidth = 16, kRegisters = 32;

  static Vec set(float x) { return _mm512_set1_ps(x); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static Vec low_bits_to_exponent(Vec x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23)); }

#ifdef __AVX512BF16__
  static Vec dot(Vec a, Vec b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
#endif
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  // Past the caches: a and b, in order, to p on a cache line.
  static void stream2(float* p, Vec a, Vec b) {
    _mm512_stream_ps(p, a);
    _mm512_stream_ps(p + 16, b);
  }
  static void stream2(BFloat16* p, Vec a, Vec b) {
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_up_bits(a), 16));
    const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_up_bits(b), 16));
    _mm512_stream_si512((__m512i*)p, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
  static void stream2(Float16* p, Vec a, Vec b) {
    const __m256i low = _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i high = _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm512_stream_si512((__m512i*)p, _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }

  // 16 x 16 lanes: pairs of rows, then of pairs, then the quarters of 128 bits, twice.
  static void transpose(const float* x, int64_t stride, float* out, int64_t width) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(x + i * stride);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // a[i + j]: lane j of every quarter
      for (int j = 0; j < 2; ++j) {
        const __m512d p = _mm512_castps_pd(b[i + j]), q = _mm512_castps_pd(b[i + j + 2]);
        a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, q));
        a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
      }
    }
    for (int j = 0; j < 4; ++j) {
      b[j] = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88);
      b[j + 4] = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
      b[j + 8] = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88);
      b[j + 12] = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
    }
    for (int j = 0; j < 4; ++j) {
      _mm512_storeu_ps(out + j * width, _mm512_shuffle_f32x4(b[j], b[j + 8], 0x88));
      _mm512_storeu_ps(out + (j + 4) * width, _mm512_shuffle_f32x4(b[j + 4], b[j + 12], 0x88));
      _mm512_storeu_ps(out + (j + 8) * width, _mm512_shuffle_f32x4(b[j], b[j + 8], 0xdd));
      _mm512_storeu_ps(out + (j + 12) * width, _mm512_shuffle_f32x4(b[j + 4], b[j + 12], 0xdd));
    }
  }

  static float max_lane(Vec x) { return _mm512_reduce_max_ps(x); }
  static double sum_lanes(const Vec (&x)[4]) {
    __m512d sum = _mm512_setzero_pd();
    for (const Vec& v : x) {
      const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
      sum = _mm512_add_pd(sum, _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
    }
    return _mm512_reduce_add_pd(sum);
  }

  static void load2(const float* p, Vec& a, Vec& b) {
    a = _mm512_loadu_ps(p);
    b = _mm512_loadu_ps(p + 16);
  }
  static void store2(float* p, Vec a, Vec b) {
    _mm512_storeu_ps(p, a);
    _mm512_storeu_ps(p + 16, b);
  }

  // Even elements in a, odd ones in b: one instruction each, and one to put them back.
  static void load2(const BFloat16* p, Vec& a, Vec& b) {
    const __m512i u = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(u, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32((int)0xffff0000)));
  }
  static void store2(BFloat16* p, Vec a, Vec b) {
    const __m512i even = _mm512_srli_epi32(round_up_bits(a), 16);
    _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, even, round_up_bits(b)));
  }

  template <class T>
  static void load2_in_order(const T* p, Vec& a, Vec& b) {
    load2(p, a, b);
  }
  static void load2_in_order(const BFloat16* p, Vec& a, Vec& b) {
    const __m256i low = _mm256_loadu_si256((const __m256i*)p), high = _mm256_loadu_si256((const __m256i*)(p + 16));
    a = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(low), 16));
    b = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
  static uint32_t not_below(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }

  // a first, then b, as fp32 comes from memory.
  static void store2_in_order(BFloat16* p, Vec a, Vec b) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_up_bits(a), 16)));
    _mm256_storeu_si256((__m256i*)(p + 16), _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_up_bits(b), 16)));
  }

  static void load2(const Float16* p, Vec& a, Vec& b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
    b = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + 16)));
  }
  static void store2(Float16* p, Vec a, Vec b) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm256_storeu_si256((__m256i*)(p + 16), _mm512_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store2_in_order(Float16* p, Vec a, Vec b) { store2(p, a, b); }

 private:
  // Adds what makes the upper 16 bits the value rounded to nearest even: 0x7fff, and 1 more if they are odd.
  static __m512i round_up_bits(Vec x) {
    const __m512i u = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
    const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
    const __m512i rounded = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(rounded, odd, rounded, one);
  }
};

// Keeps results too small for a normal number from trapping into microcode, which costs 100 cycles each.
class FlushSubnormals {
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8000); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};

}  // namespace
}  // namespace fastgrpo
