// Statistics and gradient of a row as two sweeps over global memory: for chips without clusters, rows that no cluster
// holds, and coefficients from outside (sequence level, an upstream gradient per token).
//
// Grid: one block of 256 threads a row; 3 blocks a multiprocessor (at most 80 registers a thread) for the statistics,
// 4 (64) for the gradient and the scaling. The scaling's blocks go on from row to row. Bytes moved per row: V in; for
// these two V out as well. A tile of 8 vectors a thread stays in registers between its maximum and its sums. Accesses
// are 128 bits wide, stores of a gradient narrower than its logits 64, but at a row's ends and where gradients lie
// otherwise modulo that than their logits. Rows that do not count are not read; they get zeroes.

#include "kernels.h"
#include "launch.h"
#include "rows.h"

namespace fastgrpo {
namespace {

constexpr int kHeld = 8;  // vectors of a tile in a thread
constexpr int kTile = kHeld * kWorkers;
constexpr int kScaleBlocks = 4;  // of a multiprocessor

template <class E>
FASTGRPO_DEVICE Span<E> row_of(const void* base, const int64_t (&stride)[2], const FastgrpoArgs& a, int64_t row) {
  return Span<E>(row_pointer(base, stride, a, row, sizeof(typename E::Bits)), 0, (int)a.vocab);
}

template <class E>
FASTGRPO_DEVICE const Vec* vectors_of(const Span<E>& span) {
  return (const Vec*)span.at(0);
}

// to[v] = f(from[v]) for the block's vectors from `first` to `end`, four loads of a thread under way at once.
template <class F>
FASTGRPO_DEVICE void each_vector(const Vec* from, Vec* to, int first, int end, F f) {
  int v = first + thread_index();
  for (; v + 3 * kWorkers < end; v += 4 * kWorkers) {
    Vec x[4];
    FASTGRPO_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = global_load_streaming(from + v + i * kWorkers);
    FASTGRPO_UNROLL
    for (int i = 0; i < 4; ++i) global_store_streaming(to + v + i * kWorkers, f(x[i]));
  }
  for (; v < end; v += kWorkers) global_store_streaming(to + v, f(global_load_streaming(from + v)));
}

// store(i, load(i)) for i from before `end` down to `first`, by the block, for a gradient that is narrower than its
// logits and may lie in the second half of their row. What is stored for i then overwrites logits from i on alone.
// Tiles of kAtOnce for a thread; several are whole tiles, and the end of what they left comes back.
template <int kAtOnce, class L, class S>
FASTGRPO_DEVICE int backwards(int first, int end, L load, S store) {
#pragma unroll 1
  for (; end - first >= (kAtOnce > 1 ? kAtOnce * kWorkers : 1); end -= kAtOnce * kWorkers) {
    const int last = end - 1 - thread_index();
    const bool within = kAtOnce > 1 || last >= first;
    decltype(load(first)) x[kAtOnce] = {};
    FASTGRPO_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (within) x[i] = load(last - i * kWorkers);
    }
    sync_threads(kWorkersBarrier, kWorkers);  // no store of a tile before all loads of it, in whose place it may come
    FASTGRPO_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (within) store(last - i * kWorkers, x[i]);
    }
  }
  return end;
}

// Where the vectors of the edges wait, filled up with -inf: that before the first whole one, and that after the last.
constexpr uint32_t kEdges = kScratch;
constexpr uint32_t kPlan = kEdges + 2 * 16;
constexpr int kSharedBytes = kPlan + sizeof(Plan);

template <class E>
FASTGRPO_DEVICE uint32_t edge_at(const Span<E>& span, int v) {
  return kEdges + (v < span.first_whole() ? 0 : 16);
}

template <class E>
FASTGRPO_DEVICE void load_edges(const Span<E>& span) {
  using Bits = typename E::Bits;
  each_edge(span, thread_index(), [&](int position) {
    const Bits x = span.holds(position) ? global_load(span.at(position)) : E::kMinusInfinity;
    shared_store(edge_at(span, position / E::kCount) + position % E::kCount * (uint32_t)sizeof(Bits), x);
  });
  sync_threads(kWorkersBarrier, kWorkers);  // any thread may hold an edge
}

