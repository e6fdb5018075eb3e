// Which kernels take a call, on the device it names.

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

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

// What does not change while a process lives. A driver that answers is asked once; one that fails is asked again.
struct Device {
  int capability, shared_limit, multiprocessors;
};

std::mutex mutex;

cudaError_t ask(int device, Device& about) {
  static std::map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find(device);
  if (at != known.end()) {
    about = at->second;
    return cudaSuccess;
  }
  int major = 0, minor = 0;
  const struct {
    cudaDeviceAttr name;
    int& value;
  } attributes[] = {{cudaDevAttrComputeCapabilityMajor, major},
                    {cudaDevAttrComputeCapabilityMinor, minor},
                    {cudaDevAttrMaxSharedMemoryPerBlockOptin, about.shared_limit},
                    {cudaDevAttrMultiProcessorCount, about.multiprocessors}};
  for (const auto& attribute : attributes) {
    const cudaError_t error = cudaDeviceGetAttribute(&attribute.value, attribute.name, device);
    if (error != cudaSuccess) return error;
  }
  about.capability = 10 * major + minor;
  known[device] = about;
  return cudaSuccess;
}

OnePassShape none(const char* why) {
  OnePassShape shape = {};
  shape.why = why;
  return shape;
}

cudaError_t find_one_pass(const FastgrpoArgs& args, const Device& about, OnePass choice, OnePassShape& shape) {
  shape = none("it takes a GPU of compute capability 9.0 or later");
  if (about.capability < 90) return cudaSuccess;
  // All kernels for such logits, with the entropy and without, whatever the gradient's dtype, must be able to run: the
  // bits of a row depend on its cut, and are the same whatever is asked for.
  std::vector<OnePassKernel> kernels;
  for (const int32_t out : {kFloat32, kBFloat16, kFloat16}) {
    if (args.dtype != kFloat32 && out != args.dtype) continue;
    for (const bool entropy : {false, true}) kernels.push_back({args.dtype, out, entropy});
  }
  const OnePassKernel asked = one_pass_kernel_for(args);
  cudaError_t error = cudaSuccess;
  for (const OnePassKernel& kernel : kernels) {
    if (error == cudaSuccess) error = one_pass_prepare(kernel, about.shared_limit);
  }
  const bool open = choice.cluster == 0;
  const char* why = "the blocks of a cluster have no room for such a row";
  while (error == cudaSuccess) {
    shape = one_pass_shape(args.dtype, args.vocab, choice, about.shared_limit);
    if (shape.cluster == 0) break;
    bool all = true;
    for (const OnePassKernel& kernel : kernels) {
      int clusters = 0;
      if (error == cudaSuccess) error = one_pass_clusters(kernel, shape, clusters);
      all = all && clusters > 0;
      if (kernel.out_dtype == asked.out_dtype && kernel.entropy == asked.entropy) shape.clusters = clusters;
    }
    if (error != cudaSuccess || all) return error;
    why = "the device cannot run a cluster of so many blocks";
    choice.cluster = shape.cluster / 2;  // fewer blocks, with more memory each
    if (!open || choice.cluster == 0) break;
  }
  shape = none(why);
  return error;
}

// find_one_pass on the current device, whose answers are remembered: to ask takes longer than to launch.
cudaError_t one_pass_for(const FastgrpoArgs& args, int device, const OnePass& choice, OnePassShape& shape) {
  static std::map<std::tuple<int, int, int, bool, int64_t, int, int, int>, OnePassShape> known;
  shape = none("two passes were chosen");
  if (choice.cluster < 0) return cudaSuccess;
  Device about;
  cudaError_t error = ask(device, about);
  if (error != cudaSuccess) return error;
  const auto key = std::make_tuple(device, (int)args.dtype, (int)out_dtype(args), wants_entropy(args), args.vocab,
                                   choice.cluster, choice.buffers, choice.blocks);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find(key);
  if (at != known.end()) {
    shape = at->second;
  } else {
    error = find_one_pass(args, about, choice, shape);
    if (error == cudaSuccess) known[key] = shape;
  }
  shape.evict_first = choice.evict_first;
  if (choice.multiprocessors > 0 && shape.cluster > 0) {
    const int most = choice.multiprocessors * shape.blocks / shape.cluster;
    if (most < shape.clusters) shape.clusters = most > 0 ? most : 1;
  }
  return error;
}

