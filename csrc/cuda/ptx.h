// The machine as the kernels see it: places, memory, barriers, asynchronous copies. Every line of PTX is here.
//
// The kernels reach shared and global memory through these functions alone, so that a stand-in for this header
// (tests/cuda_host/device.h) can run them on a CPU and check every access.
// A block's shared memory is one dynamic buffer; a place in it is an offset in bytes.

#pragma once

#include <stdint.h>

#define FASTGRPO_KERNEL(threads, blocks_per_multiprocessor) \
  __global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
#define FASTGRPO_DEVICE __device__ __forceinline__
#define FASTGRPO_UNROLL _Pragma("unroll")

namespace fastgrpo {

// 16 bytes of a row.
struct alignas(16) Vec {
  uint32_t w[4];
};

// What four elements of fp32 come to in a narrower format.
struct alignas(8) HalfVec {
  uint32_t w[2];
};

extern __shared__ __align__(128) char shared_buffer[];

// ---- places

FASTGRPO_DEVICE int thread_index() { return threadIdx.x; }
FASTGRPO_DEVICE int block_index() { return blockIdx.x; }
FASTGRPO_DEVICE int block_count() { return gridDim.x; }

// ---- memory; T is 2, 4, 8 or 16 bytes wide and aligned to its width

template <class T>
FASTGRPO_DEVICE T shared_load(uint32_t at) {
  return *(const T*)(shared_buffer + at);
}

template <class T>
FASTGRPO_DEVICE void shared_store(uint32_t at, const T& value) {
  *(T*)(shared_buffer + at) = value;
}

template <class T>
FASTGRPO_DEVICE T global_load(const T* p) {
  return *p;
}

template <class T>
FASTGRPO_DEVICE void global_store(T* p, const T& value) {
  *p = value;
}

// Read once: these need not stay in the caches.
FASTGRPO_DEVICE Vec global_load_streaming(const Vec* p) {
  const uint4 v = __ldcs((const uint4*)p);
  return {{v.x, v.y, v.z, v.w}};
}

FASTGRPO_DEVICE void global_store_streaming(Vec* p, const Vec& v) {
  __stcs((uint4*)p, make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]));
}

FASTGRPO_DEVICE void global_store_streaming(HalfVec* p, const HalfVec& v) {
  __stcs((uint2*)p, make_uint2(v.w[0], v.w[1]));
}

// ---- threads of a block

// All 32 lanes of a warp come here together: what each wrote before, all may read after.
FASTGRPO_DEVICE void sync_warp() { __syncwarp(); }

// The same for the first `threads` threads to come, a multiple of 32, at one of 16 barriers.
FASTGRPO_DEVICE void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Over the 32 lanes of a warp; the result is in every lane.
FASTGRPO_DEVICE int warp_sum(int x) { return __reduce_add_sync(0xffffffffu, x); }
FASTGRPO_DEVICE int warp_max(int x) { return __reduce_max_sync(0xffffffffu, x); }

// The x of another lane, which all 32 call together: of `lane`, and of the one whose number differs in the bits of
// `mask`.
FASTGRPO_DEVICE float warp_from(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
FASTGRPO_DEVICE float warp_across(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// ---- numbers

// 2^x to two units in the last place; results below 2^-126 are 0.
FASTGRPO_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FASTGRPO_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
FASTGRPO_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

// Pairs of 16-bit floats in a word, the first one in the low half. The maximum is NaN when either is.
FASTGRPO_DEVICE uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

FASTGRPO_DEVICE uint32_t max_f16x2(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

FASTGRPO_DEVICE float max_f32(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

FASTGRPO_DEVICE void unpack_f16x2(uint32_t pair, float& low, float& high) {
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
      : "=f"(low), "=f"(high)
      : "r"(pair));
}

// Rounded to nearest even; NaN stays NaN.
FASTGRPO_DEVICE uint32_t pack_bf16x2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

FASTGRPO_DEVICE uint32_t pack_f16x2(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// ---- sm_90: clusters, asynchronous copies, and barriers (8 bytes of shared memory) that wait for them

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

FASTGRPO_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

FASTGRPO_DEVICE int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// All threads of all blocks of the cluster come here together.
FASTGRPO_DEVICE void cluster_sync() {
  __syncwarp();  // the lanes may come from different ways, and must not leave it like that
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

FASTGRPO_DEVICE uint32_t shared_address(uint32_t at) { return (uint32_t)__cvta_generic_to_shared(shared_buffer + at); }

// One thread makes a barrier whose phases take `arrivals` arrivals each; others see it after a sync.
FASTGRPO_DEVICE void barrier_init(uint32_t at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

FASTGRPO_DEVICE void barrier_arrive(uint32_t at) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}

// Arrives, and makes the phase wait for `bytes` more from asynchronous copies.
FASTGRPO_DEVICE void barrier_expect(uint32_t at, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)),
               "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity (0 for the first) is complete.
FASTGRPO_DEVICE void barrier_wait(uint32_t at, uint32_t parity) {
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n"
      "again:\n\t"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t"
      "}" ::"r"(shared_address(at)),
      "r"(parity)
      : "memory");
}

// The same, where what is waited for comes from other blocks of the cluster.
FASTGRPO_DEVICE void barrier_wait_cluster(uint32_t at, uint32_t parity) {
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n"
      "again:\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t"
      "}" ::"r"(shared_address(at)),
      "r"(parity)
      : "memory");
}

// What the L2 cache does with the lines of a copy or a store: gives them up before others, or treats them as any.
FASTGRPO_DEVICE uint64_t cache_policy(bool evict_first) {
  uint64_t policy;
  if (evict_first) {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}

FASTGRPO_DEVICE void global_store(HalfVec* p, const HalfVec& v, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v2.b32 [%0], {%1, %2}, %3;" ::"l"(__cvta_generic_to_global(p)), "r"(v.w[0]),
               "r"(v.w[1]), "l"(policy)
               : "memory");
}

// Copies between global and shared memory behind the threads' backs; addresses and sizes are multiples of 16 bytes.
// A load completes on a barrier that was told to expect its bytes.
FASTGRPO_DEVICE void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

FASTGRPO_DEVICE void bulk_store(void* to, uint32_t from, uint32_t bytes, uint64_t policy) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes), "l"(policy)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all bulk stores of this thread have read their shared memory.
FASTGRPO_DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// What this thread did to shared memory before, bulk copies read or overwrite after (once a sync says so).
FASTGRPO_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Writes 16 bytes at `at` of the shared memory of block `rank` of the cluster, and completes them on its `barrier`.
FASTGRPO_DEVICE void remote_store(uint32_t at, uint32_t barrier, int rank, const Vec& v) {
  asm volatile(
      "{\n\t"
      ".reg .b32 to, bar;\n\t"
      "mapa.shared::cluster.u32 to, %0, %2;\n\t"
      "mapa.shared::cluster.u32 bar, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, [bar];\n\t"
      "}" ::"r"(shared_address(at)),
      "r"(shared_address(barrier)), "r"(rank), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
      : "memory");
}

#endif

}  // namespace fastgrpo
