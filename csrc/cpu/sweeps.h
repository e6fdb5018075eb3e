// The row sweeps over the vocabulary: what sweeps.cpp offers, once per instruction set.
//
// Exponentials are kept in base 2: with c = inv_temperature * log2(e), element j has the exponent t_j = x_j * c.

#pragma once

#include <stdint.h>

namespace fastgrpo {

// Elements whose sums are taken at a time; those of a row are added in their order.
constexpr int kBlock = 1024;

// Sums over a block or a row without its target, so that a target with p near 1 loses no digits to 1 + small:
//   sum = sum_j 2^(t_j - ref),  weighted = sum_j 2^(t_j - ref) * (t_j - ref)
struct RowSums {
  double ref;       // no t_j lies above it by more than 2^7; -inf: all of them are
  double sum;       // NaN when there is a NaN or +inf
  double weighted;  // of no meaning unless the entropy was asked for
};

// dL/dx_j = p_j * (constant + slope * (t_j - lse2)),  p_j = 2^(t_j - lse2); the target's one-hot term is the caller's.
struct RowGradient {
  double lse2;  // log2 of sum_j 2^t_j
  float constant;
  float slope;  // 0 unless the entropy has a gradient
};

constexpr int64_t kCapPadding = 64;

struct Sweeps {
  // The block that begins at `begin` in a row x of V elements; target in [0, V) and its logit, or -1 and -inf.
  RowSums (*sums)(const void* x, int64_t begin, int64_t V, int64_t target, float target_logit, float c,
                  bool want_entropy);
  // By the DType of out; null where out is neither of x's type nor narrower. out may be x itself; a narrower one may
  // lie over the second half of x. next: null, or a row to bring into L2 meanwhile, while memory is idle.
  void (*gradient[3])(const void* x, void* out, int64_t V, float c, const RowGradient& gradient, const void* next);
  // z = softcap * tanh(x / softcap), and back from dL/dz to out = dL/dx, by the DType of out and placed as above; z
  // has kCapPadding elements more than V.
  void (*cap)(const void* x, float* z, int64_t V, float softcap);
  void (*uncap[3])(const void* x, float* dz, void* out, int64_t V, float softcap);
};

// One table per instruction set, indexed by DType (../args.h, whose inline functions sweeps.cpp must not see); defined
// where CMakeLists.txt compiles sweeps.cpp for it.
namespace portable {
extern const Sweeps kSweeps[3];
}
namespace avx2 {
extern const Sweeps kSweeps[3];
}
namespace avx512 {
extern const Sweeps kSweeps[3];
}
namespace neon {
extern const Sweeps kSweeps[3];
}

}  // namespace fastgrpo
