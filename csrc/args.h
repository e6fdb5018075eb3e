// What a call on rows of logits is told, by both libraries. fastgrpo/backends/native.py mirrors it field by field.
//
// Rows are r = b*tokens + t; vectors per row are contiguous. A field that a function does not name is not read, but
// for a mask by CUDA's row_grad: rows outside of it get zeroes.
//   row_stats   reads  logits, softcap, ids, mask, inv_temperature                      writes logp, lse, entropy
//   row_grad    reads  logits, softcap, ids, inv_temperature, logp, lse, entropy, g, h  writes out
//   token_loss  reads  what row_stats reads, the rows and scalars of the objective
//               writes loss, logp, lse, entropy, kl, ratio, g, and out if there is one
// Null pointers: entropy (not wanted), h, out, and the optional rows of the objective.
// token_loss writes advantages, too, where it is given rewards.

#pragma once

#include <stddef.h>
#include <stdint.h>

#include "objective.h"

#ifdef _WIN32
#define FASTGRPO_API extern "C" __declspec(dllexport)
#else
#define FASTGRPO_API extern "C" __attribute__((visibility("default")))
#endif

// Goes up with every change of an interface; the loader compares it, and the fields of the struct.
#define FASTGRPO_ABI 10

namespace fastgrpo {
enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
using Strides = int64_t[2];  // of b and of t, in elements
}  // namespace fastgrpo

// FASTGRPO_ARGS(F) is F(type, name) of every field.
#define FASTGRPO_ARGS(F)                                                                                          \
  F(int64_t, batch)                                                                                               \
  F(int64_t, tokens)                                                                                              \
  F(int64_t, vocab)                                                                                               \
  F(fastgrpo::Strides, logits_stride)                                                                             \
  F(fastgrpo::Strides, out_stride)                                                                                \
  F(int32_t, dtype)                                                                                               \
  F(int32_t, out_dtype) /* that of the logits, or, where those are fp32, bf16 or fp16 */                          \
  F(int32_t, scale_by_std)                                                                                        \
  F(int32_t, skip_zero)                                                                                           \
  F(float, softcap) /* logits are softcap * tanh(logit / softcap); inf: as they are */                            \
  F(fastgrpo::ObjectiveSpec, spec)                                                                                \
  F(int64_t, group_size)                                                                                          \
  F(int64_t, sequences) /* of rewards */                                                                          \
  F(const void*, logits)                                                                                          \
  F(void*, out) /* another tensor, logits itself, or where narrower: the second half of its rows */               \
  F(const int64_t*, ids)                                                                                          \
  F(const uint8_t*, mask)                                                                                         \
  F(const float*, inv_temperature)                                                                                \
  F(const float*, weight)                                                                                         \
  F(float*, advantages) /* of every row; with rewards, those of every sequence, which the call works out first */ \
  F(const float*, rewards)                                                                                        \
  F(const int32_t*, seq) /* the sequence of every row, with rewards */                                            \
  F(const float*, old)                                                                                            \
  F(const float*, ref)                                                                                            \
  F(const float*, policy_scale)                                                                                   \
  F(const float*, h)                                                                                              \
  F(float*, loss)                                                                                                 \
  F(float*, logp)                                                                                                 \
  F(float*, lse)                                                                                                  \
  F(float*, entropy)                                                                                              \
  F(float*, kl)                                                                                                   \
  F(float*, ratio)                                                                                                \
  F(float*, g)

struct FastgrpoArgs {
  FASTGRPO_ARGS(FASTGRPO_FIELD)
};

// A field of FastgrpoArgs as the loader compares it with its own; the last one has no name.
struct FastgrpoField {
  const char* name;
  int64_t offset, size;
};

#define FASTGRPO_ARGS_ENTRY(type, name) {#name, offsetof(FastgrpoArgs, name), sizeof(type)},
#define FASTGRPO_SPEC_ENTRY(type, name) \
  {"spec." #name, offsetof(FastgrpoArgs, spec) + offsetof(fastgrpo::ObjectiveSpec, name), sizeof(type)},

namespace fastgrpo {
constexpr FastgrpoField kArgsFields[] = {FASTGRPO_ARGS(FASTGRPO_ARGS_ENTRY)
                                             FASTGRPO_SPEC(FASTGRPO_SPEC_ENTRY){nullptr, 0, 0}};
}  // namespace fastgrpo
