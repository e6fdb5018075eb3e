// The elements of a row: fp32, bf16 or fp16 in vectors of 128 bits, and where such vectors lie.

#pragma once

#ifndef FASTGRPO_MACHINE
#define FASTGRPO_MACHINE "ptx.h"
#endif
#include FASTGRPO_MACHINE

#include <math.h>

#include "args.h"

namespace fastgrpo {

// ---- elements: kCount of them in a Vec

struct Float32 {
  using Bits = uint32_t;
  static constexpr int kCount = 4;
  static constexpr Bits kMinusInfinity = 0xff800000u;
  static constexpr uint32_t kLowest = kMinusInfinity;
  static FASTGRPO_DEVICE float number(Bits x) { return as_float(x); }
  static FASTGRPO_DEVICE Bits bits(float x) { return as_bits(x); }
  static FASTGRPO_DEVICE void unpack(uint32_t w, float* x) { x[0] = as_float(w); }
  static FASTGRPO_DEVICE uint32_t pack(const float* x) { return as_bits(x[0]); }
  static FASTGRPO_DEVICE uint32_t maximum(uint32_t a, uint32_t b) {
    return as_bits(max_f32(as_float(a), as_float(b)));
  }
  static FASTGRPO_DEVICE float largest(uint32_t a) { return as_float(a); }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kCount = 8;
  static constexpr Bits kMinusInfinity = 0xff80;
  static constexpr uint32_t kLowest = 0xff80ff80u;
  static FASTGRPO_DEVICE float number(Bits x) { return as_float((uint32_t)x << 16); }
  static FASTGRPO_DEVICE Bits bits(float x) { return (Bits)pack_bf16x2(x, x); }
  static FASTGRPO_DEVICE void unpack(uint32_t w, float* x) {
    x[0] = as_float(w << 16), x[1] = as_float(w & 0xffff0000u);
  }
  static FASTGRPO_DEVICE uint32_t pack(const float* x) { return pack_bf16x2(x[0], x[1]); }
  static FASTGRPO_DEVICE uint32_t maximum(uint32_t a, uint32_t b) { return max_bf16x2(a, b); }
  static FASTGRPO_DEVICE float largest(uint32_t a) { return max_f32(as_float(a << 16), as_float(a & 0xffff0000u)); }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr int kCount = 8;
  static constexpr Bits kMinusInfinity = 0xfc00;
  static constexpr uint32_t kLowest = 0xfc00fc00u;
  static FASTGRPO_DEVICE float number(Bits x) {
    float low, high;
    unpack_f16x2(x, low, high);
    return low;
  }
  static FASTGRPO_DEVICE Bits bits(float x) { return (Bits)pack_f16x2(x, x); }
  static FASTGRPO_DEVICE void unpack(uint32_t w, float* x) { unpack_f16x2(w, x[0], x[1]); }
  static FASTGRPO_DEVICE uint32_t pack(const float* x) { return pack_f16x2(x[0], x[1]); }
  static FASTGRPO_DEVICE uint32_t maximum(uint32_t a, uint32_t b) { return max_f16x2(a, b); }
  static FASTGRPO_DEVICE float largest(uint32_t a) {
    float low, high;
    unpack_f16x2(a, low, high);
    return max_f32(low, high);
  }
};

template <class E>
FASTGRPO_DEVICE void unpack(const Vec& v, float (&x)[E::kCount]) {
  FASTGRPO_UNROLL
  for (int i = 0; i < 4; ++i) E::unpack(v.w[i], x + i * (E::kCount / 4));
}

// As many elements of O as a Vec has of E.
template <class E, class O>
struct Packed {
  using Type = Vec;
};
template <>
struct Packed<Float32, BFloat16> {
  using Type = HalfVec;
};
template <>
struct Packed<Float32, Float16> {
  using Type = HalfVec;
};

// Whether elements of O take as many bytes as those of E.
template <class E, class O>
constexpr bool kAsWide = sizeof(typename E::Bits) == sizeof(typename O::Bits);

template <class E, class O = E>
FASTGRPO_DEVICE typename Packed<E, O>::Type pack(const float (&x)[E::kCount]) {
  constexpr int kWords = sizeof(typename Packed<E, O>::Type) / 4;
  typename Packed<E, O>::Type v;
  FASTGRPO_UNROLL
  for (int i = 0; i < kWords; ++i) v.w[i] = O::pack(x + i * (E::kCount / kWords));
  return v;
}

// f(E(), O()) for logits of a dtype and a gradient of a dtype: of another one where the logits are fp32 alone.
template <class F>
auto for_dtypes(int32_t dtype, int32_t out_dtype, F f) {
  if (dtype == kBFloat16) return f(BFloat16(), BFloat16());
  if (dtype == kFloat16) return f(Float16(), Float16());
  if (out_dtype == kBFloat16) return f(Float32(), BFloat16());
  if (out_dtype == kFloat16) return f(Float32(), Float16());
  return f(Float32(), Float32());
}

template <class E>
FASTGRPO_DEVICE uint32_t maximum(const Vec& v, uint32_t top) {
  return E::maximum(E::maximum(E::maximum(v.w[0], v.w[1]), E::maximum(v.w[2], v.w[3])), top);
}

template <class E>
FASTGRPO_DEVICE typename E::Bits element(const Vec& v, int k) {
  return (typename E::Bits)(E::kCount == 8 ? v.w[k / 2] >> k % 2 * 16 : v.w[k % 4]);
}

// `v` with its element k ruled out.
template <class E>
FASTGRPO_DEVICE Vec without(Vec v, int k) {
  float x[E::kCount];
  unpack<E>(v, x);
  FASTGRPO_UNROLL
  for (int i = 0; i < E::kCount; ++i) x[i] = i == k ? -INFINITY : x[i];
  return pack<E>(x);
}

// ---- a stretch of a row, in vectors that start at multiples of 16 bytes: `lead` elements before its first one belong
// to somebody else, and so may the last vector's end

template <class E>
struct Span {
  using Bits = typename E::Bits;
  const Bits* from;  // its first element
  int lead, count;

