// What the kernels know of a row: sums that no order of threads changes, its score and its gradient.
//
// Exponents are in base 2, from the largest logit `top` of what is summed: t = (x - top) * c, c = log2(e) /
// temperature. Sums leave the target out, so that a target whose p is near 1 loses no digits.

#pragma once

#include <math.h>

#include "elements.h"

namespace fastgrpo {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLowestExponent = -1000.0f;  // 2^t is 0 long before; t * 0 stays a number

// ---- exponents

// t = (x - top) * c. Where top * c is not too large, one FMA from its rounded value `high` is as good:
// then t is `rest` too high, which whoever uses the sums takes out again.
struct Exponent {
  float c, top, high, rest;
  bool near;

  FASTGRPO_DEVICE Exponent(float largest, float scale) : c(scale), top(largest == -INFINITY ? 0.0f : largest) {
    high = top * c;
    near = fabsf(high) <= 2097152.0f;  // 2^21: |rest| <= 1/8
    rest = near ? fmaf(top, c, -high) : 0.0f;
  }

  template <bool kNear>
  FASTGRPO_DEVICE float of(float x) const {
    return kNear ? fmaf(x, c, -high) : (x - top) * c;
  }
};

// ---- statistics

// The sum over a block of numbers between -64 and 64, at most 2^14 of them, to 2^-38: in integers, which no order of
// adding changes. So a row's bits depend neither on its address nor on the number of threads in a warp that look at
// it.
struct Fixed {
  int high = 0, low = 0;  // multiples of 2^-16 and of 2^-38

  FASTGRPO_DEVICE void add(float x) {
    constexpr float kHigh = 192.0f, kLow = 1.5f / 32768.0f;  // 1.5 * 2^7, 1.5 * 2^-15: to whose last bit sums round
    const float h = x + kHigh, l = (x - (h - kHigh)) + kLow;
    high += (int)(as_bits(h) - as_bits(kHigh));
    low += (int)(as_bits(l) - as_bits(kLow));
  }
};

FASTGRPO_DEVICE float fixed_value(int64_t high, int64_t low) {
  return (float)(high * (1 << 22) + low) * (1.0f / (1ll << 38));
}

// What a thread has added up: one accumulator per position in a Vec, each of which takes its elements in their order.
template <class E, bool kEntropy>
struct ThreadSums {
  float sum[E::kCount] = {}, weighted[E::kCount] = {};

