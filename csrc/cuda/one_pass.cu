// Statistics, objective and gradient of a row in one pass: a cluster of blocks holds the row in its shared memory.
//
// Grid: as many clusters as the device holds at once, 288 threads a block, two blocks a multiprocessor (at most 96
// registers a thread, 113 KiB of shared memory a block); where three rows do not fit into that, one block and 227 KiB.
// Bytes moved per row: V logits in and, if a gradient is wanted, V out, by bulk copies; ends that are not whole 16
// bytes element by element. A ninth warp plans rows and moves them. Eight sweep: maximum, sums and, after one exchange
// of (top, sum, weighted, target) between blocks, the gradient over the logits; one narrower than its logits they
// store themselves, 4 elements at a time. lse is fp32, addresses 64-bit. Rows that are not scored are not read; they
// and rows whose g and h are 0 cost their zeroes.

#include "kernels.h"
#include "launch.h"
#include "rows.h"

namespace fastgrpo {
namespace {

constexpr int kThreads = kWorkers + 32;
constexpr int kMaxBuffers = 4;
constexpr int kMaxCluster = 16;
constexpr int kLine = 128;  // bytes of a cache line: copies begin at the same place of one on both sides

struct OnePassArgs {
  FastgrpoArgs a;
  OnePassShape shape;
};

// ---- shared memory, in bytes from its start

constexpr uint32_t kFull = 0;                             // per buffer: a row, or the end, is there
constexpr uint32_t kReady = kFull + 8 * kMaxBuffers;      // per buffer: the workers are done with it
constexpr uint32_t kExchange = kReady + 8 * kMaxBuffers;  // for every second row: all parts are there
constexpr uint32_t kTarget = kExchange + 16;              // for every second row: the target's logit
constexpr uint32_t kWarpSums = kTarget + 16;
constexpr uint32_t kParts = kWarpSums + kScratch;  // for every second row: (top, sum, weighted, target) by rank
constexpr uint32_t kGradient = kParts + 2 * 16 * kMaxCluster;
constexpr uint32_t kPlan = kGradient + sizeof(RowGradient);  // per buffer
constexpr uint32_t kBuffers = (kPlan + sizeof(Plan) * kMaxBuffers + kLine - 1) / kLine * kLine;

FASTGRPO_DEVICE uint32_t full(int buffer) { return kFull + 8 * buffer; }
FASTGRPO_DEVICE uint32_t ready(int buffer) { return kReady + 8 * buffer; }
FASTGRPO_DEVICE uint32_t plan_at(int buffer) { return kPlan + (uint32_t)sizeof(Plan) * buffer; }
FASTGRPO_DEVICE uint32_t buffer_at(const OnePassShape& shape, int buffer) {
  return kBuffers + shape.buffer_bytes * buffer;
}

// This block's slice of a row of `base`.
template <class E>
FASTGRPO_DEVICE Span<E> slice_of(const void* base, const int64_t (&stride)[2], const OnePassArgs& p, int64_t row) {
  const int vocab = (int)p.a.vocab, begin = min_of(cluster_rank() * p.shape.slice, vocab);
  const void* start = row_pointer(base, stride, p.a, row, sizeof(typename E::Bits));
  return Span<E>(start, begin, min_of(p.shape.slice, vocab - begin));
}

// Counts rows through the buffers.
struct Turn {
  int buffer = 0;
  uint32_t parity = 0;
  FASTGRPO_DEVICE void next(const OnePassShape& shape) {
    if (++buffer == shape.buffers) buffer = 0, parity ^= 1;
  }
};

// ---- the warp that moves rows

template <class E, class O>
FASTGRPO_DEVICE void load_slice(const OnePassArgs& p, Plan plan, int buffer, int lane, uint64_t policy) {
  using Bits = typename E::Bits;
  const Span<E> span = slice_of<E>(p.a.logits, p.a.logits_stride, p, plan.row);
  if (!kAsWide<E, O>) {
    plan.lead = span.lead, plan.count = span.count;
    plan.out = slice_of<O>(p.a.out, p.a.out_stride, p, plan.row).from - (const typename O::Bits*)p.a.out;
  }
  plan.vectors = span.vectors();
  plan.owner = plan.target < 0 ? -1 : plan.target / p.shape.slice;
  plan.position = plan.owner == cluster_rank() ? span.lead + plan.target % p.shape.slice : -1;
  plan.at = buffer_at(p.shape, buffer) + span.phase();
  const uint32_t to = plan.at;
  each_edge(span, lane, [&](int position) {
    const Bits x = span.holds(position) ? global_load(span.at(position)) : E::kMinusInfinity;
    shared_store(to + position * (uint32_t)sizeof(Bits), x);
  });
  if (lane == 0) shared_put(plan_at(buffer), plan);
  fence_async();  // where these edges are, the next row's copy may come
  sync_warp();    // the arrival below speaks for what all lanes wrote
  if (lane != 0) return;
  const int first = span.first_whole(), vectors = span.end_whole() - first;
  if (vectors > 0) {
    barrier_expect(full(buffer), vectors * 16);
    bulk_load(to + first * 16, span.at(first * E::kCount), vectors * 16, full(buffer), policy);
  } else {
    barrier_arrive(full(buffer));
  }
}

template <class E>
FASTGRPO_DEVICE void store_slice(const OnePassArgs& p, int buffer, int lane, uint64_t policy) {
  using Bits = typename E::Bits;
  const Plan plan = shared_get<Plan>(plan_at(buffer));
  const Span<E> span = slice_of<E>(p.a.out, p.a.out_stride, p, plan.row);
  const uint32_t from = plan.at;
  const int first = span.first_whole(), vectors = span.end_whole() - first;
  if (lane == 0 && vectors > 0) bulk_store((void*)span.at(first * E::kCount), from + first * 16, vectors * 16, policy);
  each_edge(span, lane, [&](int position) {
    if (!span.holds(position)) return;
    global_store((Bits*)span.at(position), shared_load<Bits>(from + position * (uint32_t)sizeof(Bits)));
  });
  if (lane == 0) bulk_wait_read();
  fence_async();
  sync_warp();  // nothing fills the buffer again before all lanes have read from it
}

template <class E, class O>
FASTGRPO_DEVICE void move_rows(const OnePassArgs& p) {
  const int lane = thread_index() % 32, rank = cluster_rank();
  const int64_t rows = p.a.batch * p.a.tokens, step = block_count() / cluster_size();
  const uint64_t policy = cache_policy(p.shape.evict_first != 0);
  Turn in, out;
  int held = 0;
  const auto make_room = [&] {
    barrier_wait(ready(out.buffer), out.parity);
    if (kAsWide<E, O> && p.a.out != nullptr) store_slice<E>(p, out.buffer, lane, policy);
    out.next(p.shape);
    --held;
  };
  for (int64_t row = block_index() / cluster_size(); row < rows; row += step) {
    const Plan plan = plan_row(p.a, row);
    if (!plan.scored) {
      if (p.a.out != nullptr) zero(slice_of<O>(p.a.out, p.a.out_stride, p, row), lane, 32);
      if (rank == 0 && lane == 0) skip_row(p.a, row);
      continue;
    }
    if (held == p.shape.buffers) make_room();
    load_slice<E, O>(p, plan, in.buffer, lane, policy);
    in.next(p.shape);
    ++held;
  }
  while (held > 0) make_room();
  Plan end = {};
  end.row = -1;
  if (lane == 0) {
    shared_put(plan_at(in.buffer), end);
    barrier_arrive(full(in.buffer));
  }
}

// ---- the warps that sweep

// The sum over the first kMaxCluster lanes, counted from the highest top of them, in every lane. The order of adding
// depends on the lanes' numbers alone, so the bits are the same in all blocks that hold the same parts.
template <bool kEntropy>
FASTGRPO_DEVICE Sums merged_lanes(const Sums& mine, float c) {
  Sums all = raised(mine, from_ordered(warp_max(ordered(mine.top))), c);
  FASTGRPO_UNROLL
  for (int mask = kMaxCluster / 2; mask > 0; mask /= 2) {
    all.sum += warp_across(all.sum, mask);
    if (kEntropy) all.weighted += warp_across(all.weighted, mask);
  }
  return all;
}

// Stores the gradient of a slice, in 16 bits an element, by all workers. `mine`: this one has the target's vector.
template <class O>
FASTGRPO_DEVICE void store_narrow(const OnePassArgs& p, const Plan& plan, const RowGradient& g, bool mine,
                                  uint64_t policy) {
  using Bits = typename O::Bits;
  const int thread = thread_index();
  if (g.idle) {
    zero(Span<O>(p.a.out, plan.out, plan.count), thread, kWorkers);
    return;
  }
  const Span<Float32> span(plan.lead, plan.count);
  const Exponent exponent(g.top, g.c);
  Bits* const to = (Bits*)p.a.out + plan.out - span.lead;  // of the logit at position 0
  const auto store = [&](int position) {
    const float x = shared_load<float>(plan.at + position * 4);
    const Bits y = gradient<O>(x, exponent, g.constant, g.slope);
    global_store(to + position, position == plan.position ? O::bits(g.target) : y);
  };
  if ((uintptr_t)to % sizeof(HalfVec) != 0) {
    for (int i = thread; i < span.count; i += kWorkers) store(span.lead + i);
    return;
  }
  const int first = thread < span.first_whole() ? thread + kWorkers : thread;
  choose_gradient(exponent, g.slope, [&](auto near, auto slope) {
#pragma unroll 4
    for (int v = first; v < span.end_whole(); v += kWorkers) {
      const Vec x = shared_load<Vec>(plan.at + v * 16);
      global_store((HalfVec*)to + v, gradient<Float32, O, near.value, slope.value>(x, exponent, g.constant, g.slope),
                   policy);
    }
  });
  if (mine && span.whole(plan.position / Float32::kCount)) global_store(to + plan.position, O::bits(g.target));
  each_edge(span, thread, [&](int position) {
    if (span.holds(position)) store(position);
  });
}

template <class E, class O, bool kEntropy>
FASTGRPO_DEVICE void sweep_rows(const OnePassArgs& p) {
  using Bits = typename E::Bits;
  const int thread = thread_index(), rank = cluster_rank(), blocks = cluster_size();
  const uint64_t policy = cache_policy(p.shape.evict_first != 0);
  Turn turn;
  for (uint32_t n = 0;; ++n, turn.next(p.shape)) {
    barrier_wait(full(turn.buffer), turn.parity);
    const Plan plan = shared_get<Plan>(plan_at(turn.buffer));
    if (plan.row < 0) return;
    const uint32_t at = plan.at;
    const int vectors = plan.vectors, position = plan.position;

    // The target's own thread takes it out of the row, before its sweeps and back into the gradient after them.
    const bool mine = position >= 0 && position / E::kCount % kWorkers == thread;
    const uint32_t logit_at = kTarget + n % 2 * 4, target_at = at + position * (uint32_t)sizeof(Bits);
    if (mine) {
      shared_store(logit_at, E::number(shared_load<Bits>(target_at)));
      shared_store(target_at, (Bits)E::kMinusInfinity);
    }

    uint32_t largest = E::kLowest;
#pragma unroll 4
    for (int v = thread; v < vectors; v += kWorkers) largest = maximum<E>(shared_load<Vec>(at + v * 16), largest);
    const float top = block_max(E::largest(largest), kWarpSums);

    const Exponent exponent(top, plan.inv_temperature * kLog2E);
    ThreadSums<E, kEntropy> sums;
    if (exponent.near) {
#pragma unroll 4
      for (int v = thread; v < vectors; v += kWorkers) {
        sums.template add<true>(shared_load<Vec>(at + v * 16), exponent);
      }
    } else {
      for (int v = thread; v < vectors; v += kWorkers) {
        sums.template add<false>(shared_load<Vec>(at + v * 16), exponent);
      }
    }
    const Sums part = block_sums(sums, top, exponent, kWarpSums);

    if (thread < 32) {
      const uint32_t exchange = kExchange + n % 2 * 8, parts = kParts + n % 2 * 16 * kMaxCluster;
      if (thread == 0) barrier_expect(exchange, blocks * 16);
      if (thread < blocks) {
        const float target = plan.owner == rank ? shared_load<float>(logit_at) : 0.0f;
        remote_store(parts + rank * 16, exchange, thread,
                     {{as_bits(part.top), as_bits(part.sum), as_bits(part.weighted), as_bits(target)}});
      }
      // A block that is a row ahead writes to the other half: it has heard from this one about the row between.
      // A block's part says, too, that its slice has come: its sums waited for the copy. So from here on nobody reads
      // the row's own memory any more, and a narrow gradient may lie there, over the slices of other blocks. Before,
      // it would race with their copies.
      barrier_wait_cluster(exchange, n / 2 % 2);
      // Lane i takes part i; lanes 16 to 31 take them again, so that all come to the same.
      const int i = thread % kMaxCluster;
      Vec v = {{as_bits(-INFINITY), 0, 0, 0}};
      if (i < blocks) v = shared_load<Vec>(parts + i * 16);
      const Sums all = merged_lanes<kEntropy>({as_float(v.w[0]), as_float(v.w[1]), as_float(v.w[2])}, exponent.c);
      const float logit = warp_from(as_float(v.w[3]), plan.owner < 0 ? 0 : plan.owner);
      const RowGradient g = finish_row(p.a, plan, all, logit, rank == 0 && thread == 0);
      if (thread == 0) shared_put(kGradient, g);
    }

    if (p.a.out != nullptr) {
      sync_threads(kWorkersBarrier, kWorkers);  // the first warp's gradient is there
      const RowGradient g = shared_get<RowGradient>(kGradient);
      if constexpr (!kAsWide<E, O>) {
        store_narrow<O>(p, plan, g, mine, policy);
      } else if (g.idle) {
        for (int v = thread; v < vectors; v += kWorkers) shared_store(at + v * 16, Vec{{0, 0, 0, 0}});
      } else {
        const Exponent from_top(g.top, g.c);
        choose_gradient(from_top, g.slope, [&](auto near, auto slope) {
#pragma unroll 4
          for (int v = thread; v < vectors; v += kWorkers) {
            const Vec x = shared_load<Vec>(at + v * 16);
            shared_store(at + v * 16, gradient<E, O, near.value, slope.value>(x, from_top, g.constant, g.slope));
          }
        });
        if (mine) shared_store(target_at, E::bits(g.target));
      }
    }
    fence_async();
    sync_warp();  // the arrival below speaks for what all lanes wrote and fenced
    if (thread % 32 == 0) barrier_arrive(ready(turn.buffer));
  }
}

template <class E, class O, bool kEntropy>
FASTGRPO_KERNEL(kThreads, 2)
one_pass_kernel(const OnePassArgs p) {
  if (thread_index() == 0) {
    for (int i = 0; i < p.shape.buffers; ++i) {
      barrier_init(full(i), 1);
      barrier_init(ready(i), kWarps);
    }
    barrier_init(kExchange, 1);
    barrier_init(kExchange + 8, 1);
  }
  cluster_sync();  // no block waits at, or writes to, a barrier that is not there yet
  if (thread_index() < kWorkers) {
    sweep_rows<E, O, kEntropy>(p);
  } else {
    move_rows<E, O>(p);
  }
  cluster_sync();  // no block leaves while another may still write to its shared memory
}

template <class E, class O>
void (*kernel_for(bool entropy))(OnePassArgs) {
  return entropy ? one_pass_kernel<E, O, true> : one_pass_kernel<E, O, false>;
}

auto kernel_for(const OnePassKernel& which) {
  return for_dtypes(which.dtype, which.out_dtype,
                    [&](auto in, auto out) { return kernel_for<decltype(in), decltype(out)>(which.entropy); });
}

Launch launch_for(const OnePassShape& shape, int64_t clusters, cudaStream_t stream) {
  return {clusters * shape.cluster, kThreads, shape.cluster, shape.shared_bytes, stream};
}

}  // namespace

OnePassShape one_pass_shape(int32_t dtype, int64_t vocab, const OnePass& choice, int shared_limit) {
  const int size = dtype == kFloat32 ? 4 : 2;
  // Half of a multiprocessor's shared memory with three rows on their way, or all of it with two. A block takes 1 KiB
  // beside its own, and what one block may have is all there is but that.
  const int half = (shared_limit + 1024) / 2 - 1024;
  const struct {
    int blocks, bytes, least_bytes, buffers;
  } budgets[] = {{2, half, 0, 3}, {1, shared_limit, half + kLine, 2}};
  for (const auto& budget : budgets) {
    if (choice.blocks > 0 && choice.blocks != budget.blocks) continue;
    const int least = choice.buffers > 0 ? choice.buffers : choice.blocks > 0 ? 2 : budget.buffers;
    const int most = choice.buffers > 0 ? choice.buffers : kMaxBuffers;
    for (int blocks = choice.cluster > 0 ? choice.cluster : 1; blocks <= kMaxCluster; blocks *= 2) {
      const int64_t line = kLine / size, slice = ((vocab + blocks - 1) / blocks + line - 1) / line * line;
      const int64_t buffer_bytes = slice * size + kLine, room = (budget.bytes - (int)kBuffers) / buffer_bytes;
      if (room >= least) {
        OnePassShape shape = {};
        shape.cluster = blocks;
        shape.slice = (int)slice;
        shape.buffers = room < most ? (int)room : most;
        shape.buffer_bytes = (int)buffer_bytes;
        // One block a multiprocessor leaves no room for a second one.
        const int bytes = (int)kBuffers + shape.buffers * shape.buffer_bytes;
        shape.shared_bytes = bytes > budget.least_bytes ? bytes : budget.least_bytes;
        shape.blocks = budget.blocks;
        return shape;
      }
      if (choice.cluster > 0) break;
    }
  }
  return {};
}

cudaError_t one_pass_prepare(const OnePassKernel& which, int shared_limit) {
  return prepare(kernel_for(which), shared_limit);
}

cudaError_t one_pass_clusters(const OnePassKernel& which, const OnePassShape& shape, int& clusters) {
  return active_clusters(kernel_for(which), launch_for(shape, 1, nullptr), clusters);
}

cudaError_t one_pass(const FastgrpoArgs& args, const OnePassShape& shape, cudaStream_t stream) {
  const int64_t rows = args.batch * args.tokens;
  const int64_t clusters = shape.clusters < rows ? shape.clusters : rows;
  return launch(kernel_for(one_pass_kernel_for(args)), launch_for(shape, clusters, stream), {args, shape});
}

}  // namespace fastgrpo
