// Rows over threads, and what happens to one row: sweep, objective, sweep.

#include "api.h"

#include <math.h>
#include <string.h>

#include <atomic>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#include "elements.h"
#include "sweeps.h"

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastgrpo {
namespace {

using Args = FastgrpoArgs;

constexpr double kLog2E = 1.4426950408889634;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

int64_t element_size(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

float read_element(const void* row, int64_t j, int32_t dtype) {
  if (dtype == kBFloat16) return to_float(((const BFloat16*)row)[j]);
  if (dtype == kFloat16) return to_float(((const Float16*)row)[j]);
  return ((const float*)row)[j];
}

void write_element(float x, void* row, int64_t j, int32_t dtype) {
  if (dtype == kBFloat16) {
    from_float(x, (BFloat16*)row + j);
  } else if (dtype == kFloat16) {
    from_float(x, (Float16*)row + j);
  } else {
    ((float*)row)[j] = x;
  }
}

// One row of a call: where it stands, and the scale of its exponents.
struct Row {
  const Args& args;
  const Sweeps* table;  // indexed by DType
  const void* logits;
  void* out;
  int32_t dtype;   // of source()
  float* capped;   // with a softcap: its logits in fp32, which the sweeps take for the row's; else null
  int64_t target;  // -1 when the id is out of range
  float inv_temperature;
  float c;      // exponent in base 2 per logit
  double unit;  // log(2), but such that z = t * unit holds in spite of the rounding of c

  Row(const Args& a, const Sweeps* table, int64_t r) : args(a), table(table), dtype(a.dtype), capped(nullptr) {
    const int64_t b = r / a.tokens, t = r % a.tokens;
    const int64_t from = b * a.logits_stride[0] + t * a.logits_stride[1];
    const int64_t to = b * a.out_stride[0] + t * a.out_stride[1];
    logits = (const char*)a.logits + from * element_size(a.dtype);
    out = a.out == nullptr ? nullptr : (char*)a.out + to * element_size(a.out_dtype);
    target = a.ids[r] >= 0 && a.ids[r] < a.vocab ? a.ids[r] : -1;
    inv_temperature = a.inv_temperature[r];
    c = (float)(inv_temperature * kLog2E);
    unit = inv_temperature / (double)c;
  }

  // Before the row is read.
  void cap() {
    if (args.softcap == INFINITY) return;
    thread_local std::vector<float> scratch;
    scratch.resize(args.vocab + kCapPadding);
    capped = scratch.data();
    sweeps().cap(logits, capped, args.vocab, args.softcap);
    dtype = kFloat32;
  }

  const Sweeps& sweeps() const { return table[dtype]; }
  const void* source() const { return capped == nullptr ? logits : capped; }

  void zero_gradient() const { memset(out, 0, args.vocab * element_size(args.out_dtype)); }

  void gradient(double lse2, float g, float h, float entropy, const void* next) const {
    void* const sink = capped == nullptr ? out : capped;
    const int32_t sink_dtype = capped == nullptr ? args.out_dtype : kFloat32;
    const double logit = target < 0 ? 0.0 : read_element(source(), target, dtype);  // before it is overwritten
    const double scale = inv_temperature;
    const double constant = h == 0 ? -scale * g : -scale * (g + (double)h * entropy);
    const RowGradient gradient = {lse2, (float)constant, (float)(-scale * h * unit)};
    sweeps().gradient[sink_dtype](source(), sink, args.vocab, c, gradient, next);
    if (target >= 0) {
      // g*(1 - p) keeps its digits when p is near 1.
      const double lp = (logit * c - lse2) * unit, p = exp(lp);
      double value = -g * expm1(lp);
      if (h != 0 && p != 0) value -= h * p * (lp + entropy);
      write_element((float)(scale * value), sink, target, sink_dtype);
    }
    if (capped == nullptr) return;
    table[args.dtype].uncap[args.out_dtype](logits, capped, out, args.vocab, args.softcap);
  }
};

struct Score {
  double lse2;  // of the exponents in base 2, unrounded: the gradient of the same pass takes this one
  float logp, lse, entropy;
};

Score score(const Row& row, bool want_entropy) {
  const RowSums others = row.sweeps().stats(row.source(), row.args.vocab, row.target, row.c, want_entropy);
  Score s;
  double sum = others.sum, logp = kNaN;
  double t = -INFINITY;  // of the target, from ref
  if (row.target >= 0) {
    t = (double)read_element(row.source(), row.target, row.dtype) * row.c - others.ref;
    const double e = exp2(t);
    sum += e;
    logp = others.sum <= e ? -log1p(others.sum / e) : t * row.unit - log(sum);
  }
  const double log_sum = log(sum);
  s.logp = (float)logp;
  s.lse2 = others.ref + log_sum / row.unit;
  s.lse = (float)(others.ref * row.unit + log_sum);
  s.entropy = 0.0f;
  if (want_entropy) {
    // log_sum - mean, with the target's share drawn out of both: no digits are lost when its p is near 1.
    const bool has_share = t - t == 0;
    const double from = has_share ? -logp : log_sum, shift = has_share ? t * others.sum : 0.0;
    s.entropy = (float)(from + (shift - others.weighted) / sum * row.unit);
  }
  return s;
}

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
    s = score(row, a.entropy != nullptr);
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
  row.gradient(a.lse[r] / row.unit, a.g[r], h, h == 0 ? 0.0f : a.entropy[r], nullptr);
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
    s = score(row, a.entropy != nullptr || h != 0);
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
    row.gradient(s.lse2, result.dlogp, h, s.entropy, row_to_fetch(row, r + 1, end));
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
  std::atomic<int64_t> next(0);
  const auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < rows;) {
      const int64_t end = begin + chunk < rows ? begin + chunk : rows;
      for (int64_t r = begin; r < end; ++r) f(args, table, r, end);
    }
  };
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < threads; ++i) {
    try {
      helpers.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // no more threads to be had: those that run take all rows
    }
  }
  work();
  for (std::thread& helper : helpers) helper.join();
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

void fastgrpo_cpu_row_stats(const FastgrpoArgs* args, int32_t isa, int32_t threads) {
  fastgrpo::for_each_row(*args, isa, threads, fastgrpo::stats_row);
}

void fastgrpo_cpu_row_grad(const FastgrpoArgs* args, int32_t isa, int32_t threads) {
  fastgrpo::prefer_large_pages_out(*args);
  fastgrpo::for_each_row(*args, isa, threads, fastgrpo::gradient_row);
}

void fastgrpo_cpu_token_loss(const FastgrpoArgs* args, int32_t isa, int32_t threads) {
  fastgrpo::prefer_large_pages_out(*args);
  fastgrpo::advantages_of_groups(*args);
  fastgrpo::for_each_row(*args, isa, threads, fastgrpo::loss_row);
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
