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
  // out[i] = sum[i], or with `add` out[i] + sum[i], rounded to the DType of out.
  void (*put[3])(const float* sum, void* out, int64_t n, bool add);
  // x as fp32.
  void (*widen[3])(const void* x, float* out, int64_t n);
  // The number of x[i], with `magnitude` of |x[i]|, that are not below `least`: NaN never is.
  int64_t (*count[3])(const void* x, int64_t n, bool magnitude, float least);
  // Their indices, in their order, to `found`, which has room for n; their number.
  int64_t (*find[3])(const void* x, int64_t n, bool magnitude, float least, int32_t* found);
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
