// Which instruction sets this library holds, and which of them this CPU runs.

#include <string.h>

#include <string>

#include "api.h"
#include "sweeps.h"

namespace fastgrpo {
namespace {

struct Candidate {
  Isa isa;
  const char* name;
  const Sweeps* table;
  bool runs;
};

// Best first. FASTGRPO_HAS_* come from CMakeLists.txt, beside the files compiled for them.
const Candidate* candidates(int* count) {
  static const Candidate all[] = {
#ifdef FASTGRPO_HAS_AVX512
      {kAvx512, "avx512", avx512::kSweeps,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")},
#endif
#ifdef FASTGRPO_HAS_AVX2
      // F16C, which older compilers cannot ask for, came before AVX2.
      {kAvx2, "avx2", avx2::kSweeps, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#ifdef FASTGRPO_HAS_NEON
      {kNeon, "neon", neon::kSweeps, true},
#endif
      {kPortable, "portable", portable::kSweeps, true},
  };
  *count = sizeof all / sizeof all[0];
  return all;
}

}  // namespace

const Sweeps* sweeps_for(Isa isa) {
  int count;
  const Candidate* all = candidates(&count);
  for (int i = 0; i < count; ++i) {
    if (all[i].isa == isa && all[i].runs) return all[i].table;
  }
  return nullptr;
}

}  // namespace fastgrpo

int32_t fastgrpo_cpu_isa(const char* name) {
  int count;
  const fastgrpo::Candidate* all = fastgrpo::candidates(&count);
  const bool any = name == nullptr || *name == '\0';
  for (int i = 0; i < count; ++i) {
    if (any ? all[i].runs : strcmp(all[i].name, name) == 0) return all[i].runs ? all[i].isa : -2;
  }
  return -1;
}

const char* fastgrpo_cpu_isa_names(void) {
  static const std::string names = [] {
    int count;
    const fastgrpo::Candidate* all = fastgrpo::candidates(&count);
    std::string joined;
    for (int i = 0; i < count; ++i) {
      if (all[i].runs) joined += (joined.empty() ? "" : ",") + std::string(all[i].name);
    }
    return joined;
  }();
  return names.c_str();
}
