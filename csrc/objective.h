// The objective of one row, for host and device: from the row's log-probability to its loss and dL/dlogp.
//
// This is the C++ copy of the mathematics that fastgrpo/objective defines; the sweeps over the vocabulary
// (csrc/cpu, csrc/cuda) know nothing of it. No state, no allocation, fp32 results.

#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define FASTGRPO_INLINE __host__ __device__ inline
#else
#define FASTGRPO_INLINE inline
#endif

namespace fastgrpo {

enum ObjectiveKind : int32_t { kClip = 0, kCispo = 1, kSapo = 2 };

using ObjectiveNumbers = float[4];

// What objective() is told of a call. FASTGRPO_SPEC(F) is F(type, name) of every field.
#define FASTGRPO_SPEC(F)                                                     \
  F(int32_t, kind)                                                           \
  F(ObjectiveNumbers, numbers) /* the kind's own, which objective() names */ \
  F(float, beta)                                                             \
  F(int32_t, bias_correction)                                                \
  F(float, log_ratio_clamp) /* of the log ratio, on both sides; inf: none */

#define FASTGRPO_FIELD(type, name) type name;
struct ObjectiveSpec {
  FASTGRPO_SPEC(FASTGRPO_FIELD)
};

struct ObjectiveRow {
  float logp;
  float old_logp;  // read when has_old; otherwise the old policy is this one: ratio 1 in value, gradient alive
  float ref_logp;  // read when beta is not 0
  float advantage;
  float weight;        // factor of the row's whole loss
  float policy_scale;  // factor of the policy term alone
  bool has_old;
};

struct ObjectiveResult {
  float loss;
  float dlogp;  // dL/dlogp, weight included
  float kl;     // 0 when beta is 0
  float ratio;  // before the delta clamp
};

// x within [low, high]; the comparisons let a NaN pass through, as torch does.
FASTGRPO_INLINE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// x * factor, where an infinite x stands for a number beyond fp32.
FASTGRPO_INLINE float times(float x, float factor) { return factor == 0.0f && fabsf(x) > FLT_MAX ? 0.0f : x * factor; }

FASTGRPO_INLINE ObjectiveResult objective(const ObjectiveSpec& spec, const ObjectiveRow& row) {
  const float lp = row.logp, A = row.advantage;
  // Without old logps the ratio is 1, except that a NaN logp still gives a NaN loss and gradient.
  const float on_policy = lp != lp ? lp : 0.0f;
  const float apart = row.has_old ? lp - row.old_logp : on_policy;
  const float x = clamp(apart, -spec.log_ratio_clamp, spec.log_ratio_clamp);
  const bool held = fabsf(apart) > spec.log_ratio_clamp;  // then the ratio has no derivative
  // The ratio is low * high: v * low * high is finite wherever v * e^x is, and 0 with v = 0.
  const float low = expf(x > 80.0f ? 80.0f : x);
  const float high = x > 80.0f ? expf(x > 160.0f ? 80.0f : x - 80.0f) : 1.0f;
  const float c1 = low * high;

  float loss, d;  // of the policy term
  if (spec.kind == kCispo) {
    const float clip_low = spec.numbers[0], clip_high = spec.numbers[1];
    d = -clamp(c1, clip_low, clip_high) * A;
    loss = d * lp;
  } else if (spec.kind == kSapo) {
    const float tau = A > 0 ? spec.numbers[0] : spec.numbers[1];
    const float s = 1.0f / (1.0f + expf(-tau * (c1 - 1.0f)));
    loss = -A * s * (4.0f / tau);
    d = held ? 0.0f : -A * 4.0f * s * (1.0f - s) * low * high;
  } else {
    const float clip_low = spec.numbers[0], clip_high = spec.numbers[1];
    const float delta = spec.numbers[2];      // clips the other term from above; inf: it does not
    const float most = -spec.numbers[3] * A;  // of the loss where A < 0; inf: it has no bound
    const float slope = A * low * high;
    const float l1 = c1 > delta ? delta * A : slope;
    const float l2 = clamp(c1, clip_low, clip_high) * A;
    const float m1 = held || c1 > delta ? 0.0f : slope;
    const float m2 = held || c1 < clip_low || c1 > clip_high ? 0.0f : slope;
    loss = -(l1 < l2 ? l1 : l1 > l2 ? l2 : l1 == l2 ? l1 : l1 + l2);
    // A tie, which is the usual case inside the clip range, shares the gradient as torch.min does.
    d = -(l1 < l2 ? m1 : l1 > l2 ? m2 : 0.5f * (m1 + m2));
    if (A < 0.0f && loss >= most) {
      d = loss > most ? 0.0f : 0.5f * d;
      loss = most;
    }
  }
  const float scale = row.weight == 0.0f ? 0.0f : row.policy_scale;  // so that no infinity meets that of the KL
  loss = times(loss, scale);
  d = times(d, scale);

  float k = 0.0f;
  if (spec.beta != 0.0f) {
    const float q = row.ref_logp - lp;
    const float e = expm1f(q);
    float dk = -e;
    k = e - q;
    if (spec.bias_correction) {
      // Its derivative (k - e) * c1, without the cancellation, or -e * c1 beside a ratio without one; and beyond q =
      // 20, where e^q may overflow beside a small ratio, e^x * (e^q - 1 - q) with the two exponents added.
      const float grown = q > 20.0f ? expf(q + x) : e * low * high;
      dk = held ? -grown : -q * low * high;
      k = q > 20.0f ? grown * (1.0f - (1.0f + q) * expf(-q)) : k * low * high;
    }
    loss += spec.beta * k;
    d += spec.beta * dk;
  }
  // A NaN logp has a NaN gradient, also where the policy term is linear in it.
  return {times(loss, row.weight), lp != lp ? lp : times(d, row.weight), k, c1};
}

// The group-relative advantage of sequence `seq`: rewards stand in contiguous groups of group_size, NaN rewards do not
// count. A group without spread gives exactly 0, so that its rows can be skipped.
FASTGRPO_INLINE float group_advantage(const float* rewards, int64_t seq, int64_t group_size, bool scale_by_std) {
  const float* group = rewards + seq / group_size * group_size;
  const float own = rewards[seq];
  if (own != own) return 0.0f;
  int64_t n = 0;
  double sum = 0.0;
  float low = own, high = own;
  for (int64_t i = 0; i < group_size; ++i) {
    const float r = group[i];
    if (r != r) continue;
    n += 1;
    sum += r;
    low = r < low ? r : low;
    high = r > high ? r : high;
  }
  if (low == high) return 0.0f;  // the mean of equal numbers need not round to that number; also n == 1
  const double mean = sum / (double)n;
  double centred = (double)own - mean;
  if (scale_by_std) {
    double squares = 0.0;
    for (int64_t i = 0; i < group_size; ++i) {
      const double c = (double)group[i] - mean;
      if (c == c) squares += c * c;
    }
    centred /= sqrt(squares / (double)(n - 1)) + 1e-4;
  }
  const float advantage = (float)centred;
  return advantage == advantage ? advantage : 0.0f;
}

}  // namespace fastgrpo