  template <bool kNear>
  FASTGRPO_DEVICE void add(const Vec& v, const Exponent& exponent) {
    float x[E::kCount];
    unpack<E>(v, x);
    FASTGRPO_UNROLL
    for (int k = 0; k < E::kCount; ++k) {
      const float t = exponent.of<kNear>(x[k]), e = fast_exp2(t);
      sum[k] += e;
      if (kEntropy) weighted[k] = fmaf(e, max_f32(t, kLowestExponent), weighted[k]);
    }
  }
};

// Sums of a part of a row: of 2^t, and of t * 2^t if the entropy is wanted.
struct Sums {
  float top, sum, weighted;
};

// A float as an integer of the same order; NaN with a clear sign is above infinity.
FASTGRPO_DEVICE int ordered(float x) {
  const int bits = (int)as_bits(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

FASTGRPO_DEVICE float from_ordered(int bits) { return as_float((uint32_t)(bits ^ ((bits >> 31) & 0x7fffffff))); }

constexpr int kWorkers = 256;  // threads of a block that sweep
constexpr int kWarps = kWorkers / 32;
constexpr int kWorkersBarrier = 1;

// Shared memory for what the warps of a block tell each other; kScratch bytes from `at`.
constexpr int kScratch = 32 + 16 * kWarps;

// The largest of a number per worker, in every worker.
FASTGRPO_DEVICE float block_max(float x, uint32_t at) {
  const int thread = thread_index();
  const int top = warp_max(ordered(x));
  if (thread % 32 == 0) shared_store(at + thread / 32 * 4, top);
  sync_threads(kWorkersBarrier, kWorkers);  // nobody reads before all have written
  const Vec a = shared_load<Vec>(at), b = shared_load<Vec>(at + 16);
  int all = (int)a.w[0];
  FASTGRPO_UNROLL
  for (int i = 1; i < kWarps; ++i) {
    const int other = (int)(i < 4 ? a.w[i & 3] : b.w[i & 3]);
    all = other > all ? other : all;
  }
  return from_ordered(all);
}

// Adds up the workers' sums; the result is of meaning in the first warp.
template <class E, bool kEntropy>
FASTGRPO_DEVICE Sums block_sums(const ThreadSums<E, kEntropy>& mine, float top, const Exponent& exponent,
                                uint32_t at) {
  Fixed sum, weighted;
  FASTGRPO_UNROLL
  for (int k = 0; k < E::kCount; ++k) {
    sum.add(mine.sum[k]);
    if (kEntropy) weighted.add(mine.weighted[k]);
  }
  Vec v = {{(uint32_t)warp_sum(sum.high), (uint32_t)warp_sum(sum.low), 0, 0}};
  if (kEntropy) v.w[2] = (uint32_t)warp_sum(weighted.high), v.w[3] = (uint32_t)warp_sum(weighted.low);
  const int thread = thread_index();
  if (thread % 32 == 0) shared_store(at + 32 + thread / 32 * 16, v);
  sync_threads(kWorkersBarrier, kWorkers);  // the first warp reads only what all have written
  if (thread >= 32) return {};
  int64_t total[4] = {};
  for (int i = 0; i < kWarps; ++i) {
    const Vec other = shared_load<Vec>(at + 32 + i * 16);
    FASTGRPO_UNROLL
    for (int j = 0; j < 4; ++j) total[j] += (int)other.w[j];
  }
  if (!(top < INFINITY)) return {top, NAN, NAN};  // NaN or +inf among them
  const float back = exp2f(-exponent.rest);
  Sums sums = {top, fixed_value(total[0], total[1]), fixed_value(total[2], total[3])};
  sums.weighted = back * (sums.weighted - exponent.rest * sums.sum);
  sums.sum *= back;
  return sums;
}

// `a` as it is when counted from a higher top.
FASTGRPO_DEVICE Sums raised(const Sums& a, float top, float c) {
  const float drop = (a.top - top) * c, factor = exp2f(drop);
  if (factor == 0.0f) return {top, 0.0f, 0.0f};  // also of nothing but -inf
  return {top, factor * a.sum, factor * fmaf(drop, a.sum, a.weighted)};
}

FASTGRPO_DEVICE Sums merged(const Sums& a, const Sums& b, float c) {
  const float top = max_f32(a.top, b.top);
  if (!(top < INFINITY)) return {top, NAN, NAN};
  if (top == -INFINITY) return {top, 0.0f, 0.0f};
  const Sums x = raised(a, top, c), y = raised(b, top, c);
  return {top, x.sum + y.sum, x.weighted + y.weighted};
}

FASTGRPO_DEVICE Sums nothing() { return {-INFINITY, 0.0f, 0.0f}; }

// ---- what a row is asked, and what comes of it

// Structs of whole vectors in shared memory.
template <class T>
FASTGRPO_DEVICE T shared_get(uint32_t at) {
  union {
    Vec v[sizeof(T) / 16];
    T value;
  } u;
  FASTGRPO_UNROLL
  for (int i = 0; i < (int)(sizeof(T) / 16); ++i) u.v[i] = shared_load<Vec>(at + i * 16);
  return u.value;
}

template <class T>
FASTGRPO_DEVICE void shared_put(uint32_t at, const T& value) {
  union U {
    T value;
    Vec v[sizeof(T) / 16];
    FASTGRPO_DEVICE U(const T& x) : value(x) {}
  } u(value);
  FASTGRPO_UNROLL
  for (int i = 0; i < (int)(sizeof(T) / 16); ++i) shared_store(at + i * 16, u.v[i]);
}

struct alignas(16) Plan {
  int64_t row;
  int32_t scored;
  int32_t target;  // its id, or -1 when that is out of range
  float inv_temperature;
  float advantage, weight, old_logp, ref_logp, policy_scale, h;
  // of the slice in this block: its vectors, where in these the target is or -1, the block that has it, and where in
  // shared memory its first vector is
  int32_t vectors, position, owner;
  uint32_t at;
  // and for a narrow gradient: its Span, and where in `out` its gradient is. A pointer would be one to any memory here
  int32_t lead, count;
  int32_t unused;
  int64_t out;
};

FASTGRPO_DEVICE int min_of(int a, int b) { return a < b ? a : b; }

FASTGRPO_DEVICE float or_else(const float* p, int64_t i, float value) {
  return p == nullptr ? value : global_load(p + i);
}

FASTGRPO_DEVICE Plan plan_row(const FastgrpoArgs& a, int64_t row) {
  Plan plan = {};
  plan.row = row;
  plan.scored = global_load(a.mask + row) != 0;
  if (!plan.scored) return plan;
  if (a.loss != nullptr) {
    plan.advantage = global_load(a.advantages + (a.rewards == nullptr ? row : global_load(a.seq + row)));
    if (a.skip_zero && plan.advantage == 0 && a.spec.beta == 0 && a.h == nullptr) {
      plan.scored = 0;
      return plan;
    }
    plan.weight = global_load(a.weight + row);
    plan.old_logp = or_else(a.old, row, 0.0f);
    plan.ref_logp = or_else(a.ref, row, 0.0f);
    plan.policy_scale = or_else(a.policy_scale, row, 1.0f);
    plan.h = or_else(a.h, row, 0.0f);
  }
  const int64_t id = global_load(a.ids + row);
  plan.target = id >= 0 && id < a.vocab ? (int32_t)id : -1;
  plan.inv_temperature = global_load(a.inv_temperature + row);
  return plan;
}

FASTGRPO_DEVICE const void* row_pointer(const void* base, const int64_t (&stride)[2], const FastgrpoArgs& a,
                                        int64_t row, int size) {
  return (const char*)base + (row / a.tokens * stride[0] + row % a.tokens * stride[1]) * size;
}

// dL/dx = 2^t * (constant + slope * t), but at the target.
struct alignas(16) RowGradient {
  float c, top;
  float constant, slope;
  float target;
  int32_t idle;  // all of it is 0
  int32_t unused[2];
};

struct Score {
  float logp, lse, entropy;
  float top, log_sum;  // of the whole row, counted from its top
};

FASTGRPO_DEVICE Score score(Sums others, float target, const Plan& plan) {
  const float inv_t = plan.inv_temperature, c = inv_t * kLog2E;
  Score s;
  if (plan.target < 0) target = -INFINITY;
  s.top = max_f32(others.top, target);
  const bool number = s.top < INFINITY;  // neither NaN nor +inf anywhere
  if (number && others.top != s.top) others = raised(others, s.top, c);
  const float drop = (target - s.top) * c, e = exp2f(drop), total = others.sum + e;
  const bool leads = others.sum <= e;
  s.log_sum = e == 1.0f ? log1pf(others.sum) : logf(total);
  s.logp = leads ? -log1pf(others.sum / e) : fmaf(target - s.top, inv_t, -s.log_sum);
  s.lse = fmaf(s.top, inv_t, s.log_sum);
  const float share = e == 0.0f ? 0.0f : e * drop;
  s.entropy = leads ? fmaf((drop * others.sum - others.weighted) / total, kLn2, -s.logp)
                    : fmaf((others.weighted + share) / total, -kLn2, s.log_sum);
  if (plan.target < 0) s.logp = NAN;
  if (!number) s.logp = s.lse = s.entropy = NAN;
  if (s.top == -INFINITY) s.lse = -INFINITY;
  return s;
}

// From g = dL/dlogp and h = dL/dentropy to what the sweep over the row needs.
FASTGRPO_DEVICE RowGradient row_gradient(float logp, float log_sum, float entropy, float top, float g, float h,
                                         float inv_t) {
  RowGradient r = {};
  r.c = inv_t * kLog2E;
  r.top = top;
  r.idle = g == 0.0f && h == 0.0f;
  const Exponent exponent(top, r.c);
  const float shift = fmaf(exponent.rest, kLn2, log_sum), scale = -inv_t * expf(-shift);
  r.constant = h == 0.0f ? scale * g : scale * fmaf(h, entropy - shift, g);
  r.slope = scale * h * kLn2;
  const float p = expf(logp);
  float value = -g * expm1f(logp);
  if (h != 0.0f && p != 0.0f) value -= h * p * (logp + entropy);
  r.target = inv_t * value;
  return r;
}

// The statistics of a row to its outputs, and through the objective to its gradient. Those who write do so alone.
FASTGRPO_DEVICE RowGradient finish_row(const FastgrpoArgs& a, const Plan& plan, const Sums& others, float target,
                                       bool writes) {
  const Score s = score(others, target, plan);
  const int64_t r = plan.row;
  if (writes) {
    global_store(a.logp + r, s.logp);
    global_store(a.lse + r, s.lse);
    if (a.entropy != nullptr) global_store(a.entropy + r, s.entropy);
  }
  if (a.loss == nullptr) return {};
  ObjectiveResult result = objective(a.spec, {s.logp, plan.old_logp, plan.ref_logp, plan.advantage, plan.weight,
                                              plan.policy_scale, a.old != nullptr});
  if (plan.h != 0.0f) result.loss += plan.h * s.entropy;
  if (writes) {
    global_store(a.loss + r, result.loss);
    global_store(a.kl + r, result.kl);
    global_store(a.ratio + r, result.ratio);
    global_store(a.g + r, result.dlogp);
  }
  return row_gradient(s.logp, s.log_sum, s.entropy, s.top, result.dlogp, plan.h, plan.inv_temperature);
}

// The outputs of a row that is not scored, by one thread.
FASTGRPO_DEVICE void skip_row(const FastgrpoArgs& a, int64_t row) {
  global_store(a.logp + row, 0.0f);
  global_store(a.lse + row, 0.0f);
  if (a.entropy != nullptr) global_store(a.entropy + row, 0.0f);
  if (a.loss == nullptr) return;
  global_store(a.loss + row, 0.0f);
  global_store(a.kl + row, 0.0f);
  global_store(a.ratio + row, 0.0f);
  global_store(a.g + row, 0.0f);
}

// The gradient of a vector of logits, in elements of O.
template <class E, class O, bool kNear, bool kSlope>
FASTGRPO_DEVICE typename Packed<E, O>::Type gradient(const Vec& v, const Exponent& exponent, float constant,
                                                     float slope) {
  float x[E::kCount];
  unpack<E>(v, x);
  FASTGRPO_UNROLL
  for (int k = 0; k < E::kCount; ++k) {
    const float t = exponent.of<kNear>(x[k]);
    x[k] = fast_exp2(t) * (kSlope ? fmaf(slope, max_f32(t, kLowestExponent), constant) : constant);
  }
  return pack<E, O>(x);
}

// The same of a logit, bit for bit.
template <class O>
FASTGRPO_DEVICE typename O::Bits gradient(float x, const Exponent& exponent, float constant, float slope) {
  const float t = exponent.near ? exponent.of<true>(x) : exponent.of<false>(x);
  return O::bits(fast_exp2(t) * (slope != 0.0f ? fmaf(slope, max_f32(t, kLowestExponent), constant) : constant));
}

// Calls f(near, slope), whose types (True or False) say which variant of a sweep this row takes.
struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};

template <class F>
FASTGRPO_DEVICE void choose_gradient(const Exponent& exponent, float slope, F f) {
  if (slope != 0.0f) {
    exponent.near ? f(True(), True()) : f(False(), True());
  } else {
    exponent.near ? f(True(), False()) : f(False(), False());
  }
}

}  // namespace fastgrpo