template <class E, bool kEntropy>
FASTGRPO_KERNEL(kWorkers, 3)
stats_kernel(const FastgrpoArgs a) {
  const int64_t row = block_index();
  const int thread = thread_index();
  if (thread < 32) {  // one warp asks memory for all
    const Plan plan = plan_row(a, row);
    if (thread == 0) shared_put(kPlan, plan);
  }
  sync_threads(kWorkersBarrier, kWorkers);  // the plan is there
  const Plan plan = shared_get<Plan>(kPlan);
  if (!plan.scored) {
    if (thread == 0) skip_row(a, row);
    return;
  }
  const Span<E> span = row_of<E>(a.logits, a.logits_stride, a, row);
  const int vectors = span.vectors(), target = plan.target < 0 ? -1 : span.lead + plan.target;
  const float c = plan.inv_temperature * kLog2E;
  load_edges(span);
  Sums all = nothing();
  for (int first = 0; first < vectors; first += kTile) {
    Vec held[kHeld];
    if (first >= span.first_whole() && first + kTile <= span.end_whole()) {
      FASTGRPO_UNROLL
      for (int i = 0; i < kHeld; ++i)
        held[i] = global_load_streaming(vectors_of(span) + first + i * kWorkers + thread);
    } else {
      FASTGRPO_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        const int v = first + i * kWorkers + thread;
        held[i] = {{E::kLowest, E::kLowest, E::kLowest, E::kLowest}};
        if (span.whole(v)) {
          held[i] = global_load_streaming(vectors_of(span) + v);
        } else if (v < vectors) {
          held[i] = shared_load<Vec>(edge_at(span, v));
        }
      }
    }
    const int apart = target < 0 ? -1 : target / E::kCount - first;  // the target's vector in this tile
    if (apart >= 0 && apart < kTile) {
      FASTGRPO_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        if (apart == i * kWorkers + thread) held[i] = without<E>(held[i], target % E::kCount);
      }
    }
    uint32_t largest = E::kLowest;
    FASTGRPO_UNROLL
    for (int i = 0; i < kHeld; ++i) largest = maximum<E>(held[i], largest);
    const float top = block_max(E::largest(largest), 0);
    const Exponent exponent(top, c);
    ThreadSums<E, kEntropy> sums;
    if (exponent.near) {
      FASTGRPO_UNROLL
      for (int i = 0; i < kHeld; ++i) sums.template add<true>(held[i], exponent);
    } else {
      FASTGRPO_UNROLL
      for (int i = 0; i < kHeld; ++i) sums.template add<false>(held[i], exponent);
    }
    all = merged(all, block_sums(sums, top, exponent, 0), c);
  }
  if (thread >= 32) return;
  const float logit = plan.target < 0 ? 0.0f : E::number(global_load(span.at(target)));
  finish_row(a, plan, all, logit, thread == 0);
}

// The gradient of a row as it comes, in elements as wide as the logits.
template <class E>
FASTGRPO_DEVICE void store_gradient(const Span<E>& span, const Span<E>& out, const Exponent& exponent,
                                    const RowGradient& r) {
  using Bits = typename E::Bits;
  const int thread = thread_index();
  choose_gradient(exponent, r.slope, [&](auto near, auto slope) {
    const Vec* const from = vectors_of(span);
    if (span.lead == out.lead) {
      each_vector(from, (Vec*)vectors_of(out), span.first_whole(), span.end_whole(), [&](const Vec& x) {
        return gradient<E, E, near.value, slope.value>(x, exponent, r.constant, r.slope);
      });
    } else {
      for (int v = span.first_whole() + thread; v < span.end_whole(); v += kWorkers) {
        const Vec x = global_load_streaming(from + v);
        const Vec y = gradient<E, E, near.value, slope.value>(x, exponent, r.constant, r.slope);
        FASTGRPO_UNROLL
        for (int k = 0; k < E::kCount; ++k) {
          global_store((Bits*)out.at(v * E::kCount + k - span.lead + out.lead), element<E>(y, k));
        }
      }
    }
  });
  each_edge(span, thread, [&](int position) {
    if (!span.holds(position)) return;
    const float x = E::number(global_load(span.at(position)));
    global_store((Bits*)out.at(position - span.lead + out.lead), gradient<E>(x, exponent, r.constant, r.slope));
  });
}

// The same in 16 bits an element. What is loaded of the row is loaded before it may be overwritten.
template <class O>
FASTGRPO_DEVICE void store_narrow(const Span<Float32>& span, const Span<O>& out, const Exponent& exponent,
                                  const RowGradient& r) {
  using Bits = typename O::Bits;
  Bits* const to = (Bits*)out.from - span.lead;  // of the logit at position 0
  const auto load = [&](int position) { return as_float(global_load(span.at(position))); };
  const auto store = [&](int position, float x) {
    global_store(to + position, gradient<O>(x, exponent, r.constant, r.slope));
  };
  if ((uintptr_t)to % sizeof(HalfVec) != 0) {
    backwards<1>(span.lead, span.lead + span.count, load, store);
    return;
  }
  float edge = 0.0f;  // a thread has one at most
  each_edge(span, thread_index(), [&](int position) {
    if (span.holds(position)) edge = load(position);
  });
  choose_gradient(exponent, r.slope, [&](auto near, auto slope) {
    const auto load_vector = [&](int v) { return global_load_streaming(vectors_of(span) + v); };
    const auto store_vector = [&](int v, const Vec& x) {
      global_store_streaming((HalfVec*)to + v,
                             gradient<Float32, O, near.value, slope.value>(x, exponent, r.constant, r.slope));
    };
    const int first = span.first_whole(), end = backwards<4>(first, span.end_whole(), load_vector, store_vector);
    backwards<1>(first, end, load_vector, store_vector);
  });
  sync_threads(kWorkersBarrier, kWorkers);  // no edge is stored before all are loaded: a short row has nothing else
  each_edge(span, thread_index(), [&](int position) {
    if (span.holds(position)) store(position, edge);
  });
}

