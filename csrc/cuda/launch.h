// Every kernel is launched here: one argument struct by value, clusters, all the shared memory that a block may have.

#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace fastgrpo {

// Bytes of shared memory that a block may have on the current device.
inline cudaError_t shared_limit(int& bytes) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error
                              : cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

struct Launch {
  int64_t blocks;
  int threads;
  int cluster;       // blocks per cluster; 0: no clusters
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
    if (launch.cluster == 0) return;
    config.numAttrs = 1;
    // Attributes are the kernel's, not the launch's: the same for every launch, or threads would change them for
    // others.
    int limit = 0;
    error = shared_limit(limit);
    const struct {
      cudaFuncAttribute name;
      int value;
    } attributes[] = {{cudaFuncAttributeMaxDynamicSharedMemorySize, limit},
                      {cudaFuncAttributePreferredSharedMemoryCarveout, 100},
                      {cudaFuncAttributeNonPortableClusterSizeAllowed, 1}};
    for (const auto& attribute : attributes) {
      if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, attribute.name, attribute.value);
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
