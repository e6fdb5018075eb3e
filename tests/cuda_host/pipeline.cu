// A small pipeline as self-test: y = x + the sum of x's row, with the asynchronous machinery of the real kernels.
// A cluster per row, a slice of it per block, in tiles through three buffers: once to add up, once to rewrite.

#include "launch.h"

#ifndef FASTGRPO_MACHINE
#define FASTGRPO_MACHINE "ptx.h"
#endif
#include FASTGRPO_MACHINE

namespace fastgrpo {

struct Rows {
  const float* x;
  float* y;
  int64_t rows;
  int tiles;  // of a slice
  int tile_bytes;
};

constexpr int kBuffers = 3, kConsumers = 256;
constexpr uint32_t kFull = 0, kReady = 32, kPartners = 64, kPartials = 96, kSlots = 128, kTiles = 640;

FASTGRPO_DEVICE int64_t tile_start(const Rows& a, int64_t row, int tile) {
  return ((row * cluster_size() + cluster_rank()) * a.tiles + tile) * (a.tile_bytes / 4);
}

FASTGRPO_DEVICE void produce(const Rows& a, int64_t first, int64_t step) {
  const uint64_t policy = cache_policy(true);
  uint32_t use = 0;
  int64_t previous[kBuffers] = {-1, -1, -1};  // where the buffer's contents go
  for (int64_t row = first; row < a.rows; row += step) {
    for (int pass = 0; pass < 2; pass++) {
      for (int tile = 0; tile < a.tiles; tile++, use++) {
        const int buffer = use % kBuffers;
        const uint32_t at = kTiles + buffer * a.tile_bytes;
        if (use >= kBuffers) barrier_wait(kReady + buffer * 8, (use / kBuffers - 1) & 1);
        if (previous[buffer] >= 0) {
          bulk_store(a.y + previous[buffer], at, a.tile_bytes, policy);
          bulk_wait_read();
        }
        const int64_t start = tile_start(a, row, tile);
        previous[buffer] = pass ? start : -1;
        barrier_expect(kFull + buffer * 8, a.tile_bytes);
        bulk_load(at, a.x + start, a.tile_bytes, kFull + buffer * 8, policy);
      }
    }
  }
  const uint32_t left = use < kBuffers ? use : kBuffers;
  for (uint32_t last = use - left; last < use; last++) {
    const int buffer = last % kBuffers;
    barrier_wait(kReady + buffer * 8, last / kBuffers & 1);
    const uint32_t at = kTiles + buffer * a.tile_bytes;
    if (previous[buffer] >= 0) bulk_store(a.y + previous[buffer], at, a.tile_bytes, policy);
  }
  bulk_wait_read();
}

FASTGRPO_DEVICE void consume(const Rows& a, int64_t first, int64_t step) {
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
  uint32_t use = 0;
  int turn = 0;
  for (int64_t row = first; row < a.rows; row += step, turn++) {
    int total = 0;
    for (int pass = 0; pass < 2; pass++) {
      for (int tile = 0; tile < a.tiles; tile++, use++) {
        const int buffer = use % kBuffers;
        barrier_wait(kFull + buffer * 8, use / kBuffers & 1);
        for (int i = thread * 16; i < a.tile_bytes; i += kConsumers * 16) {
          const uint32_t at = kTiles + buffer * a.tile_bytes + i;
          Vec v = shared_load<Vec>(at);
          for (int j = 0; j < 4; j++) {
            if (pass) {
              v.w[j] = as_bits(as_float(v.w[j]) + total);
            } else {
              total += (int)as_float(v.w[j]);
            }
          }
          if (pass) shared_store(at, v);
        }
        if (pass) fence_async();
        sync_warp();
        if (lane == 0) barrier_arrive(kReady + buffer * 8);
      }
      if (pass) continue;
      const uint32_t partners = kPartners + turn % 2 * 8, slots = kSlots + turn % 2 * 256;
      total = warp_sum(total);
      if (lane == 0) shared_store<int>(kPartials + warp * 4, total);
      sync_threads(1, kConsumers);
      if (warp == 0) {
        total = warp_sum(lane < 8 ? shared_load<int>(kPartials + lane * 4) : 0);
        sync_warp();
        if (lane == 0) barrier_expect(partners, cluster_size() * 16);
        if (lane < cluster_size()) {
          remote_store(slots + cluster_rank() * 16, partners, lane, Vec{{(uint32_t)total, 0, 0, 0}});
        }
      }
      barrier_wait_cluster(partners, turn / 2 & 1);
      total = 0;
      for (int rank = 0; rank < cluster_size(); rank++) total += (int)shared_load<Vec>(slots + rank * 16).w[0];
    }
  }
}

FASTGRPO_KERNEL(288, 1) pipeline_kernel(const Rows a) {
  if (thread_index() == 0) {
    for (int i = 0; i < kBuffers; i++) barrier_init(kFull + i * 8, 1);
    for (int i = 0; i < kBuffers; i++) barrier_init(kReady + i * 8, kConsumers / 32);
    for (int i = 0; i < 2; i++) barrier_init(kPartners + i * 8, 1);
  }
  cluster_sync();
  const int64_t first = block_index() / cluster_size(), step = block_count() / cluster_size();
  if (thread_index() < kConsumers) {
    consume(a, first, step);
  } else if (thread_index() == kConsumers) {
    produce(a, first, step);
  }
  sync_warp();
  cluster_sync();
}

extern "C" int pipeline(const float* x, float* y, int64_t rows, int cluster, int tiles, int tile_bytes) {
  Launch how = {cluster, 288, cluster, (int)kTiles + kBuffers * tile_bytes, nullptr};
  int clusters = 0;
  cudaError_t error = prepare(pipeline_kernel, how.shared_bytes);
  if (error == cudaSuccess) error = active_clusters(pipeline_kernel, how, clusters);
  if (error != cudaSuccess || clusters == 0) return cudaErrorInvalidConfiguration;
  how.blocks = (clusters < rows ? clusters : rows) * cluster;
  return launch(pipeline_kernel, how, Rows{x, y, rows, tiles, tile_bytes});
}

// A launch of any shape, prepared or not.
struct Nothing {};
FASTGRPO_KERNEL(32, 1) prepared_kernel(const Nothing) {}
FASTGRPO_KERNEL(32, 1) plain_kernel(const Nothing) {}

extern "C" int shape(int blocks, int threads, int cluster, int shared_bytes, int prepared) {
  const Launch how = {blocks, threads, cluster, shared_bytes, nullptr};
  if (!prepared) return launch(plain_kernel, how, Nothing());
  const cudaError_t error = prepare(prepared_kernel, 227 << 10);
  return error != cudaSuccess ? error : launch(prepared_kernel, how, Nothing());
}

// The pure functions, over pairs (a[i], b[i]).
extern "C" void numbers(int n, const float* a, const float* b, uint32_t* words, float* floats) {
  for (int i = 0; i < n; i++) {
    const uint32_t bf16[2] = {pack_bf16x2(a[i], b[i]), pack_bf16x2(b[i], a[i])};
    const uint32_t f16[2] = {pack_f16x2(a[i], b[i]), pack_f16x2(b[i], a[i])};
    const uint32_t results[] = {bf16[0], f16[0], max_bf16x2(bf16[0], bf16[1]), max_f16x2(f16[0], f16[1])};
    for (int j = 0; j < 4; j++) words[j * n + i] = results[j];
    unpack_f16x2(f16[0], floats[i], floats[n + i]);
    floats[2 * n + i] = max_f32(a[i], b[i]);
    floats[3 * n + i] = fast_exp2(a[i]);
  }
}

}  // namespace fastgrpo
