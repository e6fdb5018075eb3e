// The vector layer for 64-bit Arm; see sweeps.cpp for what a layer provides.

#pragma once

#include <arm_neon.h>

#include "elements.h"

#define FASTGRPO_ISA neon
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define FASTGRPO_PAIRS
#endif

namespace fastgrpo {
namespace {

struct Simd {
  using Vec = float32x4_t;
  static constexpr int kWidth = 4, kRegisters = 32;

  static Vec set(float x) { return vdupq_n_f32(x); }
  static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
  static Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
  static Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
  static Vec max(Vec a, Vec b) { return vmaxq_f32(a, b); }
  static Vec low_bits_to_exponent(Vec x) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(x), 23)); }

#ifdef FASTGRPO_PAIRS
  static Vec dot(Vec a, Vec b, Vec c) { return vbfdotq_f32(c, (bfloat16x8_t)a, (bfloat16x8_t)b); }
#endif

  static float max_lane(Vec x) { return vmaxvq_f32(x); }
  static double sum_lanes(const Vec (&x)[4]) {
    float64x2_t sum = vdupq_n_f64(0.0);
    for (const Vec& v : x) sum = vaddq_f64(sum, vaddq_f64(vcvt_f64_f32(vget_low_f32(v)), vcvt_high_f64_f32(v)));
    return vaddvq_f64(sum);
  }

  static void load2(const float* p, Vec& a, Vec& b) {
    a = vld1q_f32(p);
    b = vld1q_f32(p + 4);
  }
  static void store2(float* p, Vec a, Vec b) {
    vst1q_f32(p, a);
    vst1q_f32(p + 4, b);
  }

  // Even elements in a, odd ones in b: one instruction each, and one to put them back.
  static void load2(const BFloat16* p, Vec& a, Vec& b) {
    const uint32x4_t u = vreinterpretq_u32_u16(vld1q_u16((const uint16_t*)p));
    a = vreinterpretq_f32_u32(vshlq_n_u32(u, 16));
    b = vreinterpretq_f32_u32(vandq_u32(u, vdupq_n_u32(0xffff0000)));
  }
  static void store2(BFloat16* p, Vec a, Vec b) {
    const uint32x4_t u = vsriq_n_u32(round_up_bits(b), round_up_bits(a), 16);
    vst1q_u16((uint16_t*)p, vreinterpretq_u16_u32(u));
  }

  template <class T>
  static void load2_in_order(const T* p, Vec& a, Vec& b) {
    load2(p, a, b);
  }
  static void load2_in_order(const BFloat16* p, Vec& a, Vec& b) {
    const uint16x8_t u = vld1q_u16((const uint16_t*)p);
    a = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(u), 16));
    b = vreinterpretq_f32_u32(vshll_high_n_u16(u, 16));
  }
  static uint32_t not_below(Vec a, Vec b) {
    const uint32x4_t bits = {1, 2, 4, 8};
    return vaddvq_u32(vbicq_u32(bits, vcltq_f32(a, b)));
  }

  // a first, then b, as fp32 comes from memory.
  static void store2_in_order(BFloat16* p, Vec a, Vec b) {
    vst1q_u16((uint16_t*)p, vshrn_high_n_u32(vshrn_n_u32(round_up_bits(a), 16), round_up_bits(b), 16));
  }

  static void load2(const Float16* p, Vec& a, Vec& b) {
    const float16x8_t u = vreinterpretq_f16_u16(vld1q_u16((const uint16_t*)p));
    a = vcvt_f32_f16(vget_low_f16(u));
    b = vcvt_high_f32_f16(u);
  }
  static void store2(Float16* p, Vec a, Vec b) {
    vst1q_u16((uint16_t*)p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(a), b)));
  }
  static void store2_in_order(Float16* p, Vec a, Vec b) { store2(p, a, b); }

 private:
  // Adds what makes the upper 16 bits the value rounded to nearest even: 0x7fff, and 1 more if they are odd.
  static uint32x4_t round_up_bits(Vec x) {
    const uint32x4_t u = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    return vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
  }
};

// Subnormal results cost nothing here.
class FlushSubnormals {
 public:
  FlushSubnormals() {}
};

}  // namespace
}  // namespace fastgrpo