  FASTGRPO_DEVICE Span(const void* row, int64_t begin, int elements)
      : from((const Bits*)row + begin), lead((int)((uintptr_t)from & 15) / (int)sizeof(Bits)), count(elements) {}
  // One that lies elsewhere by now.
  FASTGRPO_DEVICE Span(int lead_elements, int elements) : from(nullptr), lead(lead_elements), count(elements) {}
  FASTGRPO_DEVICE int vectors() const { return (lead + count + E::kCount - 1) / E::kCount; }
  // Whole vectors are [first_whole, end_whole); what else there is are `edges`.
  FASTGRPO_DEVICE int first_whole() const { return lead > 0; }
  FASTGRPO_DEVICE int end_whole() const { return (lead + count) / E::kCount; }
  FASTGRPO_DEVICE bool whole(int v) const { return v >= first_whole() && v < end_whole(); }
  FASTGRPO_DEVICE bool holds(int position) const { return position >= lead && position < lead + count; }
  FASTGRPO_DEVICE const Bits* at(int position) const { return from - lead + position; }
  // Of its first vector, modulo 128 bytes.
  FASTGRPO_DEVICE uint32_t phase() const { return (uint32_t)(uintptr_t)at(0) & 127; }
};

// Calls f(position) for the elements of the edges' vectors, each in a lane of its own of 32 or more.
template <class E, class F>
FASTGRPO_DEVICE void each_edge(const Span<E>& span, int lane, F f) {
  const int last = span.end_whole();
  if (lane < E::kCount) {
    if (span.lead > 0) f(lane);
  } else if (lane < 2 * E::kCount) {
    const bool partial = (span.lead + span.count) % E::kCount != 0 && !(span.lead > 0 && last == 0);
    if (partial) f((last - 1) * E::kCount + lane);
  }
}

// Zeroes the span, by `threads` threads (32 or more) of which this is number `thread`.
template <class E>
FASTGRPO_DEVICE void zero(const Span<E>& span, int thread, int threads) {
  using Bits = typename E::Bits;
  Vec* const vectors = (Vec*)span.at(0);
  for (int v = span.first_whole() + thread; v < span.end_whole(); v += threads) {
    global_store_streaming(vectors + v, Vec{{0, 0, 0, 0}});
  }
  each_edge(span, thread, [&](int position) {
    if (span.holds(position)) global_store((Bits*)span.at(position), (Bits)0);
  });
}

}  // namespace fastgrpo
