// The C interface of libfastgrpo_cuda, for fastgrpo/backends/cuda.py. Calls only enqueue work on `stream` of `device`.
//
// A call returns 0 or an error, which fastgrpo_cuda_error names. Calls of zero rows or no vocabulary are not for it.

#pragma once

#include "args.h"

// How token_loss and row_stats hold a row in shared memory. 0: chosen by the row's length.
struct FastgrpoOnePass {
  int32_t cluster;          // blocks that hold a row together: 1, 2, 4, 8 or 16; -1: none, two passes
  int32_t buffers;          // rows on their way through a block, 1 to 4
  int32_t blocks;           // of a multiprocessor at once, 1 or 2
  int32_t evict_first;      // 1: the L2 cache gives up the rows' lines before others; 0: as any line
  int32_t multiprocessors;  // as many blocks as these hold, so that the others are left to another stream; 0: all
};

// What comes of it.
struct FastgrpoOnePassShape {
  int32_t cluster;  // 0: rows like these take two passes, for `why`
  int32_t slice;    // elements of a row in a block
  int32_t buffers, buffer_bytes, shared_bytes;
  int32_t blocks, evict_first;
  int32_t clusters;  // at once
  const char* why;
};

// A choice that cannot run: fastgrpo_cuda_one_pass says why.
#define FASTGRPO_REFUSED (-1)

FASTGRPO_API int32_t fastgrpo_cuda_abi(void);
FASTGRPO_API const FastgrpoField* fastgrpo_cuda_fields(void);
FASTGRPO_API const char* fastgrpo_cuda_error(int32_t error);

// Null, or why no device here can run the kernels.
FASTGRPO_API const char* fastgrpo_cuda_unavailable(void);
// How token_loss, or row_stats, holds rows like these: dtype and vocab say, and where out is. Whether there is an
// entropy changes nothing but how many clusters run at once.
FASTGRPO_API int32_t fastgrpo_cuda_one_pass(const FastgrpoArgs* args, int32_t device, const FastgrpoOnePass* choice,
                                            FastgrpoOnePassShape* shape);

FASTGRPO_API int32_t fastgrpo_cuda_row_stats(const FastgrpoArgs* args, int32_t device, void* stream,
                                             const FastgrpoOnePass* choice);
FASTGRPO_API int32_t fastgrpo_cuda_row_grad(const FastgrpoArgs* args, int32_t device, void* stream,
                                            const FastgrpoOnePass*);
// With args->h, args->entropy must not be null.
FASTGRPO_API int32_t fastgrpo_cuda_token_loss(const FastgrpoArgs* args, int32_t device, void* stream,
                                              const FastgrpoOnePass* choice);
// logits *= *weight; not touched when that is 1.
FASTGRPO_API int32_t fastgrpo_cuda_scale(const FastgrpoArgs* args, int32_t device, void* stream,
                                         const FastgrpoOnePass*);
