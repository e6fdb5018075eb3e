// Rows over threads, and what happens to one: sweep, objective, sweep.

#include "api.h"

#include "dispatch.h"
#include "row.h"
#include "threads.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastgrpo {
namespace {

using Args = FastgrpoArgs;

// Fills in the gradient of rows that nothing has to be read for, and says so.
bool zero_row(const Row& row, float g, float h) {
  if (!(g == 0 && h == 0)) return false;
  row.zero_gradient();
  return true;
}

void stats_row(const Args& a, const Sweeps* table, int64_t r, int64_t) {
  Score s = {0.0, 0.0f, 0.0f, 0.0f};
  if (a.mask[r]) {
    Row row(a, table, r);
    row.cap();
    s = row.score(a.entropy != nullptr);
  }
  a.logp[r] = s.logp;
  a.lse[r] = s.lse;
  if (a.entropy != nullptr) a.entropy[r] = s.entropy;
}

void gradient_row(const Args& a, const Sweeps* table, int64_t r, int64_t) {
  Row row(a, table, r);
  const float h = a.h == nullptr ? 0.0f : a.h[r];
  if (zero_row(row, a.g[r], h)) return;
  row.cap();
  row.gradient(a.lse[r] / row.scale.unit, a.logp[r], a.g[r], h, h == 0 ? 0.0f : a.entropy[r], nullptr);
}

// The logits of row r, if this thread reads them next and they fit into L2 beside the present row.
const void* row_to_fetch(const Row& present, int64_t r, int64_t end) {
  const Args& a = present.args;
  if (r >= end || !a.mask[r] || a.softcap != INFINITY || a.vocab * element_size(a.dtype) > 384 << 10) return nullptr;
  return Row(a, present.table, r).logits;
}

void loss_row(const Args& a, const Sweeps* table, int64_t r, int64_t end) {
  Row row(a, table, r);
  const float h = a.h == nullptr ? 0.0f : a.h[r];
  bool scored = a.mask[r] != 0;
  float advantage = 0;
  if (scored) {
    advantage = a.advantages[a.rewards == nullptr ? r : a.seq[r]];
    if (a.skip_zero && advantage == 0 && a.spec.beta == 0 && a.h == nullptr) scored = false;
  }
  Score s = {0.0, 0.0f, 0.0f, 0.0f};
  ObjectiveResult result = {0.0f, 0.0f, 0.0f, 0.0f};
  if (scored) {
    row.cap();
    s = row.score(a.entropy != nullptr || h != 0);
    result =
        objective(a.spec, {s.logp, a.old != nullptr ? a.old[r] : 0.0f, a.ref != nullptr ? a.ref[r] : 0.0f, advantage,
                           a.weight[r], a.policy_scale != nullptr ? a.policy_scale[r] : 1.0f, a.old != nullptr});
    if (h != 0) result.loss += h * s.entropy;
  }
  a.loss[r] = result.loss;
  a.logp[r] = s.logp;
  a.lse[r] = s.lse;
  if (a.entropy != nullptr) a.entropy[r] = s.entropy;
  a.kl[r] = result.kl;
  a.ratio[r] = result.ratio;
  a.g[r] = result.dlogp;
  if (a.out == nullptr) return;
  if (!scored) {
    row.zero_gradient();
  } else if (!zero_row(row, result.dlogp, h)) {
    row.gradient(s.lse2, s.logp, result.dlogp, h, s.entropy, row_to_fetch(row, r + 1, end));
  }
}

// Calls f(args, table, r, end) for every row, where the rows before `end` follow on the same thread. A thread is
// started for every half million elements (about 0.2 ms of work) at the most, and rows are handed out a few at a time,
// because masked ones take no time at all.
template <class F>
void for_each_row(const Args& args, int32_t isa, int32_t max_threads, F f) {
  const int64_t rows = args.batch * args.tokens;
  if (rows == 0) return;
  const Sweeps* const table = sweeps_for((Isa)isa);
  const int64_t worth = rows * args.vocab >> 19;
  int64_t threads = max_threads < worth ? max_threads : worth;
  threads = threads < rows ? threads : rows;
  const int64_t chunk = threads > 1 && rows >= threads * 32 ? rows / (threads * 16) : 1;
  share((rows + chunk - 1) / chunk, threads, [&](const auto& next) {
    for (int64_t i; (i = next()) >= 0;) {
      const int64_t end = (i + 1) * chunk < rows ? (i + 1) * chunk : rows;
      for (int64_t r = i * chunk; r < end; ++r) f(args, table, r, end);
    }
  });
}

void advantages_of_groups(const Args& a) {
  for (int64_t s = 0; a.rewards != nullptr && s < a.sequences; ++s) {
    a.advantages[s] = group_advantage(a.rewards, s, a.group_size, a.scale_by_std != 0);
  }
}

void prefer_large_pages_out(const Args& args) {
  const bool contiguous = (args.tokens == 1 || args.out_stride[1] == args.vocab) &&
                          (args.batch == 1 || args.out_stride[0] == args.tokens * args.vocab);
  if (args.out == nullptr || args.out == args.logits || !contiguous) return;
  fastgrpo_cpu_prefer_large_pages(args.out, args.batch * args.tokens * args.vocab * element_size(args.out_dtype));
}

}  // namespace
}  // namespace fastgrpo

int32_t fastgrpo_cpu_abi(void) { return FASTGRPO_ABI; }

const FastgrpoField* fastgrpo_cpu_fields(void) { return fastgrpo::kArgsFields; }

const char* fastgrpo_cpu_error(int32_t error) {
  return error == FASTGRPO_NO_MEMORY ? "not enough memory" : "the library failed";
}

int32_t fastgrpo_cpu_row_stats(const FastgrpoArgs* args, int32_t isa, int32_t threads) {
  return fastgrpo::error_of([&] { fastgrpo::for_each_row(*args, isa, threads, fastgrpo::stats_row); });
}

int32_t fastgrpo_cpu_row_grad(const FastgrpoArgs* args, int32_t isa, int32_t threads) {
  return fastgrpo::error_of([&] {
    fastgrpo::prefer_large_pages_out(*args);
    fastgrpo::for_each_row(*args, isa, threads, fastgrpo::gradient_row);
  });
}

int32_t fastgrpo_cpu_token_loss(const FastgrpoArgs* args, int32_t isa, int32_t threads) {
  return fastgrpo::error_of([&] {
    fastgrpo::prefer_large_pages_out(*args);
    fastgrpo::advantages_of_groups(*args);
    fastgrpo::for_each_row(*args, isa, threads, fastgrpo::loss_row);
  });
}

void fastgrpo_cpu_prefer_large_pages(void* buffer, int64_t bytes) {
#ifdef __linux__
  if (bytes < 8 << 20) return;
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  const uintptr_t begin = ((uintptr_t)buffer + page - 1) / page * page;
  const uintptr_t end = ((uintptr_t)buffer + bytes) / page * page;
  madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
  (void)buffer, (void)bytes;
#endif
}
