// The vector layer in plain C++, for any CPU; see sweeps.cpp for what a layer provides.
//
// Without a fused multiply-add, products are formed in double: the range reduction of the exponential needs them
// exact.

#pragma once

#include "elements.h"

#define FASTGRPO_ISA portable

namespace fastgrpo {
namespace {

struct Simd {
  static constexpr int kWidth = 8, kRegisters = 16;
  struct Vec {
    float lane[kWidth];
  };

  template <class F>
  static Vec each(F f) {
    Vec r;
    for (int i = 0; i < kWidth; ++i) r.lane[i] = f(i);
    return r;
  }

  static Vec set(float x) {
    return each([&](int) { return x; });
  }
  static Vec add(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Vec sub(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static Vec mul(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Vec div(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static Vec fma(const Vec& a, const Vec& b, const Vec& c) {
    return each([&](int i) { return (float)((double)a.lane[i] * b.lane[i] + c.lane[i]); });
  }
  static Vec max(const Vec& a, const Vec& b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Vec low_bits_to_exponent(const Vec& x) {
    return each([&](int i) { return float_of(bits_of(x.lane[i]) << 23); });
  }

  static float max_lane(const Vec& x) {
    float m = x.lane[0];
    for (float lane : x.lane) m = lane > m ? lane : m;
    return m;
  }
  static double sum_lanes(const Vec (&x)[4]) {
    double sum = 0;
    for (const Vec& v : x) {
      for (float lane : v.lane) sum += lane;
    }
    return sum;
  }

  template <class T>
  static void load2(const T* p, Vec& a, Vec& b) {
    a = each([&](int i) { return to_float(p[i]); });
    b = each([&](int i) { return to_float(p[kWidth + i]); });
  }
  template <class T>
  static void store2(T* p, const Vec& a, const Vec& b) {
    for (int i = 0; i < kWidth; ++i) from_float(a.lane[i], p + i);
    for (int i = 0; i < kWidth; ++i) from_float(b.lane[i], p + kWidth + i);
  }
  template <class T>
  static void load2_in_order(const T* p, Vec& a, Vec& b) {
    load2(p, a, b);
  }
  static uint32_t not_below(const Vec& a, const Vec& b) {
    uint32_t bits = 0;
    for (int i = 0; i < kWidth; ++i) bits |= (uint32_t)!(a.lane[i] < b.lane[i]) << i;
    return bits;
  }
  template <class T>
  static void store2_in_order(T* p, const Vec& a, const Vec& b) {
    store2(p, a, b);
  }
};

class FlushSubnormals {
 public:
  FlushSubnormals() {}
};

}  // namespace
}  // namespace fastgrpo
