// What api.cu launches.

#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include "args.h"

namespace fastgrpo {

// How a row is laid over a cluster: each block holds `slice` elements of it, in one of `buffers` buffers.
struct OnePassShape {
  int cluster;  // 0: no cluster holds such a row
  int slice;
  int buffers;
  int buffer_bytes;
  int shared_bytes;
};

// row_stats when args.loss is null, else token_loss; writes args.out if there is one. sm_90.
// cluster: blocks per cluster, or 0 for the smallest that has room; a shape with cluster 0: none has.
// shared_limit: bytes that a block may have.
OnePassShape one_pass_shape(int32_t dtype, int64_t vocab, int cluster, int shared_limit);
int one_pass_clusters(const FastgrpoArgs& args, const OnePassShape& shape);  // at once on the current device
cudaError_t one_pass(const FastgrpoArgs& args, const OnePassShape& shape, int clusters, cudaStream_t stream);

// The same without args.out, and row_grad, which also serves token_loss: with a mask, it zeroes what is outside of it,
// and with logps it takes these. sm_80.
cudaError_t stats(const FastgrpoArgs& args, cudaStream_t stream);
cudaError_t grad(const FastgrpoArgs& args, cudaStream_t stream);
// args.logits *= *args.weight.
cudaError_t scale(const FastgrpoArgs& args, cudaStream_t stream);
// Whether the library holds code for the current device.
cudaError_t loadable();

}  // namespace fastgrpo
