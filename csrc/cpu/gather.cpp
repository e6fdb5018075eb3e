// Products of single rows, and the search for the columns that count, compiled once per instruction set on top of the
// vector layer in FASTGRPO_SIMD. As in sweeps.cpp, every function is in an unnamed namespace.

#include "gather.h"

#include <math.h>

// See sweeps.cpp; load2_in_order is load2 with the first elements in a, and at_least(a, b) the bits of a >= b.
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

float magnitude_of(float x) { return x < 0 ? -x : x; }

template <class T>
int64_t at_least(const void* from, int64_t n, bool magnitude, float least, float many, int32_t* found,
                 int64_t* above) {
  const T* const x = (const T*)from;
  const Vec limit = Simd::set(least), higher = Simd::set(many), zero = Simd::set(0.0f);
  int64_t count = 0, i = 0;
  *above = 0;
  for (; i + kTwo <= n; i += kTwo) {
    Vec v[2];
    Simd::load2_in_order(x + i, v[0], v[1]);
    for (int k = 0; k < 2; ++k) {
      const Vec a = magnitude ? Simd::max(v[k], Simd::sub(zero, v[k])) : v[k];
      uint32_t bits = Simd::at_least(a, limit);
      if (bits == 0) continue;
      for (uint32_t high = Simd::at_least(a, higher); high != 0; high &= high - 1) ++*above;
      for (int j = 0; bits != 0; ++j, bits >>= 1) {
        found[count] = (int32_t)(i + k * Simd::kWidth + j);
        count += bits & 1;
      }
    }
  }
  for (; i < n; ++i) {
    const float a = magnitude ? magnitude_of(to_float(x[i])) : to_float(x[i]);
    if (!(a >= least)) continue;
    *above += a >= many;
    found[count++] = (int32_t)i;
  }
  return count;
}

double magnitudes(const float* x, int64_t n) {
  const Vec zero = Simd::set(0.0f);
  double total = 0;
  int64_t i = 0;
  while (i + 2 * kTwo <= n) {
    Vec sum[4];
    for (Vec& s : sum) s = zero;
    for (int64_t end = i + 64 * kTwo; i < end && i + 2 * kTwo <= n; i += 2 * kTwo) {
      for (int k = 0; k < 4; k += 2) {
        Vec p, q;
        Simd::load2(x + i + k * Simd::kWidth, p, q);
        sum[k] = Simd::add(sum[k], Simd::max(p, Simd::sub(zero, p)));
        sum[k + 1] = Simd::add(sum[k + 1], Simd::max(q, Simd::sub(zero, q)));
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
    {at_least<float>, at_least<BFloat16>, at_least<Float16>},
    magnitudes,
};

}  // namespace FASTGRPO_ISA
}  // namespace fastgrpo