// Whether one pass can write the gradient: where bulk copies move it, only if it lies as the logits do modulo 16
// bytes.
bool can_write(const FastgrpoArgs& a) {
  if (out_dtype(a) != a.dtype) return true;
  const int64_t size = a.dtype == kFloat32 ? 4 : 2;
  const int64_t apart[] = {(const char*)a.out - (const char*)a.logits,
                           a.batch > 1 ? (a.out_stride[0] - a.logits_stride[0]) * size : 0,
                           a.tokens > 1 ? (a.out_stride[1] - a.logits_stride[1]) * size : 0};
  return apart[0] % 16 == 0 && apart[1] % 16 == 0 && apart[2] % 16 == 0;
}

cudaError_t how_to(const FastgrpoArgs& args, int device, const OnePass& choice, OnePassShape& shape) {
  if (args.out == nullptr || can_write(args)) return one_pass_for(args, device, choice, shape);
  shape = none("the gradient lies otherwise modulo 16 bytes than the logits");
  return cudaSuccess;
}

// Whether two passes are not what was chosen.
bool refused(const OnePass& choice) {
  return choice.cluster > 0 || (choice.cluster == 0 && (choice.buffers > 0 || choice.blocks > 0));
}

template <class F>
int32_t on_device(int32_t device, F f) {
  const OnDevice here(device);
  return here.error() != cudaSuccess ? here.error() : f();
}

const char* const kTooOld = "the GPU has a compute capability below 8.0";
const char* const kNoDriver = "there is no NVIDIA driver, or it is older than the CUDA toolkit that built the library";

// Null, or why this device cannot run the kernels.
const char* device_unavailable(int32_t device) {
  const OnDevice here(device);
  Device about = {};
  cudaError_t error = here.error();
  if (error == cudaSuccess) error = ask(device, about);
  if (error == cudaSuccess && about.capability < 80) return kTooOld;
  if (error == cudaSuccess) error = loadable();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace
}  // namespace fastgrpo

using namespace fastgrpo;

int32_t fastgrpo_cuda_abi(void) { return FASTGRPO_ABI; }

const FastgrpoField* fastgrpo_cuda_fields(void) { return kArgsFields; }

const char* fastgrpo_cuda_error(int32_t error) {
  return error == FASTGRPO_REFUSED ? "the choice cannot run" : cudaGetErrorString((cudaError_t)error);
}

const char* fastgrpo_cuda_unavailable(void) {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaErrorInsufficientDriver) return kNoDriver;
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const char* why = "there is no NVIDIA GPU";
  for (int device = 0; device < devices; ++device) {
    why = device_unavailable(device);
    if (why == nullptr) break;
  }
  return why;
}

int32_t fastgrpo_cuda_one_pass(const FastgrpoArgs* args, int32_t device, const FastgrpoOnePass* choice,
                               FastgrpoOnePassShape* shape) {
  return on_device(device, [&] { return how_to(*args, device, *choice, *shape); });
}

int32_t fastgrpo_cuda_row_stats(const FastgrpoArgs* args, int32_t device, void* stream,
                                const FastgrpoOnePass* choice) {
  return fastgrpo_cuda_token_loss(args, device, stream, choice);  // without args->loss and args->out
}

int32_t fastgrpo_cuda_row_grad(const FastgrpoArgs* args, int32_t device, void* stream, const FastgrpoOnePass*) {
  return on_device(device, [&] { return grad(*args, (cudaStream_t)stream); });
}

int32_t fastgrpo_cuda_token_loss(const FastgrpoArgs* args, int32_t device, void* stream,
                                 const FastgrpoOnePass* choice) {
  return on_device(device, [&]() -> int32_t {
    FastgrpoArgs first = *args;
    // A gradient that bulk copies cannot bring there takes a second pass; the statistics are those of any other call.
    if (args->out != nullptr && !can_write(*args) && !refused(*choice)) first.out = nullptr;
    OnePassShape shape;
    cudaError_t error = how_to(first, device, *choice, shape);
    if (error != cudaSuccess) return error;
    const bool held = shape.cluster > 0;
    if (!held && refused(*choice)) return FASTGRPO_REFUSED;
    if (args->loss != nullptr && args->rewards != nullptr) error = advantages_of_groups(*args, (cudaStream_t)stream);
    if (error != cudaSuccess) return error;
    error = held ? one_pass(first, shape, (cudaStream_t)stream) : stats(first, (cudaStream_t)stream);
    const bool done = args->out == nullptr || (held && first.out != nullptr);
    return error != cudaSuccess || done ? error : grad(*args, (cudaStream_t)stream);
  });
}

int32_t fastgrpo_cuda_scale(const FastgrpoArgs* args, int32_t device, void* stream, const FastgrpoOnePass*) {
  return on_device(device, [&] {
    Device about;
    const cudaError_t error = ask(device, about);
    return error != cudaSuccess ? error : scale(*args, about.multiprocessors, (cudaStream_t)stream);
  });
}
