// One planted fault each, and the same kernel without it. 64 threads a block; out[i] = in[i ^ what the test says].

#include "launch.h"

#ifndef FASTGRPO_MACHINE
#define FASTGRPO_MACHINE "ptx.h"
#endif
#include FASTGRPO_MACHINE

namespace fastgrpo {

struct Pair {
  const float* in;
  float* out;
};

constexpr int kBytes = 1024;  // shared memory: the data, then a barrier and what else a kernel needs
constexpr uint32_t kBarrierAt = 512, kMore = 528;

FASTGRPO_DEVICE float input(const Pair& a) { return global_load(a.in + block_index() * 64 + thread_index()); }
FASTGRPO_DEVICE void output(const Pair& a, float x) { global_store(a.out + block_index() * 64 + thread_index(), x); }
FASTGRPO_DEVICE float exchanged(int flip) { return shared_load<float>((uint32_t)(thread_index() ^ flip) * 4); }
FASTGRPO_DEVICE void put(float x) { shared_store<float>(thread_index() * 4, x); }

#define CASE(name, cluster)                                                                \
  template <bool fault>                                                                    \
  FASTGRPO_KERNEL(64, 1)                                                                   \
  name##_kernel(const Pair a);                                                             \
  extern "C" int name(int fault, const float* in, float* out) {                            \
    const Launch how = {cluster, 64, cluster, kBytes, nullptr};                            \
    return launch(fault ? name##_kernel<true> : name##_kernel<false>, how, Pair{in, out}); \
  }                                                                                        \
  template <bool fault>                                                                    \
  FASTGRPO_KERNEL(64, 1)                                                                   \
  name##_kernel(const Pair a)

// ---- threads that do not meet

CASE(missing_arrival, 1) {
  put(input(a));
  if (!fault || thread_index() < 32) sync_threads(0, 64);
  output(a, exchanged(fault ? 0 : 33));
}

CASE(divergent_warp, 1) {
  put(input(a));
  if (fault && thread_index() % 32 < 16) {
    (void)warp_sum(1);
  } else {
    sync_warp();
  }
  output(a, exchanged(1));
}

CASE(divergent_threads, 1) {
  put(input(a));
  if (!fault || thread_index() % 2) {
    sync_threads(1, fault ? 32 : 64);
  } else {
    sync_threads(2, 32);
  }
  output(a, exchanged(33));
}

CASE(exited_lane, 1) {
  put(input(a));
  if (fault && thread_index() == 5) return;
  sync_warp();
  output(a, exchanged(1));
}

CASE(unequal_counts, 1) {
  put(input(a));
  sync_threads(3, fault && thread_index() >= 32 ? 32 : 64);
  output(a, exchanged(33));
}

CASE(exited_block, 2) {
  put(input(a));
  if (fault && block_index() == 1) return;
  cluster_sync();
  output(a, exchanged(33));
}

// ---- places

CASE(unwritten, 1) {
  if (!fault || thread_index() != 7) put(input(a));
  sync_threads(0, 64);
  output(a, exchanged(33));
}

CASE(shared_bounds, 1) {
  const uint32_t at = kBytes - 256 + thread_index() * 4 + (fault ? 4 : 0);
  shared_store<float>(at, input(a));
  output(a, shared_load<float>(at));
}

CASE(global_bounds, 1) { output(a, global_load(a.in + thread_index() + (fault ? 1 : 0))); }

CASE(misaligned, 1) {
  put(input(a));
  sync_threads(0, 64);
  const Vec v = shared_load<Vec>((thread_index() & ~3) * 4 + (fault ? 8 : 0));
  output(a, as_float(v.w[(thread_index() & 3) ^ 1]));
}

// ---- order

CASE(write_read_race, 1) {
  put(input(a));
  if (fault) {
    sync_warp();
  } else {
    sync_threads(0, 64);
  }
  output(a, exchanged(33));
}

CASE(read_write_race, 1) {
  put(input(a));
  sync_threads(0, 64);
  const float x = exchanged(33);
  if (!fault) sync_threads(0, 64);
  put(x);
  output(a, x);
}

CASE(write_write_race, 1) {
  shared_store<float>((thread_index() ^ 33) * 4, 1);
  if (!fault) sync_threads(0, 64);
  put(input(a));
  output(a, exchanged(0));
}

CASE(reduction_is_no_sync, 1) {
  put(input(a));
  (void)warp_max(thread_index());
  if (!fault) sync_warp();
  output(a, exchanged(1));
}

// Lane i takes what lane i ^ 1 has in shared memory, by registers alone and past the memory's order.
CASE(shuffle_is_no_sync, 1) {
  put(input(a));
  const float x = warp_across(input(a), 1);
  if (!fault) sync_warp();
  output(a, fault ? exchanged(1) : x);
}

CASE(divergent_shuffle, 1) {
  float x = input(a);
  if (!fault || thread_index() % 32 < 16) x = warp_across(x, 1);  // lanes of parts alone, as it were
  output(a, x);
}

CASE(foreign_lane, 1) { output(a, warp_from(input(a), (thread_index() % 32 ^ 1) + (fault ? 1 : 0))); }

CASE(shared_readers, 1) {
  if (thread_index() < 32) put(input(a));
  sync_threads(0, 64);
  const float x = exchanged(thread_index() & 32);  // both warps read what warp 0 wrote
  if (!fault || thread_index() >= 32) sync_threads(0, 64);
  if (thread_index() < 32) put(0);
  if (fault && thread_index() < 32) sync_threads(0, 64);
  output(a, thread_index() < 32 ? x : input(a));
}

// ---- barriers

FASTGRPO_DEVICE void make_barrier(int arrivals) {
  if (thread_index() == 0) barrier_init(kBarrierAt, arrivals);
  sync_threads(0, 64);
}

CASE(lost_arrival, 1) {
  make_barrier(2);
  put(input(a));
  sync_warp();
  if (thread_index() == 0 || (!fault && thread_index() == 32)) barrier_arrive(kBarrierAt);
  barrier_wait(kBarrierAt, 0);
  output(a, exchanged(33));
}

CASE(too_many_arrivals, 1) {
  make_barrier(2);
  put(input(a));
  sync_warp();
  if (fault && thread_index() == 0) barrier_expect(kBarrierAt, 16);
  if (thread_index() % 32 == 0) barrier_arrive(kBarrierAt);
  barrier_wait(kBarrierAt, 0);
  output(a, exchanged(33));
}

CASE(arrival_before_write, 1) {
  make_barrier(64);
  if (!fault) put(input(a));
  barrier_arrive(kBarrierAt);
  if (fault) put(input(a));
  barrier_wait(kBarrierAt, 0);
  output(a, exchanged(33));
}

CASE(no_barrier, 1) {
  if (!fault) make_barrier(64);
  put(input(a));
  barrier_arrive(kBarrierAt);
  barrier_wait(kBarrierAt, 0);
  output(a, exchanged(33));
}

CASE(unseen_barrier, 1) {
  if (thread_index() == 0) barrier_init(kBarrierAt, 64);
  if (!fault) sync_threads(0, 64);
  sync_warp();
  put(input(a));
  barrier_arrive(kBarrierAt);
  barrier_wait(kBarrierAt, 0);
  output(a, exchanged(33));
}

CASE(overwritten_barrier, 1) {
  make_barrier(64);
  put(input(a));
  if (thread_index() == 9) shared_store<float>(fault ? kBarrierAt + 4 : kBarrierAt + 8, 1);
  barrier_arrive(kBarrierAt);
  barrier_wait(kBarrierAt, 0);
  output(a, exchanged(33));
}

// ---- asynchronous copies

FASTGRPO_DEVICE void load_all(const Pair& a, uint32_t bytes = 256) {
  if (thread_index() == 0) {
    barrier_expect(kBarrierAt, bytes);
    bulk_load(0, a.in, 256, kBarrierAt, cache_policy(true));
  }
}

CASE(load_not_awaited, 1) {
  make_barrier(1);
  load_all(a);
  if (!fault) barrier_wait(kBarrierAt, 0);
  output(a, exchanged(33));
  sync_threads(0, 64);
}

CASE(load_awaited_by_another, 1) {
  make_barrier(1);
  load_all(a);
  if (!fault || thread_index() < 32) barrier_wait(kBarrierAt, 0);
  if (fault && thread_index() == 0) barrier_expect(kBarrierAt, 0);
  if (fault && thread_index() >= 32) barrier_wait(kBarrierAt, 1);  // the phase before the first: acquires nothing
  output(a, exchanged(33));
}

CASE(wrong_bytes, 1) {
  make_barrier(1);
  load_all(a, fault ? 272 : 256);
  barrier_wait(kBarrierAt, 0);
  output(a, exchanged(33));
}

CASE(load_over_readers, 1) {
  make_barrier(1);
  put(input(a));
  fence_async();
  sync_threads(0, 64);
  const float x = exchanged(33);
  if (!fault) sync_threads(0, 64);
  load_all(a);
  barrier_wait(kBarrierAt, 0);
  output(a, x);
}

CASE(load_over_unfenced, 1) {
  make_barrier(1);
  put(input(a));
  if (!fault) fence_async();
  sync_threads(0, 64);
  load_all(a);
  barrier_wait(kBarrierAt, 0);
  output(a, exchanged(33));
}

CASE(misaligned_load, 1) {
  make_barrier(1);
  if (thread_index() == 0) {
    barrier_expect(kBarrierAt, 256);
    bulk_load(fault ? 8 : 0, a.in, 256, kBarrierAt, cache_policy(true));
  }
  barrier_wait(kBarrierAt, 0);
  output(a, exchanged(33));
}

CASE(policy_of_nobody, 1) {
  make_barrier(1);
  if (thread_index() == 0) {
    barrier_expect(kBarrierAt, 256);
    bulk_load(0, a.in, 256, kBarrierAt, fault ? 1 : cache_policy(false));
  }
  barrier_wait(kBarrierAt, 0);
  output(a, exchanged(33));
}

CASE(load_bounds, 1) {
  make_barrier(1);
  if (thread_index() == 0) {
    barrier_expect(kBarrierAt, 256);
    bulk_load(0, a.in + (fault ? 4 : 0), 256, kBarrierAt, cache_policy(true));
  }
  barrier_wait(kBarrierAt, 0);
  output(a, exchanged(33));
}

CASE(missing_fence, 1) {
  shared_store<float>((thread_index() ^ 33) * 4, input(a));
  if (!fault || thread_index() != 40) fence_async();
  sync_threads(0, 64);
  if (thread_index() == 0) {
    bulk_store(a.out, 0, 256, cache_policy(true));
    bulk_wait_read();
  }
}

CASE(fence_before_write, 1) {
  if (fault) fence_async();
  shared_store<float>((thread_index() ^ 33) * 4, input(a));
  if (!fault) fence_async();
  sync_threads(0, 64);
  if (thread_index() == 0) {
    bulk_store(a.out, 0, 256, cache_policy(true));
    bulk_wait_read();
  }
}

CASE(store_source_reused, 1) {
  put(input(a));
  fence_async();
  sync_threads(0, 64);
  if (thread_index() == 0) bulk_store(a.out, 0, 256, cache_policy(true));
  if (thread_index() == 0 && !fault) bulk_wait_read();
  sync_threads(0, 64);
  put(0);
  if (thread_index() == 0 && fault) bulk_wait_read();
}

CASE(store_not_awaited, 1) {
  put(input(a));
  fence_async();
  sync_threads(0, 64);
  if (thread_index() == 0) bulk_store(a.out, 0, 256, cache_policy(true));
  if (thread_index() == 0 && !fault) bulk_wait_read();
}

// ---- clusters

FASTGRPO_DEVICE void send(int rank, float x) { remote_store(kMore, kBarrierAt, rank, Vec{{as_bits(x), 0, 0, 0}}); }

// Two blocks swap their input's thread 0 and 32, by one store each; the rest keep theirs.
template <bool initialised, bool synced, bool wide>
FASTGRPO_DEVICE void swap_first(const Pair& a) {
  const float x = input(a);
  if (initialised || cluster_rank() == 0) make_barrier(1);
  if (synced) cluster_sync();
  if (thread_index() == 0) {
    if (initialised || cluster_rank() == 0) barrier_expect(kBarrierAt, 16);
    send(cluster_rank() ^ 1, x);
  }
  if (wide) {
    barrier_wait_cluster(kBarrierAt, 0);
  } else {
    barrier_wait(kBarrierAt, 0);
  }
  const float y = as_float(shared_load<Vec>(kMore).w[0]);
  output(a, thread_index() == 0 ? y : x);
  cluster_sync();
}

CASE(remote_uninitialised, 2) { swap_first<!fault, true, true>(a); }
CASE(remote_unsynced, 2) { swap_first<true, !fault, true>(a); }
CASE(remote_wait_scope, 2) { swap_first<true, true, !fault>(a); }

CASE(remote_to_exited, 2) {
  output(a, input(a));
  make_barrier(1);
  cluster_sync();
  if (thread_index() == 0 && cluster_rank() == 0) send(1, 1);
  if (cluster_rank() == 1 && thread_index() == 0) {
    barrier_expect(kBarrierAt, 16);
    if (!fault) barrier_wait_cluster(kBarrierAt, 0);
  }
}

// Two messages into the same place: the second one takes an answer to the first.
CASE(remote_place_reused, 2) {
  output(a, input(a));
  make_barrier(1);
  cluster_sync();
  for (int turn = 0; turn < 2; turn++) {
    if (cluster_rank() == 1 && thread_index() < 32) {
      if (thread_index() == 0) barrier_expect(kBarrierAt, 16);
      barrier_wait_cluster(kBarrierAt, turn);
      (void)shared_load<Vec>(kMore);
      sync_warp();
      if (thread_index() == 0 && (!fault || turn == 1)) send(0, 1);
    }
    if (cluster_rank() == 0 && thread_index() == 0) {
      send(1, 1);
      if (!fault || turn == 1) {
        barrier_expect(kBarrierAt, 16);
        barrier_wait_cluster(kBarrierAt, fault ? 0 : turn);
      }
    }
  }
  sync_warp();
  cluster_sync();
}

// ---- global memory

CASE(global_write_read_race, 1) {
  output(a, input(a));
  if (!fault) sync_threads(0, 64);
  (void)global_load(a.out + (thread_index() ^ 33));
}

CASE(global_read_write_race, 1) {
  (void)global_load(a.out + (thread_index() ^ 33));
  if (!fault) sync_threads(0, 64);
  output(a, input(a));
}

CASE(narrow_stores_race, 1) {  // in the same 16 bytes, and in the same 2
  const float x = input(a);
  uint16_t* const to = (uint16_t*)a.out + 2 * thread_index();
  global_store(to, (uint16_t)as_bits(x));
  global_store(to + 1, (uint16_t)(as_bits(x) >> 16));
  if (fault && thread_index() == 40) global_store(to + 3, (uint16_t)0);
}

// Block 1's copy of what block 0 writes.
template <bool fault, class F>
FASTGRPO_DEVICE void overwrite_loaded(const Pair& a, F between) {
  make_barrier(1);
  if (block_index() + 1 == block_count()) {
    if (thread_index() == 0) {
      barrier_expect(kBarrierAt, 256);
      bulk_load(0, a.out, 256, kBarrierAt, cache_policy(true));
    }
    if (!fault) barrier_wait(kBarrierAt, 0);
  }
  between();
  output(a, input(a));
  if (fault && block_index() + 1 == block_count()) barrier_wait(kBarrierAt, 0);
}

CASE(store_over_load, 1) {
  overwrite_loaded<fault>(a, [] {});
}

CASE(store_over_load_of_another_block, 2) {
  overwrite_loaded<fault>(a, [] { cluster_sync(); });
}

CASE(store_after_bulk_store, 1) {
  put(input(a));
  fence_async();
  sync_threads(0, 64);
  if (thread_index() == 0) {
    bulk_store(a.out, 0, 128, cache_policy(true));
    bulk_wait_read();  // the source is read; nobody knows when the last byte is written
  }
  sync_threads(0, 64);
  if (fault || thread_index() >= 32) output(a, input(a));
}

}  // namespace fastgrpo
