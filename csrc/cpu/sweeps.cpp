// The two sweeps over a row, compiled once per instruction set on top of the vector layer in FASTGRPO_SIMD.
//
// sums reads a block of the row once; gradient reads it once (from L2, when it follows) and writes it once, in place
// or not. A row's result depends on its values alone: blocks are counted from its start, whatever its address. Every
// function here is in an unnamed namespace, and none comes inline from a shared header: of an inline function the
// linker would keep one copy for all, perhaps the one that only the newest CPUs can run.

#include "sweeps.h"

#include <float.h>
#include <math.h>
#include <string.h>

// What a layer provides: Vec of kWidth floats and on it set, add, sub, mul, div, fma(a, b, c) = a*b + c rounded once,
// max(a, b) (b or NaN, if one is NaN), low_bits_to_exponent (integer shift left by 23), max_lane, sum_lanes (of four
// Vec, in double); load2 and store2: 2*kWidth elements as two Vec, in an order of its own, rounded to nearest even;
// store2_in_order.
#include FASTGRPO_SIMD

namespace fastgrpo {
namespace {

using Vec = Simd::Vec;

constexpr int kStep = 4 * Simd::kWidth;  // elements per iteration: two load2

// Where the exponential is exact: exponents t = x*c in [base - 127, base + 127], |base| small beside 2^23.
//
// Adding the magic number rounds t to an integer n, and leaves n - base + 127 in the low bits: the exponent field of
// 2^(n - base). At t = base - 127 that field is 0 and so is the result: `floor` makes everything below it vanish.
struct Range {
  float c, base, magic, floor;

  // False when no such range can be had; then the row is for the careful sweep.
  bool around(double t, float scale) {
    if (!(fabs(t) <= 1 << 21)) return false;
    c = scale;
    base = (float)rint(t);
    magic = 12582912.0f + 127.0f - base;  // 1.5 * 2^23: the rounding of the sum is to 1
    floor = (base - 127.0f) / c;
    return floor >= -FLT_MAX && floor <= FLT_MAX;
  }
};

// The largest t above `base` that a block may hold: 2^100 summed over any block stays far from overflow.
constexpr double kHeadroom = 100;

// 2^f for |f| <= 1/2, relative error 1.5e-7 (six coefficients) and 2.7e-6 (five).
constexpr float kExp2Fine[6] = {1.0f, 0.693146944f, 0.240221202f, 0.0555071309f, 0.00967554096f, 0.00132764725f};
constexpr float kExp2Coarse[5] = {0.999999285f, 0.693121791f, 0.240247443f, 0.0559178591f, 0.00957010221f};

// 2^(x*c - base) as significand * power, times `scale` when the coefficients carry one.
template <int kCoefficients>
struct Exponential {
  Vec c, magic, floor, minus_base;
  Vec coefficient[kCoefficients];

  Exponential(const Range& range, const float (&coefficients)[kCoefficients], float scale)
      : c(Simd::set(range.c)),
        magic(Simd::set(range.magic)),
        floor(Simd::set(range.floor)),
        minus_base(Simd::set(-range.base)) {
    for (int i = 0; i < kCoefficients; ++i) coefficient[i] = Simd::set(coefficients[i] * scale);
  }

  // x itself, or what stands for everything too small to count; keeps NaN.
  Vec clamp(Vec x) const { return Simd::max(floor, x); }

  void operator()(Vec clamped, Vec& significand, Vec& power) const {
    const Vec shifted = Simd::fma(clamped, c, magic);
    const Vec f = Simd::fma(clamped, c, Simd::sub(magic, shifted));
    significand = coefficient[kCoefficients - 1];
    for (int i = kCoefficients - 2; i >= 0; --i) significand = Simd::fma(significand, f, coefficient[i]);
    power = Simd::low_bits_to_exponent(shifted);
  }

  Vec exponent(Vec clamped) const { return Simd::fma(clamped, c, minus_base); }
};

template <class T>
T minus_infinity() {
  T x;
  from_float(-INFINITY, &x);
  return x;
}

// The elements [begin, begin + count) of a row for the kernels below, which want whole steps and no target.
template <class T>
struct Block {
  int count, padded;
  const T* data;
  T copy[kBlock];

