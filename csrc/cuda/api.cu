// Which kernels take a call, on the device it names.

#include <map>
#include <mutex>
#include <tuple>

#include "api.h"
#include "kernels.h"
#include "launch.h"

namespace fastgrpo {
namespace {

// Makes a device the current one of this thread, and gives back the one that was.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~OnDevice() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

cudaError_t capability(int device, int& found) {
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  found = 10 * major + minor;
  return error;
}

struct OnePass {
  OnePassShape shape;  // cluster 0: rows like this one take two passes
  int clusters;
};

OnePass find_one_pass(const FastgrpoArgs& args, int device, int cluster) {
  int found = 0, limit = 0;
  if (cluster < 0 || capability(device, found) != cudaSuccess || found < 90) return {};
  if (shared_limit(limit) != cudaSuccess) return {};
  OnePassShape shape = one_pass_shape(args.dtype, args.vocab, cluster, limit);
  while (shape.cluster > 0) {
    if (const int clusters = one_pass_clusters(args, shape)) return {shape, clusters};
    if (cluster > 0 || shape.cluster == 1) break;
    shape =
        one_pass_shape(args.dtype, args.vocab, shape.cluster / 2, limit);  // of fewer blocks, with more memory each
  }
  return {};
}

// find_one_pass on the current device, remembered: to ask the driver takes longer than to launch.
OnePass one_pass_for(const FastgrpoArgs& args, int device, int cluster) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int, bool, int64_t, int>, OnePass> known;
  const bool entropy = args.entropy != nullptr || args.h != nullptr;
  const auto key = std::make_tuple(device, (int)args.dtype, entropy, args.vocab, cluster);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find(key);
  if (at != known.end()) return at->second;
  return known[key] = find_one_pass(args, device, cluster);
}

bool same_phase(const FastgrpoArgs& a) {
  const int64_t size = a.dtype == kFloat32 ? 4 : 2;
  const int64_t apart[] = {(const char*)a.out - (const char*)a.logits,
                           a.batch > 1 ? (a.out_stride[0] - a.logits_stride[0]) * size : 0,
                           a.tokens > 1 ? (a.out_stride[1] - a.logits_stride[1]) * size : 0};
  return apart[0] % 16 == 0 && apart[1] % 16 == 0 && apart[2] % 16 == 0;
}

template <class F>
int32_t on_device(int32_t device, F f) {
  const OnDevice here(device);
  return here.error() != cudaSuccess ? here.error() : f();
}

const char* const kTooOld = "the GPU has a compute capability below 8.0";
const char* const kNoDriver = "there is no NVIDIA driver, or it is older than the CUDA toolkit that built the library";

}  // namespace
}  // namespace fastgrpo

using namespace fastgrpo;

int32_t fastgrpo_cuda_abi(void) { return FASTGRPO_ABI; }

int64_t fastgrpo_cuda_args_size(void) { return sizeof(FastgrpoArgs); }

const char* fastgrpo_cuda_error(int32_t error) { return cudaGetErrorString((cudaError_t)error); }

const char* fastgrpo_cuda_device_unavailable(int32_t device) {
  const OnDevice here(device);
  int found = 0;
  cudaError_t error = here.error();
  if (error == cudaSuccess) error = capability(device, found);
  if (error == cudaSuccess && found < 80) return kTooOld;
  if (error == cudaSuccess) error = loadable();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* fastgrpo_cuda_unavailable(void) {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaErrorInsufficientDriver) return kNoDriver;
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const char* why = "there is no NVIDIA GPU";
  for (int device = 0; device < devices; ++device) {
    why = fastgrpo_cuda_device_unavailable(device);
    if (why == nullptr) break;
  }
  return why;
}

int32_t fastgrpo_cuda_cluster(int32_t dtype, int64_t vocab, int32_t device) {
  FastgrpoArgs args = {};
  args.dtype = dtype;
  args.vocab = vocab;
  const OnDevice here(device);
  return here.error() != cudaSuccess ? 0 : one_pass_for(args, device, 0).shape.cluster;
}

int32_t fastgrpo_cuda_row_stats(const FastgrpoArgs* args, int32_t device, void* stream, int32_t cluster) {
  return on_device(device, [&] {
    const OnePass how = one_pass_for(*args, device, cluster);
    return how.shape.cluster > 0 ? one_pass(*args, how.shape, how.clusters, (cudaStream_t)stream)
                                 : stats(*args, (cudaStream_t)stream);
  });
}

int32_t fastgrpo_cuda_row_grad(const FastgrpoArgs* args, int32_t device, void* stream, int32_t) {
  return on_device(device, [&] { return grad(*args, (cudaStream_t)stream); });
}

int32_t fastgrpo_cuda_token_loss(const FastgrpoArgs* args, int32_t device, void* stream, int32_t cluster) {
  if (args->out != nullptr && !same_phase(*args)) cluster = -1;
  return on_device(device, [&] {
    const OnePass how = one_pass_for(*args, device, cluster);
    if (how.shape.cluster > 0) return one_pass(*args, how.shape, how.clusters, (cudaStream_t)stream);
    const cudaError_t error = stats(*args, (cudaStream_t)stream);
    return error != cudaSuccess || args->out == nullptr ? error : grad(*args, (cudaStream_t)stream);
  });
}

int32_t fastgrpo_cuda_scale(const FastgrpoArgs* args, int32_t device, void* stream, int32_t) {
  return on_device(device, [&] { return scale(*args, (cudaStream_t)stream); });
}
