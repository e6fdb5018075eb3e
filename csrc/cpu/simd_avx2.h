// The vector layer for AVX2 with FMA and F16C; see sweeps.cpp for what a layer provides.

#pragma once

#include <immintrin.h>

#include "elements.h"

#define FASTGRPO_ISA avx2

namespace fastgrpo {
namespace {

struct Simd {
  using Vec = __m256;
  static constexpr int kWidth = 8, kRegisters = 16;

  static Vec set(float x) { return _mm256_set1_ps(x); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static Vec low_bits_to_exponent(Vec x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23)); }

  static float max_lane(Vec x) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_shuffle_ps(m, m, 1)));
  }
  static double sum_lanes(const Vec (&x)[4]) {
    __m256d sum = _mm256_setzero_pd();
    for (const Vec& v : x) {
      const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
      sum = _mm256_add_pd(sum, _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))));
    }
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(sum), _mm256_extractf128_pd(sum, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }

  static void load2(const float* p, Vec& a, Vec& b) {
    a = _mm256_loadu_ps(p);
    b = _mm256_loadu_ps(p + 8);
  }
  static void store2(float* p, Vec a, Vec b) {
    _mm256_storeu_ps(p, a);
    _mm256_storeu_ps(p + 8, b);
  }

  // Even elements in a, odd ones in b: one instruction each, and one to put them back.
  static void load2(const BFloat16* p, Vec& a, Vec& b) {
    const __m256i u = _mm256_loadu_si256((const __m256i*)p);
    a = _mm256_castsi256_ps(_mm256_slli_epi32(u, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32((int)0xffff0000)));
  }
  static void store2(BFloat16* p, Vec a, Vec b) {
    const __m256i even = _mm256_srli_epi32(round_up_bits(a), 16);
    _mm256_storeu_si256((__m256i*)p, _mm256_blend_epi16(even, round_up_bits(b), 0xaa));
  }

  template <class T>
  static void load2_in_order(const T* p, Vec& a, Vec& b) {
    load2(p, a, b);
  }
  static void load2_in_order(const BFloat16* p, Vec& a, Vec& b) {
    const __m128i low = _mm_loadu_si128((const __m128i*)p), high = _mm_loadu_si128((const __m128i*)(p + 8));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(low), 16));
    b = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(high), 16));
  }
  static uint32_t not_below(Vec a, Vec b) { return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)); }

  // a first, then b, as fp32 comes from memory.
  static void store2_in_order(BFloat16* p, Vec a, Vec b) {
    const __m256i low = _mm256_srli_epi32(round_up_bits(a), 16), high = _mm256_srli_epi32(round_up_bits(b), 16);
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8));
  }

  static void load2(const Float16* p, Vec& a, Vec& b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    b = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
  }
  static void store2(Float16* p, Vec a, Vec b) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(b, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store2_in_order(Float16* p, Vec a, Vec b) { store2(p, a, b); }

 private:
  // Adds what makes the upper 16 bits the value rounded to nearest even: 0x7fff, and 1 more if they are odd.
  static __m256i round_up_bits(Vec x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
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
