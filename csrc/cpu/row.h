// One row of a call: where it stands, its statistics and its gradient. For files that no instruction set has a copy
// of.

#pragma once

#include <math.h>
#include <string.h>

#include <limits>
#include <vector>

#include "../args.h"
#include "elements.h"
#include "sweeps.h"

namespace fastgrpo {

inline int64_t element_size(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

inline float read_element(const void* row, int64_t j, int32_t dtype) {
  if (dtype == kBFloat16) return to_float(((const BFloat16*)row)[j]);
  if (dtype == kFloat16) return to_float(((const Float16*)row)[j]);
  return ((const float*)row)[j];
}

inline void write_element(float x, void* row, int64_t j, int32_t dtype) {
  if (dtype == kBFloat16) {
    from_float(x, (BFloat16*)row + j);
  } else if (dtype == kFloat16) {
    from_float(x, (Float16*)row + j);
  } else {
    ((float*)row)[j] = x;
  }
}

// The scale of a row's exponents.
struct Scale {
  float c;      // exponent in base 2 per logit
  double unit;  // log(2), but such that z = t * unit holds in spite of the rounding of c

  explicit Scale(float inv_temperature)
      : c((float)(inv_temperature * 1.4426950408889634)), unit(inv_temperature / (double)c) {}
};

inline RowSums from_reference(const RowSums& sums, double ref) {
  const double drop = sums.ref - ref, factor = exp2(drop);
  return {ref, sums.sum * factor, (sums.weighted + sums.sum * drop) * factor};
}

// The sums of a row from those of its blocks, which come in their order; at first its ref is -inf.
inline void add_block(RowSums& row, RowSums block) {
  if (block.ref == -INFINITY) return;
  if (row.ref == -INFINITY) {
    row = block;
    return;
  }
  if (row.ref < block.ref) row = from_reference(row, block.ref);
  if (row.ref != block.ref) block = from_reference(block, row.ref);
  row.sum += block.sum;
  row.weighted += block.weighted;
}

struct Score {
  double lse2;  // of the exponents in base 2, unrounded: the gradient of the same pass takes this one
  float logp, lse, entropy;
};

// From the sums over the others, and the target's logit if there is a target.
inline Score score_of(const RowSums& others, bool has_target, float target_logit, const Scale& scale,
                      bool want_entropy) {
  Score s;
  // Without a finite one among the others, the target stands for itself.
  const double ref = others.ref == -INFINITY ? (double)target_logit * scale.c : others.ref;
  double sum = others.sum, logp = std::numeric_limits<double>::quiet_NaN();
  double t = -INFINITY;  // of the target, from ref
  if (has_target) {
    t = (double)target_logit * scale.c - ref;
    const double e = exp2(t);
    sum += e;
    logp = others.sum <= e ? -log1p(others.sum / e) : t * scale.unit - log(sum);
  }
  const double log_sum = log(sum);
  s.logp = (float)logp;
  s.lse2 = ref + log_sum / scale.unit;
  s.lse = (float)(ref * scale.unit + log_sum);
  s.entropy = 0.0f;
  if (want_entropy) {
    // log_sum - mean, with the target's share drawn out of both: no digits are lost when its p is near 1.
    const bool has_share = t - t == 0;
    const double from = has_share ? -logp : log_sum, shift = has_share ? t * others.sum : 0.0;
    s.entropy = (float)(from + (shift - others.weighted) / sum * scale.unit);
  }
  return s;
}

struct Row {
  const FastgrpoArgs& args;
  const Sweeps* table;  // indexed by DType
  const void* logits;
  void* out;
  int32_t dtype;   // of source()
  float* capped;   // with a softcap: its logits in fp32, which the sweeps take for the row's; else null
  int64_t target;  // -1 when the id is out of range
  float inv_temperature;
  Scale scale;

  Row(const FastgrpoArgs& a, const Sweeps* table, int64_t r)
      : args(a), table(table), dtype(a.dtype), capped(nullptr), scale(a.inv_temperature[r]) {
    const int64_t b = r / a.tokens, t = r % a.tokens;
    const int64_t from = b * a.logits_stride[0] + t * a.logits_stride[1];
    const int64_t to = b * a.out_stride[0] + t * a.out_stride[1];
    logits = (const char*)a.logits + from * element_size(a.dtype);
    out = a.out == nullptr ? nullptr : (char*)a.out + to * element_size(a.out_dtype);
    target = a.ids[r] >= 0 && a.ids[r] < a.vocab ? a.ids[r] : -1;
    inv_temperature = a.inv_temperature[r];
  }

  // Before the row is read.
  void cap() {
    if (args.softcap == INFINITY) return;
    thread_local std::vector<float> scratch;
    scratch.resize(args.vocab + kCapPadding);
    capped = scratch.data();
    sweeps().cap(logits, capped, args.vocab, args.softcap);
    dtype = kFloat32;
  }

  const Sweeps& sweeps() const { return table[dtype]; }
  const void* source() const { return capped == nullptr ? logits : capped; }
  float target_logit() const { return target < 0 ? -INFINITY : read_element(source(), target, dtype); }

  void zero_gradient() const { memset(out, 0, args.vocab * element_size(args.out_dtype)); }

  Score score(bool want_entropy) const {
    const float logit = target_logit();
    RowSums others = {-INFINITY, 0.0, 0.0};
    for (int64_t begin = 0; begin < args.vocab; begin += kBlock) {
      add_block(others, sweeps().sums(source(), begin, args.vocab, target, logit, scale.c, want_entropy));
    }
    return score_of(others, target >= 0, logit, scale, want_entropy);
  }

  RowGradient gradient_of_others(double lse2, float g, float h, float entropy) const {
    const double factor = inv_temperature;
    const double constant = h == 0 ? -factor * g : -factor * (g + (double)h * entropy);
    return {lse2, (float)constant, (float)(-factor * h * scale.unit)};
  }

  // From the logarithm of the target's probability; with a softcap that of the capped logit.
  float gradient_of_target(double lp, float g, float h, float entropy) const {
    // g*(1 - p) keeps its digits when p is near 1.
    const double p = exp(lp);
    double value = -g * expm1(lp);
    if (h != 0 && p != 0) value -= h * p * (lp + entropy);
    return (float)(inv_temperature * value);
  }

  void gradient(double lse2, float logp, float g, float h, float entropy, const void* next) const {
    void* const sink = capped == nullptr ? out : capped;
    const int32_t sink_dtype = capped == nullptr ? args.out_dtype : kFloat32;
    const RowGradient others = gradient_of_others(lse2, g, h, entropy);
    sweeps().gradient[sink_dtype](source(), sink, args.vocab, scale.c, others, next);
    if (target >= 0) write_element(gradient_of_target(logp, g, h, entropy), sink, target, sink_dtype);
    if (capped == nullptr) return;
    table[args.dtype].uncap[args.out_dtype](logits, capped, out, args.vocab, args.softcap);
  }
};

}  // namespace fastgrpo
