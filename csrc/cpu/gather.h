// What a few columns of the vocabulary take: products of single rows, and the columns of a row that count. What
// gather.cpp offers, once per instruction set.

#pragma once

#include <stdint.h>

namespace fastgrpo {

struct Gather {
  // The sum of a[i] * b[i] over i < n, for each DType of both.
  float (*dot[3])(const void* a, const void* b, int64_t n);
  // sum[i] += factor * x[i]
  void (*add_scaled[3])(float* sum, const void* x, float factor, int64_t n);
  // The indices of x with |x[i]| >= least if `magnitude`, else x[i] >= least, in their order, to `found`, which has
  // room for n; their number. Also how many of them are >= many.
  int64_t (*at_least[3])(const void* x, int64_t n, bool magnitude, float least, float many, int32_t* found,
                         int64_t* above);
  // The sum of |x[i]|.
  double (*magnitudes)(const float* x, int64_t n);
};

namespace portable {
extern const Gather kGather;
}
namespace avx2 {
extern const Gather kGather;
}
namespace avx512 {
extern const Gather kGather;
}
namespace neon {
extern const Gather kGather;
}

}  // namespace fastgrpo
