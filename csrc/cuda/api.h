// The C interface of libfastgrpo_cuda, for fastgrpo/backends/cuda.py. Calls only enqueue work on `stream` of `device`.
//
// A call returns 0 or an error, which fastgrpo_cuda_error names. Calls of zero rows or no vocabulary are not for it.
// cluster: blocks that hold a row together; 0: by its length; -1: none, two passes.

#pragma once

#include "args.h"

FASTGRPO_API int32_t fastgrpo_cuda_abi(void);
FASTGRPO_API int64_t fastgrpo_cuda_args_size(void);
FASTGRPO_API const char* fastgrpo_cuda_error(int32_t error);

// Null, or why no device here can run the kernels.
FASTGRPO_API const char* fastgrpo_cuda_unavailable(void);
// Null, or why this device cannot.
FASTGRPO_API const char* fastgrpo_cuda_device_unavailable(int32_t device);
// Blocks that would hold a row together in token_loss and row_stats; 0: none can, and token_loss reads it twice.
FASTGRPO_API int32_t fastgrpo_cuda_cluster(int32_t dtype, int64_t vocab, int32_t device);

FASTGRPO_API int32_t fastgrpo_cuda_row_stats(const FastgrpoArgs* args, int32_t device, void* stream, int32_t cluster);
FASTGRPO_API int32_t fastgrpo_cuda_row_grad(const FastgrpoArgs* args, int32_t device, void* stream, int32_t cluster);
// With args->h, args->entropy must not be null.
FASTGRPO_API int32_t fastgrpo_cuda_token_loss(const FastgrpoArgs* args, int32_t device, void* stream, int32_t cluster);
// logits *= *weight; not touched when that is 1.
FASTGRPO_API int32_t fastgrpo_cuda_scale(const FastgrpoArgs* args, int32_t device, void* stream, int32_t cluster);