template <class E, class O>
FASTGRPO_KERNEL(kWorkers, 4)
grad_kernel(const FastgrpoArgs a) {
  using Bits = typename O::Bits;
  const int64_t row = block_index();
  const int thread = thread_index();
  const float g = global_load(a.g + row), h = or_else(a.h, row, 0.0f);
  const bool masked = a.mask != nullptr && global_load(a.mask + row) == 0;
  const Span<O> out = row_of<O>(a.out, a.out_stride, a, row);
  if (masked || (g == 0.0f && h == 0.0f)) {
    zero(out, thread, kWorkers);
    return;
  }
  const Span<E> span = row_of<E>(a.logits, a.logits_stride, a, row);
  const int64_t id = global_load(a.ids + row);
  const int target = id >= 0 && id < a.vocab ? (int)id : -1;
  const float logp = global_load(a.logp + row), lse = global_load(a.lse + row);
  const float inv_t = global_load(a.inv_temperature + row);
  const float entropy = h == 0.0f ? 0.0f : global_load(a.entropy + row);
  // The row counted from lse / inv_temperature: where p is 1. The quotient's rounding goes with the factor.
  const float top = lse / inv_t, error = fmaf(-top, inv_t, lse);
  const RowGradient r = row_gradient(logp, error, entropy, top, g, h, inv_t);
  const Exponent exponent(top, r.c);
  if constexpr (kAsWide<E, O>) {
    store_gradient<E>(span, out, exponent, r);
  } else {
    store_narrow<O>(span, out, exponent, r);
  }
  sync_threads(kWorkersBarrier, kWorkers);  // the target's own gradient comes last
  if (target >= 0 && thread == 0) global_store((Bits*)out.at(out.lead + target), O::bits(r.target));
}

template <class E>
FASTGRPO_DEVICE Vec scaled(const Vec& v, float factor) {
  float x[E::kCount];
  unpack<E>(v, x);
  FASTGRPO_UNROLL
  for (int k = 0; k < E::kCount; ++k) x[k] *= factor;
  return pack<E>(x);
}

template <class E>
FASTGRPO_KERNEL(kWorkers, kScaleBlocks)
scale_kernel(const FastgrpoArgs a) {
  const float factor = global_load(a.weight);
  if (factor == 1.0f) return;
  using Bits = typename E::Bits;
  const int64_t rows = a.batch * a.tokens;
  for (int64_t row = block_index(); row < rows; row += block_count()) {
    const Span<E> span = row_of<E>(a.logits, a.logits_stride, a, row);
    Vec* const vectors = (Vec*)vectors_of(span);
    each_vector(vectors, vectors, span.first_whole(), span.end_whole(),
                [&](const Vec& x) { return scaled<E>(x, factor); });
    each_edge(span, thread_index(), [&](int position) {
      Bits* const x = (Bits*)span.at(position);
      if (span.holds(position)) global_store(x, E::bits(E::number(global_load(x)) * factor));
    });
  }
}

cudaError_t launch_blocks(void (*kernel)(FastgrpoArgs), const FastgrpoArgs& args, int64_t blocks,
                          cudaStream_t stream) {
  return launch(kernel, {blocks, kWorkers, 0, kSharedBytes, stream}, args);
}

}  // namespace

cudaError_t stats(const FastgrpoArgs& args, cudaStream_t stream) {
  void (*const kernels[3][2])(FastgrpoArgs) = {{stats_kernel<Float32, false>, stats_kernel<Float32, true>},
                                               {stats_kernel<BFloat16, false>, stats_kernel<BFloat16, true>},
                                               {stats_kernel<Float16, false>, stats_kernel<Float16, true>}};
  return launch_blocks(kernels[args.dtype][wants_entropy(args)], args, args.batch * args.tokens, stream);
}

cudaError_t grad(const FastgrpoArgs& args, cudaStream_t stream) {
  void (*const kernel)(FastgrpoArgs) = for_dtypes(
      args.dtype, out_dtype(args), [](auto in, auto out) { return &grad_kernel<decltype(in), decltype(out)>; });
  return launch_blocks(kernel, args, args.batch * args.tokens, stream);
}

cudaError_t loadable() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, scale_kernel<Float32>);
}

cudaError_t scale(const FastgrpoArgs& args, int multiprocessors, cudaStream_t stream) {
  void (*const kernels[3])(FastgrpoArgs) = {scale_kernel<Float32>, scale_kernel<BFloat16>, scale_kernel<Float16>};
  // No more blocks than run at once: a factor of 1 costs one look of each.
  const int64_t rows = args.batch * args.tokens, most = (int64_t)kScaleBlocks * multiprocessors;
  return launch_blocks(kernels[args.dtype], args, rows < most ? rows : most, stream);
}

}  // namespace fastgrpo
