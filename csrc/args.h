// What a call on rows of logits is told, by both libraries. fastgrpo/backends/native.py mirrors it field by field.
//
// Rows are r = b*tokens + t; vectors per row are contiguous. A field that a function does not name is not read.
//   row_stats   reads  logits, softcap, ids, mask, inv_temperature                      writes logp, lse, entropy
//   row_grad    reads  logits, softcap, ids, inv_temperature, lse, entropy, g, h        writes out
//   token_loss  reads  what row_stats reads, the rows and scalars of the objective
//               writes loss, logp, lse, entropy, kl, ratio, g, and out if there is one
// Null pointers: entropy (not wanted), h, out, and the optional rows of the objective.

#pragma once

#include <stdint.h>

#include "objective.h"

#ifdef _WIN32
#define FASTGRPO_API extern "C" __declspec(dllexport)
#else
#define FASTGRPO_API extern "C" __attribute__((visibility("default")))
#endif

// Goes up with every change of an interface; the loader compares it, and the size of the struct.
#define FASTGRPO_ABI 4

namespace fastgrpo {
enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
}

struct FastgrpoArgs {
  int64_t batch, tokens, vocab;
  int64_t logits_stride[2], out_stride[2];  // of b and of t, in elements
  int32_t dtype, scale_by_std, skip_zero;
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
