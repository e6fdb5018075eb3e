// The CUDA runtime of cuda_runtime.h, for a device of the tests' making, and what the tests set and ask.

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>

#include "cuda_runtime.h"
#include "machine.h"

using fastgrpo_host::m;

namespace {

constexpr int kMaxSharedBytes = 227 << 10;
constexpr int kMultiprocessors = 2;

struct Attributes {
  int shared_bytes = 48 << 10;
  bool wide = false;
  int number = 0;  // of the kernels that were given attributes, in their order from 0
};

struct {
  int count = 1, major = 9, minor = 0, active_clusters = 2, largest_cluster = 16;
  int crowded = -1, largest_crowded = 16;  // a kernel that has less room than others
  cudaError_t error = cudaSuccess;
  cudaError_t occupancy = cudaSuccess;  // what the next question for active clusters is answered with, once
  int64_t calls = 0;
  std::map<const void*, Attributes> attributes;
} device;

cudaError_t noted(cudaError_t error) {
  if (error != cudaSuccess) device.error = error;
  return error;
}

cudaError_t check_device(int index) {
  return noted(index >= 0 && index < device.count ? cudaSuccess : cudaErrorInvalidDevice);
}

// 0: the launch does not say.
unsigned cluster_of(const cudaLaunchConfig_t* config) {
  unsigned cluster = 0;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    const auto& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) cluster = attribute.val.clusterDim.x;
  }
  return cluster;
}

cudaError_t check_launch(const void* kernel, const cudaLaunchConfig_t* config) {
  const Attributes& allowed = device.attributes[kernel];
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const bool clustered = cluster_of(config) > 0;
  const unsigned cluster = clustered ? cluster_of(config) : 1;
  if (config->dynamicSmemBytes > (size_t)allowed.shared_bytes) return noted(cudaErrorInvalidValue);
  const bool legal = grid.x && grid.x < 1u << 31 && grid.y == 1 && grid.z == 1 && block.x && block.x <= 1024 &&
                     block.x % fastgrpo_host::kLanes == 0 && block.y == 1 && block.z == 1 && grid.x % cluster == 0 &&
                     cluster <= (allowed.wide ? 16u : 8u) && (!clustered || device.major >= 9);
  return noted(legal ? cudaSuccess : cudaErrorInvalidConfiguration);
}

}  // namespace

namespace fastgrpo_host {

void count_call() { device.calls++; }

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  count_call();
  const int known = (int)device.attributes.size();
  Attributes& attributes = device.attributes.emplace(kernel, Attributes{48 << 10, false, known}).first->second;
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    attributes.wide = value;
  } else if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
    if (value < -1 || value > 100) return noted(cudaErrorInvalidValue);
  } else if (value < 0 || value > kMaxSharedBytes) {
    return noted(cudaErrorInvalidValue);
  } else {
    attributes.shared_bytes = value;
  }
  return cudaSuccess;
}

cudaError_t active_clusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config) {
  count_call();
  const cudaError_t planted = std::exchange(device.occupancy, cudaSuccess);
  if (planted != cudaSuccess) return noted(planted);
  const int cluster = (int)cluster_of(config);
  if (cluster == 0) return noted(cudaErrorInvalidClusterSize);
  const bool crowded = device.attributes[kernel].number == device.crowded;
  *clusters = cluster <= (crowded ? device.largest_crowded : device.largest_cluster) ? device.active_clusters : 0;
  return check_launch(kernel, config);
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t* config, void (*thread)(void*), void* context) {
  count_call();
  const cudaError_t error = check_launch(kernel, config);
  if (error != cudaSuccess) return error;
  const int cluster = cluster_of(config) ? (int)cluster_of(config) : 1;
  const bool fine =
      run_grid(thread, context, config->gridDim.x, cluster, config->blockDim.x, config->dynamicSmemBytes);
  return noted(fine ? cudaSuccess : cudaErrorLaunchFailure);
}

}  // namespace fastgrpo_host

using fastgrpo_host::count_call;

cudaError_t cudaGetDeviceCount(int* count) {
  count_call();
  *count = device.count;
  return noted(device.count ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int* index) {
  count_call();
  *index = 0;
  return noted(device.count ? cudaSuccess : cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int index) {
  count_call();
  return check_device(index);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  count_call();
  *value = attribute == cudaDevAttrComputeCapabilityMajor         ? device.major
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? kMaxSharedBytes
           : attribute == cudaDevAttrMultiProcessorCount          ? kMultiprocessors
                                                                  : device.minor;
  return check_device(index);
}

cudaError_t cudaGetLastError() {
  count_call();
  return std::exchange(device.error, cudaSuccess);
}

cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (*memory == nullptr) return noted(cudaErrorMemoryAllocation);
  m.allowed.emplace_back((uintptr_t)*memory, (uintptr_t)*memory + bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  const auto same = [&](const auto& range) { return range.first == (uintptr_t)memory; };
  m.allowed.erase(std::remove_if(m.allowed.begin(), m.allowed.end(), same), m.allowed.end());
  free(memory);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorInvalidClusterSize:
      return "cluster misconfiguration";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return m.violation.c_str();
  }
  return "unrecognized error code";
}

extern "C" {

// The order of threads and copies in later launches; 0: in order, with copies as late as can be.
void fastgrpo_host_seed(uint64_t seed) { m.seed = seed; }

// Kernels may touch the global memory that was allowed here, and no other.
void fastgrpo_host_allow(const void* first, int64_t bytes) {
  m.allowed.emplace_back((uintptr_t)first, (uintptr_t)first + bytes);
}
void fastgrpo_host_forget() { m.allowed.clear(); }

// What was wrong in the last launch; empty: nothing.
const char* fastgrpo_host_violation() { return m.violation.c_str(); }

void fastgrpo_host_devices(int count) { device.count = count; }
void fastgrpo_host_capability(int major, int minor) { device.major = major, device.minor = minor; }
void fastgrpo_host_active_clusters(int count) { device.active_clusters = count; }
// Clusters of more blocks than this find no room.
void fastgrpo_host_largest_cluster(int blocks) { device.largest_cluster = blocks; }
// Of the kernel of this number (in the order in which they are prepared), clusters of more blocks than this.
void fastgrpo_host_largest_cluster_of(int kernel, int blocks) {
  device.crowded = kernel, device.largest_crowded = blocks;
}
// The next question for active clusters fails like this.
void fastgrpo_host_fail_occupancy(int error) { device.occupancy = (cudaError_t)error; }
// Calls of the runtime so far.
int64_t fastgrpo_host_calls() { return device.calls; }
// Bulk copies of the last launch: those that keep the phase modulo 128 bytes, that do not, and whose lines go first.
void fastgrpo_host_copies(int64_t* counts) {
  counts[0] = m.bulk_copies.in_phase, counts[1] = m.bulk_copies.out_of_phase, counts[2] = m.bulk_copies.evict_first;
}
// Blocks of the last launch.
int fastgrpo_host_blocks() { return m.grid; }
}
