// The advantage of each sequence in its group, before the rows that read it: one thread a sequence.

#include "kernels.h"
#include "launch.h"
#include "rows.h"

namespace fastgrpo {
namespace {

FASTGRPO_KERNEL(kWorkers, 1)
advantages_kernel(const FastgrpoArgs a) {
  const int64_t s = (int64_t)block_index() * kWorkers + thread_index();
  if (s >= a.sequences) return;
  global_store(a.advantages + s, group_advantage(a.rewards, s, a.group_size, a.scale_by_std != 0));
}

}  // namespace

cudaError_t advantages_of_groups(const FastgrpoArgs& args, cudaStream_t stream) {
  const int64_t blocks = (args.sequences + kWorkers - 1) / kWorkers;
  return launch(advantages_kernel, {blocks, kWorkers, 0, 0, stream}, args);
}

}  // namespace fastgrpo
