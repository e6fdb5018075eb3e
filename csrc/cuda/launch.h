// Every kernel is launched here: one argument struct by value, with clusters or without. A launch asks the driver
// nothing.

#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace fastgrpo {

struct Launch {
  int64_t blocks;
  int threads;
  int cluster;       // blocks per cluster; 0: no clusters
  int shared_bytes;  // dynamic
  cudaStream_t stream;
};

struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  explicit LaunchConfig(const Launch& launch) {
    config.gridDim = dim3((unsigned)launch.blocks);
    config.blockDim = dim3((unsigned)launch.threads);
    config.dynamicSmemBytes = launch.shared_bytes;
    config.stream = launch.stream;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = launch.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = launch.cluster > 0;
  }
};

// Once per kernel and device, the current one: what blocks and clusters need beyond what every kernel may have.
// Attributes are the kernel's, not a launch's: the same for all, or threads would change them for others.
template <class Arguments>
cudaError_t prepare(void (*kernel)(Arguments), int shared_limit) {
  const struct {
    cudaFuncAttribute name;
    int value;
  } attributes[] = {{cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit},
                    {cudaFuncAttributePreferredSharedMemoryCarveout, 100},
                    {cudaFuncAttributeNonPortableClusterSizeAllowed, 1}};
  cudaError_t error = cudaSuccess;
  for (const auto& attribute : attributes) {
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, attribute.name, attribute.value);
  }
  return error;
}

template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), const Launch& how, const Arguments& arguments) {
  if (how.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  LaunchConfig made(how);
  return cudaLaunchKernelEx(&made.config, kernel, arguments);
}

// How many clusters of this shape the device holds at once; 0 when it cannot run one.
template <class Arguments>
cudaError_t active_clusters(void (*kernel)(Arguments), const Launch& how, int& clusters) {
  LaunchConfig made(how);
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &made.config);
  if (error != cudaErrorInvalidClusterSize) return error;
  (void)cudaGetLastError();  // the answer of a device that knows no cluster of so many blocks, not a failure
  clusters = 0;
  return cudaSuccess;
}

}  // namespace fastgrpo