  Block(const T* x, int64_t begin, int64_t V, int64_t target) {
    count = V - begin < kBlock ? (int)(V - begin) : kBlock;
    padded = (count + kStep - 1) / kStep * kStep;
    data = x + begin;
    const bool holds_target = target >= begin && target < begin + count;
    if (padded == count && !holds_target) return;
    memcpy(copy, data, count * sizeof(T));
    for (int j = count; j < padded; ++j) copy[j] = minus_infinity<T>();
    if (holds_target) copy[target - begin] = minus_infinity<T>();
    data = copy;
  }
};

template <class T>
float block_max(const T* x, int count) {
  Vec top = Simd::set(-INFINITY);
  for (int j = 0; j < count; j += kStep / 2) {
    Vec a, b;
    Simd::load2(x + j, a, b);
    top = Simd::max(b, Simd::max(a, top));
  }
  return Simd::max_lane(top);
}

struct BlockSums {
  float top;
  double sum, weighted;
};

template <class T, bool kEntropy>
BlockSums block_sums(const T* x, int count, const Range& range) {
  const Exponential<6> exponential(range, kExp2Fine, 1.0f);
  Vec top = Simd::set(-INFINITY);
  Vec sum[4], weighted[4];
  for (int k = 0; k < 4; ++k) sum[k] = weighted[k] = Simd::set(0.0f);
  for (int j = 0; j < count; j += kStep) {
    Vec v[4];
    Simd::load2(x + j, v[0], v[1]);
    Simd::load2(x + j + kStep / 2, v[2], v[3]);
    for (int k = 0; k < 4; ++k) {
      top = Simd::max(v[k], top);
      const Vec clamped = exponential.clamp(v[k]);
      Vec significand, power;
      exponential(clamped, significand, power);
      sum[k] = Simd::fma(significand, power, sum[k]);
      if (kEntropy) weighted[k] = Simd::fma(Simd::mul(significand, exponential.exponent(clamped)), power, weighted[k]);
    }
  }
  return {Simd::max_lane(top), Simd::sum_lanes(sum), kEntropy ? Simd::sum_lanes(weighted) : 0.0};
}

// For blocks that no Range covers (|logit| beyond a million, NaN, +inf): two passes in double, one element at a time.
template <class T>
RowSums careful_sums(const T* x, int count, float c) {
  double ref = -INFINITY;
  for (int j = 0; j < count; ++j) {
    const double t = (double)to_float(x[j]) * c;
    if (!(t <= ref)) ref = t;
    if (ref != ref) break;
  }
  RowSums sums = {ref, 0.0, 0.0};
  for (int j = 0; j < count; ++j) {
    const double d = (double)to_float(x[j]) * c - ref;
    if (d == -INFINITY) continue;
    const double e = exp2(d);
    sums.sum += e;
    sums.weighted += e * d;
  }
  return sums;
}

template <class T, bool kEntropy>
RowSums sums_of_block(const T* x, int64_t begin, int64_t V, int64_t target, float target_logit, float c) {
  const FlushSubnormals guard;
  const Block<T> block(x, begin, V, target);
  Range range;
  BlockSums sums;
  if (range.around((double)target_logit * c, c)) {
    sums = block_sums<T, kEntropy>(block.data, block.padded, range);
    if ((double)sums.top * c - range.base <= kHeadroom) return {range.base, sums.sum, sums.weighted};
  } else {
    sums.top = block_max(block.data, block.padded);
  }
  // Seldom: the block towers too far above the target, or there is none. It stands for itself.
  if (sums.top == -INFINITY) return {-INFINITY, 0.0, 0.0};
  if (!range.around((double)sums.top * c, c)) return careful_sums(block.data, block.count, c);
  sums = block_sums<T, kEntropy>(block.data, block.padded, range);
  return {range.base, sums.sum, sums.weighted};
}

template <class T>
RowSums sums_entry(const void* x, int64_t begin, int64_t V, int64_t target, float target_logit, float c,
                   bool want_entropy) {
  return want_entropy ? sums_of_block<T, true>((const T*)x, begin, V, target, target_logit, c)
                      : sums_of_block<T, false>((const T*)x, begin, V, target, target_logit, c);
}

// Asks for `bytes` bytes (a multiple of a cache line, or less than one) to come to L2.
void prefetch(const char* p, int bytes) {
#if defined(__GNUC__)
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
#else
  (void)p, (void)bytes;
#endif
}

// A 16-bit result rounds away what the shorter polynomial leaves out.
const float (&gradient_coefficients(float))[6] { return kExp2Fine; }
const float (&gradient_coefficients(BFloat16))[5] { return kExp2Coarse; }
const float (&gradient_coefficients(Float16))[5] { return kExp2Coarse; }

// Stores what load2 gave from elements of type T in the order that they had there.
template <class T, class Out>
void store_as_loaded(Out* p, Vec a, Vec b) {
  if constexpr (sizeof(T) == sizeof(Out)) {
    Simd::store2(p, a, b);
  } else {
    Simd::store2_in_order(p, a, b);
  }
}

// From the last element to the first: a narrower out over the second half of x overwrites only what has been read.
template <class T, class Out, bool kEntropy, int kCoefficients>
void gradient_steps(const T* x, Out* out, int64_t count, int64_t ahead, const Exponential<kCoefficients>& exponential,
                    float constant, float slope) {
  const Vec offset = Simd::set(constant), factor = Simd::set(slope);
  for (int64_t j = count - kStep; j >= 0; j -= kStep) {
    Vec v[4];
    prefetch((const char*)(x + j) + ahead, kStep * sizeof(T));
    Simd::load2(x + j, v[0], v[1]);
    Simd::load2(x + j + kStep / 2, v[2], v[3]);
    for (int k = 0; k < 4; ++k) {
      const Vec clamped = exponential.clamp(v[k]);
      Vec significand, power;
      exponential(clamped, significand, power);
      v[k] = Simd::mul(significand, power);
      if (kEntropy) v[k] = Simd::mul(v[k], Simd::fma(exponential.exponent(clamped), factor, offset));
    }
    store_as_loaded<T>(out + j, v[0], v[1]);
    store_as_loaded<T>(out + j + kStep / 2, v[2], v[3]);
  }
}

template <class T, class Out, bool kEntropy>
void gradient(const T* x, Out* out, int64_t V, const Range& range, const RowGradient& g, const void* next) {
  const FlushSubnormals guard;
  // p_j = 2^(t_j - base) * 2^-rest; without an entropy term the polynomial itself carries all factors.
  const double rest = g.lse2 - range.base;
  const double scale = exp2(-rest) * (kEntropy ? 1.0 : (double)g.constant);
  const float constant = (float)(g.constant - g.slope * rest);
  const Exponential<sizeof(gradient_coefficients(Out())) / sizeof(float)> exponential(
      range, gradient_coefficients(Out()), (float)scale);
  const int64_t whole = V / kStep * kStep;
  // Without a row to fetch, the row's own lines are named, which costs next to nothing.
  const int64_t ahead = next == nullptr ? 0 : (const char*)next - (const char*)x;
  if (whole < V) {
    T tail[kStep];
    Out made[kStep];
    for (int j = 0; j < kStep; ++j) tail[j] = minus_infinity<T>();
    memcpy(tail, x + whole, (V - whole) * sizeof(T));
    gradient_steps<T, Out, kEntropy>(tail, made, kStep, 0, exponential, constant, g.slope);
    memcpy(out + whole, made, (V - whole) * sizeof(Out));
  }
  gradient_steps<T, Out, kEntropy>(x, out, whole, ahead, exponential, constant, g.slope);
}

// For rows that no Range covers, and for gradients that are not finite.
template <class T, class Out>
void careful_gradient(const T* x, Out* out, int64_t V, float c, const RowGradient& g) {
  for (int64_t j = V - 1; j >= 0; --j) {
    const double d = (double)to_float(x[j]) * c - g.lse2;
    const double p = exp2(d);
    const double factor = g.slope == 0 ? g.constant : g.constant + g.slope * d;
    from_float(p == 0 ? 0.0f : (float)(p * factor), out + j);
  }
}

template <class T, class Out>
void gradient_entry(const void* x, void* out, int64_t V, float c, const RowGradient& g, const void* next) {
  Range range;
  // The difference of a finite number with itself is 0, of anything else NaN.
  const bool finite = g.constant - g.constant == 0 && g.slope - g.slope == 0;
  if (!finite || !range.around(g.lse2, c)) {
    careful_gradient((const T*)x, (Out*)out, V, c, g);
  } else if (g.slope != 0) {
    gradient<T, Out, true>((const T*)x, (Out*)out, V, range, g, next);
  } else {
    gradient<T, Out, false>((const T*)x, (Out*)out, V, range, g, next);
  }
}

// (2^f - 1) / f for |f| <= 1/2, relative error 2.1e-8.
constexpr float kExpm1[6] = {0.693147182f,   0.240226492f,   0.0555035733f,
                             0.00961823761f, 0.00133907353f, 0.000154035108f};

// tanh(x / softcap) = m / (m + 2) with m = e^(2x / softcap) - 1, where no digits are lost near 0:
// m = (2^f - 1) * 2^n + (2^n - 1), whose first factor the polynomial gives without its constant term.
class Tanh {
 public:
  explicit Tanh(float softcap) {
    Range range;
    range.around(0.0, 2.8853900817779268f / softcap);
    c_ = Simd::set(range.c);
    magic_ = Simd::set(range.magic);
    lowest_ = Simd::set(range.floor);
    highest_ = Simd::set(-12.0f * softcap);  // beyond, the result is 1
  }

