// What api.cu launches.

#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "api.h"

namespace fastgrpo {

using OnePass = FastgrpoOnePass;
using OnePassShape = FastgrpoOnePassShape;

inline bool wants_entropy(const FastgrpoArgs& args) { return args.entropy != nullptr; }

// The dtype of gradients: that of the logits, or a narrower one where these are fp32.
inline int32_t out_dtype(const FastgrpoArgs& args) { return args.dtype == kFloat32 ? args.out_dtype : args.dtype; }

// Which kernel passes once over rows like these.
struct OnePassKernel {
  int32_t dtype, out_dtype;
  bool entropy;
};

inline OnePassKernel one_pass_kernel_for(const FastgrpoArgs& args) {
  return {args.dtype, out_dtype(args), wants_entropy(args)};
}

// args.advantages of every sequence, from args.rewards. sm_80.
cudaError_t advantages_of_groups(const FastgrpoArgs& args, cudaStream_t stream);

// row_stats when args.loss is null, else token_loss; writes args.out if there is one. sm_90.
// The shape is of the fewest blocks that have room, where the choice leaves it open; its cluster is 0 where none have.
// shared_limit: bytes that a block may have.
OnePassShape one_pass_shape(int32_t dtype, int64_t vocab, const OnePass& choice, int shared_limit);
// Once per device and kernel, before the others: lets blocks have so much shared memory, and clusters be as large as
// they can.
cudaError_t one_pass_prepare(const OnePassKernel& which, int shared_limit);
// How many clusters the current device holds at once; 0: it cannot run one.
cudaError_t one_pass_clusters(const OnePassKernel& which, const OnePassShape& shape, int& clusters);
cudaError_t one_pass(const FastgrpoArgs& args, const OnePassShape& shape, cudaStream_t stream);

// The same without args.out, and row_grad, which also serves token_loss: with a mask, it zeroes what is outside of it.
// sm_80.
cudaError_t stats(const FastgrpoArgs& args, cudaStream_t stream);
cudaError_t grad(const FastgrpoArgs& args, cudaStream_t stream);
// args.logits *= *args.weight.
cudaError_t scale(const FastgrpoArgs& args, int multiprocessors, cudaStream_t stream);
// Whether the library holds code for the current device.
cudaError_t loadable();

}  // namespace fastgrpo
