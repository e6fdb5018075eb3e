// The C interface of libfastgrpo_cpu. fastgrpo/backends/cpu.py mirrors FastgrpoCpuArgs field by field.
//
// Rows are r = b*tokens + t; vectors per row are contiguous. A field that a function does not name is not read.
//   row_stats   reads  logits, softcap, ids, mask, inv_temperature                      writes logp, lse, entropy
//   row_grad    reads  logits, softcap, ids, inv_temperature, lse, entropy, g, h        writes out
//   token_loss  reads  what row_stats reads, the rows and scalars of the objective
//               writes loss, logp, lse, entropy, kl, ratio, g, and out if there is one
// Null pointers: entropy (not wanted), h, out, and the optional rows of the objective.

#pragma once

#include <stdint.h>

#include "../objective.h"

#ifdef _WIN32
#define FASTGRPO_API extern "C" __declspec(dllexport)
#else
#define FASTGRPO_API extern "C" __attribute__((visibility("default")))
#endif

struct FastgrpoCpuArgs {
  int64_t batch, tokens, vocab;
  int64_t logits_stride[2], out_stride[2];  // of b and of t, in elements
  int32_t isa, dtype, threads, scale_by_std, skip_zero;
  float softcap;  // logits are softcap * tanh(logit / softcap); 0: as they are
  fastgrpo::ObjectiveSpec spec;
  int64_t group_size;

  const void* logits;
  void* out;  // another tensor, or logits itself
  const int64_t* ids;
  const uint8_t* mask;
  const float* inv_temperature;

  const float *weight, *advantages, *rewards;
  const int32_t* seq;
  const float *old_logps, *ref_logps, *policy_scale, *h;

  float *loss, *logp, *lse, *entropy, *kl, *ratio, *g;
};

// Goes up with every change of what stands above; the loader compares it, and the size of the struct.
#define FASTGRPO_CPU_ABI 2

FASTGRPO_API int32_t fastgrpo_cpu_abi(void);
FASTGRPO_API int64_t fastgrpo_cpu_args_size(void);

// The value for FastgrpoCpuArgs.isa: of the best instruction set when name is null or empty; -1 for a name that this
// library does not hold, -2 for one that this CPU cannot run.
FASTGRPO_API int32_t fastgrpo_cpu_isa(const char* name);
// The names of what this library holds and this CPU runs, best first, separated by commas.
FASTGRPO_API const char* fastgrpo_cpu_isa_names(void);

FASTGRPO_API void fastgrpo_cpu_row_stats(const FastgrpoCpuArgs* args);
FASTGRPO_API void fastgrpo_cpu_row_grad(const FastgrpoCpuArgs* args);
FASTGRPO_API void fastgrpo_cpu_token_loss(const FastgrpoCpuArgs* args);

// Asks for large pages where a new buffer is about to be written: mapped page by page, small ones cost several times
// as much as the writing. Does nothing where the system has no such thing.
FASTGRPO_API void fastgrpo_cpu_prefer_large_pages(void* buffer, int64_t bytes);
