// Which instruction sets this library holds, and which of them this CPU runs.

#include "dispatch.h"

#include <string.h>

#include "api.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#ifdef FASTGRPO_HAS_AMX
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastgrpo {
namespace {

struct Candidate {
  Isa isa;
  const char* name;
  const Sweeps* sweeps;
  const Products* products;
  const Gather* gather;
  bool runs;
};

#ifdef FASTGRPO_HAS_NEONBF16
bool multiplies_bf16() {
#ifdef __linux__
  return getauxval(AT_HWCAP2) >> 14 & 1;  // HWCAP2_BF16
#else
  return false;
#endif
}
#endif

#ifdef FASTGRPO_HAS_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif

#ifdef FASTGRPO_HAS_AMX
// Tiles and products of bf16 in them, which older compilers cannot ask for; and that the system keeps tiles over a
// switch of threads, which Linux does for processes that say so.
bool has_amx() {
#ifdef __linux__
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c >> 27 & 1) == 0) return false;  // OSXSAVE
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & 1) == 0 || (d >> 24 & 1) == 0) return false;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;  // XTILECFG and XTILEDATA
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first. FASTGRPO_HAS_* come from CMakeLists.txt, beside the files compiled for them.
const Candidate* candidates(int* count) {
  static const Candidate all[] = {
#ifdef FASTGRPO_HAS_AMX
      {kAmx, "amx", avx512::kSweeps, &amx::kProducts, &avx512::kGather, has_avx512() && has_amx()},
#endif
#ifdef FASTGRPO_HAS_AVX512BF16
      {kAvx512Bf16, "avx512bf16", avx512::kSweeps, &avx512bf16::kProducts, &avx512::kGather,
       has_avx512() && __builtin_cpu_supports("avx512bf16")},
#endif
#ifdef FASTGRPO_HAS_AVX512
      {kAvx512, "avx512", avx512::kSweeps, &avx512::kProducts, &avx512::kGather, has_avx512()},
#endif
#ifdef FASTGRPO_HAS_AVX2
      // F16C, which older compilers cannot ask for, came before AVX2.
      {kAvx2, "avx2", avx2::kSweeps, &avx2::kProducts, &avx2::kGather,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
#ifdef FASTGRPO_HAS_NEONBF16
      {kNeonBf16, "neonbf16", neon::kSweeps, &neonbf16::kProducts, &neon::kGather, multiplies_bf16()},
#endif
#ifdef FASTGRPO_HAS_NEON
      {kNeon, "neon", neon::kSweeps, &neon::kProducts, &neon::kGather, true},
#endif
      {kPortable, "portable", portable::kSweeps, &portable::kProducts, &portable::kGather, true},
  };
  *count = sizeof all / sizeof all[0];
  return all;
}

const Candidate* candidate(Isa isa) {
  int count;
  const Candidate* all = candidates(&count);
  for (int i = 0; i < count; ++i) {
    if (all[i].isa == isa && all[i].runs) return all + i;
  }
  return nullptr;
}

}  // namespace

const Sweeps* sweeps_for(Isa isa) {
  const Candidate* found = candidate(isa);
  return found == nullptr ? nullptr : found->sweeps;
}

const Products* products_for(Isa isa) {
  const Candidate* found = candidate(isa);
  return found == nullptr ? nullptr : found->products;
}

const Gather* gather_for(Isa isa) {
  const Candidate* found = candidate(isa);
  return found == nullptr ? nullptr : found->gather;
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
  struct Names {
    char joined[128] = "";
    Names() {
      int count;
      const fastgrpo::Candidate* all = fastgrpo::candidates(&count);
      for (int i = 0; i < count; ++i) {
        if (!all[i].runs) continue;
        if (*joined != '\0') strcat(joined, ",");
        strcat(joined, all[i].name);
      }
    }
  };
  static const Names names;
  return names.joined;
}