  Vec operator()(Vec x) const {
    const Vec zero = Simd::set(0.0f), one = Simd::set(1.0f);
    const Vec bounded = Simd::max(lowest_, Simd::sub(zero, Simd::max(highest_, Simd::sub(zero, x))));
    const Vec shifted = Simd::fma(bounded, c_, magic_);
    const Vec f = Simd::fma(bounded, c_, Simd::sub(magic_, shifted));
    Vec m = Simd::set(kExpm1[5]);
    for (int i = 4; i >= 0; --i) m = Simd::fma(m, f, Simd::set(kExpm1[i]));
    const Vec power = Simd::low_bits_to_exponent(shifted);
    m = Simd::fma(Simd::mul(m, f), power, Simd::sub(power, one));
    return Simd::div(m, Simd::add(m, Simd::set(2.0f)));
  }

 private:
  Vec c_, magic_, lowest_, highest_;
};

// Calls f(v, z) on every vector of z, and the padding after the last.
template <class F>
void each_vector(float* z, int64_t V, F f) {
  for (int64_t j = 0; j < V; j += 2 * Simd::kWidth) {
    Vec a, b;
    Simd::load2(z + j, a, b);
    Simd::store2(z + j, f(a, j), f(b, j + Simd::kWidth));
  }
}

template <class T>
void cap_entry(const void* x, float* z, int64_t V, float softcap) {
  const Tanh tanh(softcap);
  const Vec factor = Simd::set(softcap);
  for (int64_t j = 0; j < V; ++j) z[j] = to_float(((const T*)x)[j]);
  for (int64_t j = V; j < V + kCapPadding; ++j) z[j] = 0.0f;
  each_vector(z, V, [&](Vec v, int64_t) { return Simd::mul(factor, tanh(v)); });
}

template <class T, class Out>
void uncap_entry(const void* x, float* dz, void* out, int64_t V, float softcap) {
  const Tanh tanh(softcap);
  const Vec one = Simd::set(1.0f);
  float raw[kBlock + kCapPadding] = {};
  for (int64_t begin = (V - 1) / kBlock * kBlock; begin >= 0; begin -= kBlock) {
    const int64_t count = V - begin < kBlock ? V - begin : kBlock;
    for (int64_t j = 0; j < count; ++j) raw[j] = to_float(((const T*)x)[begin + j]);
    each_vector(dz + begin, count, [&](Vec d, int64_t j) {
      Vec v, unused;
      Simd::load2(raw + j, v, unused);
      const Vec t = tanh(v);
      return Simd::mul(d, Simd::sub(one, Simd::mul(t, t)));
    });
    for (int64_t j = 0; j < count; ++j) from_float(dz[begin + j], (Out*)out + begin + j);
  }
}

}  // namespace

namespace FASTGRPO_ISA {

extern const Sweeps kSweeps[3] = {
    {sums_entry<float>,
     {gradient_entry<float, float>, gradient_entry<float, BFloat16>, gradient_entry<float, Float16>},
     cap_entry<float>,
     {uncap_entry<float, float>, uncap_entry<float, BFloat16>, uncap_entry<float, Float16>}},
    {sums_entry<BFloat16>,
     {nullptr, gradient_entry<BFloat16, BFloat16>, nullptr},
     cap_entry<BFloat16>,
     {nullptr, uncap_entry<BFloat16, BFloat16>, nullptr}},
    {sums_entry<Float16>,
     {nullptr, nullptr, gradient_entry<Float16, Float16>},
     cap_entry<Float16>,
     {nullptr, nullptr, uncap_entry<Float16, Float16>}},
};

}  // namespace FASTGRPO_ISA
}  // namespace fastgrpo
