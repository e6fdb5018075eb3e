// Stands in for csrc/cuda/ptx.h: the same machine, played on a CPU, which checks every access (see machine.h).

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define FASTGRPO_KERNEL(threads, blocks_per_multiprocessor) void
#define FASTGRPO_DEVICE inline
#define FASTGRPO_UNROLL

namespace fastgrpo {

struct alignas(16) Vec {
  uint32_t w[4];
};

struct alignas(8) HalfVec {
  uint32_t w[2];
};

// ---- places

int thread_index();
int block_index();
int block_count();

// ---- memory

// Check an access of this thread; the shared ones return where the bytes are.
const void* shared_read(uint32_t at, uint32_t bytes);
void* shared_write(uint32_t at, uint32_t bytes);
void global_read(const void* p, uint32_t bytes);
void global_written(const void* p, uint32_t bytes);

template <class T>
inline T shared_load(uint32_t at) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "");
  T value;
  memcpy(&value, shared_read(at, sizeof(T)), sizeof(T));
  return value;
}

template <class T>
inline void shared_store(uint32_t at, const T& value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "");
  memcpy(shared_write(at, sizeof(T)), &value, sizeof(T));
}

template <class T>
inline T global_load(const T* p) {
  global_read(p, sizeof(T));
  return *p;
}

template <class T>
inline void global_store(T* p, const T& value) {
  global_written(p, sizeof(T));
  *p = value;
}

inline Vec global_load_streaming(const Vec* p) { return global_load(p); }
inline void global_store_streaming(Vec* p, const Vec& v) { global_store(p, v); }
inline void global_store_streaming(HalfVec* p, const HalfVec& v) { global_store(p, v); }

// ---- threads of a block

void sync_warp();
void sync_threads(int barrier, int threads);
int warp_sum(int x);
int warp_max(int x);
float warp_from(float x, int lane);
float warp_across(float x, int mask);

// ---- numbers

inline float fast_exp2(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;
}

inline float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

uint32_t max_bf16x2(uint32_t a, uint32_t b);
uint32_t max_f16x2(uint32_t a, uint32_t b);
float max_f32(float a, float b);
void unpack_f16x2(uint32_t pair, float& low, float& high);
uint32_t pack_bf16x2(float low, float high);
uint32_t pack_f16x2(float low, float high);

// ---- sm_90

int cluster_rank();
int cluster_size();
void cluster_sync();

void barrier_init(uint32_t at, int arrivals);
void barrier_arrive(uint32_t at);
void barrier_expect(uint32_t at, uint32_t bytes);
void barrier_wait(uint32_t at, uint32_t parity);
void barrier_wait_cluster(uint32_t at, uint32_t parity);

uint64_t cache_policy(bool evict_first);
void check_policy(const char* operation, uint64_t policy);

inline void global_store(HalfVec* p, const HalfVec& v, uint64_t policy) {
  check_policy("global_store", policy);
  global_store(p, v);
}

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, uint64_t policy);
void bulk_store(void* to, uint32_t from, uint32_t bytes, uint64_t policy);
void bulk_wait_read();
void fence_async();
void remote_store(uint32_t at, uint32_t barrier, int rank, const Vec& v);

}  // namespace fastgrpo
