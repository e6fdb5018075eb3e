// The C interface of libfastgrpo_cpu, called by fastgrpo/backends/cpu.py.

#pragma once

#include <stdint.h>

#include <new>
#include <stdexcept>

#include "../args.h"

// A call with an int32_t result returns 0 or an error, which fastgrpo_cpu_error names; its results are then
// unfinished.
#define FASTGRPO_NO_MEMORY 1
#define FASTGRPO_FAILED 2

FASTGRPO_API int32_t fastgrpo_cpu_abi(void);
FASTGRPO_API const FastgrpoField* fastgrpo_cpu_fields(void);
FASTGRPO_API const char* fastgrpo_cpu_error(int32_t error);

// The number of an instruction set: of the best one when name is null or empty; -1 for a name that this library does
// not hold, -2 for one that this CPU cannot run.
FASTGRPO_API int32_t fastgrpo_cpu_isa(const char* name);
// The names of what this library holds and this CPU runs, best first, separated by commas.
FASTGRPO_API const char* fastgrpo_cpu_isa_names(void);

// isa: from fastgrpo_cpu_isa. threads: how many may be used, the calling one included.
FASTGRPO_API int32_t fastgrpo_cpu_row_stats(const FastgrpoArgs* args, int32_t isa, int32_t threads);
FASTGRPO_API int32_t fastgrpo_cpu_row_grad(const FastgrpoArgs* args, int32_t isa, int32_t threads);
FASTGRPO_API int32_t fastgrpo_cpu_token_loss(const FastgrpoArgs* args, int32_t isa, int32_t threads);

// out (M, N) = a (M, K) @ b (K, N) (+ bias (N), fp32), or += with `add`.
struct FastgrpoMatmul {
  int64_t M, N, K;
  int64_t a_stride[2], b_stride[2], out_stride;  // in elements; out's second is 1
  int32_t dtype, out_dtype;                      // of a and b; of out: fp32, or that of a and b
  int32_t add;
  const void *a, *b;
  const float* bias;
  void* out;
};
FASTGRPO_API int32_t fastgrpo_cpu_matmul(const FastgrpoMatmul* args, int32_t isa, int32_t threads);

// row_stats of the rows of a product in fp32 (its `out` is not used), which is never written to memory: `rows` names
// softcap, ids, mask and inv_temperature.
FASTGRPO_API int32_t fastgrpo_cpu_head_stats(const FastgrpoMatmul* product, const FastgrpoArgs* rows, int32_t isa,
                                             int32_t threads);

// A few columns of each of N rows: ids (N, width), of which -1 is none.
//   column_logits    reads  hidden, weight, bias, ids               writes values (N, width), -inf where there is none
//   column_d_hidden  reads  weight, ids, values                     writes out (N, H)
//   column_d_weight  reads  hidden, values, ids, rows of N pairs    adds to out (V, H) and d_bias
//   select_columns   reads  tolerance, and of its rows what row_grad reads
//                    writes count; more than width: all columns have to do. And found, values, of (N, width) what lies
//                    before the largest count that is not
struct FastgrpoColumns {
  int64_t N, width, H, V;
  int64_t hidden_stride, weight_stride, out_stride;  // between rows, in elements
  int32_t dtype, out_dtype;                          // of hidden and weight; of out: fp32, or the same
  double tolerance;
  const void *hidden, *weight;
  const float* bias;
  const int32_t *ids, *rows;
  float* values;
  void* out;
  float* d_bias;
  int32_t *found, *count;
};
FASTGRPO_API int32_t fastgrpo_cpu_column_logits(const FastgrpoColumns* args, int32_t isa, int32_t threads);
FASTGRPO_API int32_t fastgrpo_cpu_column_d_hidden(const FastgrpoColumns* args, int32_t isa, int32_t threads);
FASTGRPO_API int32_t fastgrpo_cpu_column_d_weight(const FastgrpoColumns* args, int32_t isa, int32_t threads);
FASTGRPO_API int32_t fastgrpo_cpu_select_columns(const FastgrpoColumns* args, const FastgrpoArgs* rows, int32_t isa,
                                                 int32_t threads);

// Asks for large pages where a new buffer is about to be written: mapped page by page, small ones cost several times
// as much as the writing. Does nothing where the system has no such thing.
FASTGRPO_API void fastgrpo_cpu_prefer_large_pages(void* buffer, int64_t bytes);

namespace fastgrpo {

// Calls f and gives the error of what it throws: no exception may leave a function of this interface.
template <class F>
int32_t error_of(F f) noexcept {
  try {
    f();
    return 0;
  } catch (const std::bad_alloc&) {
    return FASTGRPO_NO_MEMORY;
  } catch (const std::length_error&) {  // more than a vector can hold
    return FASTGRPO_NO_MEMORY;
  } catch (...) {
    return FASTGRPO_FAILED;
  }
}

}  // namespace fastgrpo
