// Every kernel is launched here: one argument struct by value, clusters, shared memory beyond the default limit.

#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace fastgrpo {

struct Launch {
  int64_t blocks;
  int threads;
  int cluster;       // blocks per cluster; 1: none
  int shared_bytes;  // dynamic
  cudaStream_t stream;
};

template <class Arguments>
struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};
  cudaError_t error = cudaSuccess;

  LaunchConfig(void (*kernel)(Arguments), const Launch& launch) {
    config.gridDim = dim3((unsigned)launch.blocks);
    config.blockDim = dim3((unsigned)launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = launch.stream;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = launch.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = launch.cluster > 1 ? 1 : 0;
    if (launch.shared_bytes > 48 << 10) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_bytes);
    }
    if (error == cudaSuccess && launch.cluster > 8) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
  }
};

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), const Launch& how, const Arguments& arguments) {
  if (how.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  LaunchConfig<Arguments> made(kernel, how);
  return made.error != cudaSuccess ? made.error : cudaLaunchKernelEx(&made.config, kernel, arguments);
}

// How many clusters of this shape the device holds at once; 0 when it cannot run one.
template <class Arguments>
int active_clusters(void (*kernel)(Arguments), const Launch& how) {
  LaunchConfig<Arguments> made(kernel, how);
  int clusters = 0;
  const bool ok =
      made.error == cudaSuccess && cudaOccupancyMaxActiveClusters(&clusters, kernel, &made.config) == cudaSuccess;
  if (!ok) (void)cudaGetLastError();  // an answer, not an error for whoever asks next
  return ok ? clusters : 0;
}

}  // namespace fastgrpo
