// The 16-bit element types and their scalar conversions. Everything is static: a file compiled for one instruction set
// must not share an inline function with another, or the linker would keep either.

#pragma once

#include <stdint.h>
#include <string.h>

namespace fastgrpo {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

static inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

static inline float to_float(float x) { return x; }

static inline float to_float(BFloat16 x) { return float_of((uint32_t)x.bits << 16); }

static inline float to_float(Float16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // 2^112 moves the exponent's bias from 15 to 127, and turns a subnormal into a normal number.
  return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(239u << 23)));
}

// All three round to nearest even and keep NaN.
static inline void from_float(float x, float* out) { *out = x; }

static inline void from_float(float x, BFloat16* out) {
  const uint32_t u = bits_of(x);
  out->bits =
      (u & 0x7fffffff) > 0x7f800000 ? (uint16_t)(u >> 16 | 0x40) : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline void from_float(float x, Float16* out) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // 65520 and more: past the midpoint above the largest half
  } else if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = (uint16_t)(sign | half);
}

}  // namespace fastgrpo
