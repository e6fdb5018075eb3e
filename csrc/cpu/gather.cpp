// Products of single rows, and the search for the columns that count, compiled once per instruction set on top of the
// vector layer in FASTGRPO_SIMD. As in sweeps.cpp, every function is in an unnamed namespace.

#include "gather.h"

#include <math.h>

// See sweeps.cpp; load2_in_order is load2 with the first elements in a, and not_below(a, b) the bits of !(a < b).
#include FASTGRPO_SIMD

namespace fastgrpo {
namespace {

using Vec = Simd::Vec;

constexpr int kTwo = 2 * Simd::kWidth;

template <class T>
float dot(const void* left, const void* right, int64_t n) {
  const T *a = (const T*)left, *b = (const T*)right;
  Vec sum[4];
  for (Vec& s : sum) s = Simd::set(0.0f);
  int64_t i = 0;
  for (int k = 0; i + kTwo <= n; i += kTwo, k ^= 2) {
    Vec p, q, r, s;
    Simd::load2(a + i, p, q);
    Simd::load2(b + i, r, s);
    sum[k] = Simd::fma(p, r, sum[k]);
    sum[k + 1] = Simd::fma(q, s, sum[k + 1]);
  }
  double total = Simd::sum_lanes(sum);
  for (; i < n; ++i) total += (double)to_float(a[i]) * to_float(b[i]);
  return (float)total;
}

template <class T>
void add_scaled(float* sum, const void* from, float factor, int64_t n) {
  const T* const x = (const T*)from;
  const Vec f = Simd::set(factor);
  int64_t i = 0;
  for (; i + kTwo <= n; i += kTwo) {
    Vec p, q, r, s;
    Simd::load2_in_order(x + i, p, q);
    Simd::load2(sum + i, r, s);
    Simd::store2(sum + i, Simd::fma(p, f, r), Simd::fma(q, f, s));
  }
  for (; i < n; ++i) sum[i] += to_float(x[i]) * factor;
}

// Stores elements in order.
template <class T>
void store2(T* p, Vec a, Vec b) {
  if constexpr (sizeof(T) == sizeof(float)) {
    Simd::store2(p, a, b);
  } else {
    Simd::store2_in_order(p, a, b);
  }
}

template <class T>
void put(const float* sum, void* to, int64_t n, bool add) {
  T* const out = (T*)to;
  int64_t i = 0;
  for (; i + kTwo <= n; i += kTwo) {
    Vec p, q;
    Simd::load2(sum + i, p, q);
    if (add) {
      Vec r, s;
      Simd::load2_in_order(out + i, r, s);
      p = Simd::add(r, p);
      q = Simd::add(s, q);
    }
    store2(out + i, p, q);
  }
  for (; i < n; ++i) from_float(add ? to_float(out[i]) + sum[i] : sum[i], out + i);
}

template <class T>
void widen(const void* from, float* out, int64_t n) {
  const T* const x = (const T*)from;
  int64_t i = 0;
  for (; i + kTwo <= n; i += kTwo) {
    Vec p, q;
    Simd::load2_in_order(x + i, p, q);
    Simd::store2(out + i, p, q);
  }
  for (; i < n; ++i) out[i] = to_float(x[i]);
}

float magnitude_of(float x) { return x < 0 ? -x : x; }
Vec magnitude_of(Vec x) { return Simd::max(x, Simd::sub(Simd::set(0.0f), x)); }

// Calls f(begin, bits) for every vector of x, whose bits say which elements are not below `least`.
template <class T, class F>
void each_bits(const T* x, int64_t n, bool magnitude, float least, F f) {
  const Vec limit = Simd::set(least);
  int64_t i = 0;
  for (; i + kTwo <= n; i += kTwo) {
    Vec p, q;
    Simd::load2_in_order(x + i, p, q);
    if (magnitude) {
      p = magnitude_of(p);
      q = magnitude_of(q);
    }
    f(i, Simd::not_below(p, limit));
    f(i + Simd::kWidth, Simd::not_below(q, limit));
  }
  for (; i < n; ++i) {
    const float a = to_float(x[i]);
    f(i, (uint32_t)!((magnitude ? magnitude_of(a) : a) < least));
  }
}

template <class T>
int64_t count(const void* x, int64_t n, bool magnitude, float least) {
  int64_t total = 0;
  each_bits((const T*)x, n, magnitude, least, [&](int64_t, uint32_t bits) {
    if (bits == 0) return;
    bits -= bits >> 1 & 0x5555u;  // pairs, fours, eights, all of at most 16
    bits = (bits & 0x3333u) + (bits >> 2 & 0x3333u);
    bits = (bits + (bits >> 4)) & 0x0f0fu;
    total += (bits + (bits >> 8)) & 0x1fu;
  });
  return total;
}

template <class T>
int64_t find(const void* x, int64_t n, bool magnitude, float least, int32_t* found) {
  int64_t total = 0;
  each_bits((const T*)x, n, magnitude, least, [&](int64_t begin, uint32_t bits) {
    for (int32_t at = (int32_t)begin; bits != 0; ++at, bits >>= 1) {
      found[total] = at;
      total += bits & 1;
    }
  });
  return total;
}

double magnitudes(const float* x, int64_t n) {
  double total = 0;
  int64_t i = 0;
  while (i + 2 * kTwo <= n) {
    Vec sum[4];
    for (Vec& s : sum) s = Simd::set(0.0f);
    for (int64_t end = i + 64 * kTwo; i < end && i + 2 * kTwo <= n; i += 2 * kTwo) {
      for (int k = 0; k < 4; k += 2) {
        Vec p, q;
        Simd::load2(x + i + k * Simd::kWidth, p, q);
        sum[k] = Simd::add(sum[k], magnitude_of(p));
        sum[k + 1] = Simd::add(sum[k + 1], magnitude_of(q));
      }
    }
    total += Simd::sum_lanes(sum);
  }
  for (; i < n; ++i) total += magnitude_of(x[i]);
  return total;
}

}  // namespace

namespace FASTGRPO_ISA {

extern const Gather kGather = {
    {dot<float>, dot<BFloat16>, dot<Float16>},
    {add_scaled<float>, add_scaled<BFloat16>, add_scaled<Float16>},
    {put<float>, put<BFloat16>, put<Float16>},
    {widen<float>, widen<BFloat16>, widen<Float16>},
    {count<float>, count<BFloat16>, count<Float16>},
    {find<float>, find<BFloat16>, find<Float16>},
    magnitudes,
};

}  // namespace FASTGRPO_ISA
}  // namespace fastgrpo
