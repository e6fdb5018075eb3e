// Runs every kernel of csrc/cuda at ragged shapes against loops in double, without torch: for compute-sanitizer, which
// wants a small program, and for a first look at a new machine.
//
//   driver [--quick] [--filter TEXT]
//
// Prints a line per case and how far it is off, in units of what is allowed. Exits with 1 when a number is wrong, an
// element around the rows was touched, CUDA gave an error or nothing ran. Every tensor is an allocation of its own, to
// the byte, so that memcheck sees what reaches past it. --quick: two lengths of rows instead of seven.

#include <cuda_runtime.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <string>
#include <vector>

#include "api.h"
#include "cpu/elements.h"

using namespace fastgrpo;

namespace {

// ---- the device

void check(int32_t error, const char* what) {
  if (error == 0) return;
  printf("ERROR  %s: %s\n", what, fastgrpo_cuda_error(error));
  exit(1);
}

template <class T>
class Memory {
 public:
  explicit Memory(const std::vector<T>& values) : count_(values.size()) {
    check(cudaMalloc((void**)&at_, count_ * sizeof(T)), "cudaMalloc");
    check(cudaMemcpy(at_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~Memory() { (void)cudaFree(at_); }
  Memory(const Memory&) = delete;
  T* get() const { return at_; }
  template <class U = T>  // what the bytes are as elements of U
  std::vector<U> values() const {
    std::vector<U> copy(count_ * sizeof(T) / sizeof(U));
    check(cudaMemcpy(copy.data(), at_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return copy;
  }

 private:
  T* at_ = nullptr;
  size_t count_;
};

// ---- numbers

constexpr float kUntouched = -77.0f;  // around rows, and in results before they are written; exact in every dtype

// The n-th of a sequence, evenly spread over [-1, 1).
double spread(uint64_t n, uint64_t sequence) {
  uint64_t z = (n + 1) * 0x9e3779b97f4a7c15 + sequence * 0xd1b54a32d192ed03;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return (double)((z ^ z >> 31) >> 11) * 0x1p-52 - 1;
}

struct Float32Traits {
  using Type = float;
  static constexpr int32_t kDType = kFloat32;
  static constexpr double kRounding = 1e-5;
  static constexpr const char* kName = "fp32";
};
struct BFloat16Traits {
  using Type = BFloat16;
  static constexpr int32_t kDType = kBFloat16;
  static constexpr double kRounding = 0x1p-8;
  static constexpr const char* kName = "bf16";
};
struct Float16Traits {
  using Type = Float16;
  static constexpr int32_t kDType = kFloat16;
  static constexpr double kRounding = 0x1p-11;
  static constexpr const char* kName = "fp16";
};

// ---- what is run

enum Kernel { kStats, kToken, kGrad, kScale };
enum Out { kNone, kInPlace, kApart, kOtherPhase, kSecondHalf };
const char* const kOuts[] = {"", ", in place", ", apart", ", apart and otherwise modulo 16",
                             ", in the second half of the rows"};

struct Case {
  Kernel kernel;
  int vocab;
  Out out = kNone;
  bool entropy = false;  // wanted, and for a gradient its coefficient h too
  FastgrpoOnePass choice = {};
  float factor = 0;
  bool groups = false;  // advantages are made of rewards
};

std::string name_of(const Case& c, const std::string& dtype) {
  const char* const kernels[] = {"row_stats", "token_loss", "row_grad", "scale"};
  char name[256];
  int n = snprintf(name, sizeof name, "%s %s V=%d", kernels[c.kernel], dtype.c_str(), c.vocab);
  const auto add = [&](const char* format, auto value) { n += snprintf(name + n, sizeof name - n, format, value); };
  if (c.kernel == kStats || c.kernel == kToken) {
    if (c.choice.cluster < 0) add("%s", ", two passes");
    if (c.choice.cluster > 0) add(", cluster %d", c.choice.cluster);
    if (c.choice.buffers > 0) add(", %d buffers", c.choice.buffers);
    if (c.choice.blocks > 0) add(", %d to a multiprocessor", c.choice.blocks);
    if (!c.choice.evict_first) add("%s", ", usual eviction");
  }
  if (c.groups) add("%s", ", groups");
  if (c.kernel == kScale) add(", factor %g", c.factor);
  if (c.entropy) add("%s", ", entropy");
  add("%s", kOuts[c.out]);
  return name;
}

// Compares numbers; remembers what is furthest off.
struct Comparison {
  double worst = 0;
  std::string first;  // wrong one

  void near(const char* what, int64_t row, int64_t at, double got, double want, double allowed) {
    const double off = got == want ? 0 : fabs(got - want) / allowed;
    if (!(off <= worst)) worst = off;
    if (off <= 1 || !first.empty()) return;
    char text[160];
    snprintf(text, sizeof text, "%s of row %lld, element %lld: %.9g, not %.9g", what, (long long)row, (long long)at,
             got, want);
    first = text;
  }
};

// ---- truth

constexpr int kBatch = 3, kTokens = 2, kRows = kBatch * kTokens;
constexpr int kMasked = 1, kWithoutAdvantage = 4;  // rows
constexpr double kClipLow = 0.8, kClipHigh = 1.2, kBeta = 0.1;

struct Row {
  double logp, lse, entropy;
  std::vector<double> p, log_p;
};

Row statistics(const std::vector<double>& x, int64_t id, double inv_temperature) {
  Row row = {};
  double top = -INFINITY, sum = 0;
  for (double value : x) top = fmax(top, value * inv_temperature);
  for (double value : x) sum += exp(value * inv_temperature - top);
  row.lse = top + log(sum);
  for (double value : x) {
    row.log_p.push_back(value * inv_temperature - row.lse);
    row.p.push_back(exp(row.log_p.back()));
    row.entropy -= row.p.back() * row.log_p.back();
  }
  row.logp = row.log_p[id];
  return row;
}

struct Result {
  double loss, kl, ratio, g;
};

// The clipped objective with a KL term and an entropy's coefficient, and its derivative by logp.
Result clipped(double logp, double entropy, double old_logp, double ref_logp, double advantage, double weight,
               double h) {
  const double ratio = exp(logp - old_logp), clipped = fmin(fmax(ratio, kClipLow), kClipHigh);
  const bool bounded = clipped * advantage < ratio * advantage;
  const double q = ref_logp - logp, kl = expm1(q) - q;
  const double loss = -fmin(ratio * advantage, clipped * advantage) + kBeta * kl;
  const double slope = (bounded ? 0 : -ratio * advantage) - kBeta * expm1(q);
  return {weight * loss + h * entropy, kl, ratio, weight * slope};
}

// ---- a case

template <class Traits, class OutTraits = Traits>  // of the logits, and of the gradient
class Run {
 public:
  using Type = typename Traits::Type;
  using OutType = typename OutTraits::Type;

  explicit Run(const Case& c) : case_(c), vocab_(c.vocab), offset_(c.vocab % 7), stride_(c.vocab + c.vocab % 5) {}

  // False: the choice cannot run here, and nothing did.
  bool run(Comparison& comparison) {
    std::vector<Type> logits(size(), element<Type>(kUntouched));
    each([&](int64_t row, int64_t, int64_t at) {
      logits[at] = element<Type>(4 * (spread(at, 1) + spread(at, 2) + spread(at, 3)) * (row == 2 ? 5 : 1));
    });
    return case_.kernel == kScale ? scale(logits, comparison) : sweep(logits, comparison);
  }

 private:
  template <class T>
  static T element(double x) {
    T value;
    from_float((float)x, &value);
    return value;
  }

  // Rows lie `stride` apart, the first one `offset` elements from the start.
  int64_t size() const { return offset_ + (kRows - 1) * stride_ + (case_.out == kSecondHalf ? stride_ : vocab_); }
  int64_t start(int64_t row) const { return offset_ + row * stride_; }
  int shift() const { return case_.out == kApart ? (int)(64 / sizeof(OutType)) : case_.out == kOtherPhase ? 1 : 0; }
  int64_t start_out(int64_t row) const {
    return case_.out == kSecondHalf ? 2 * start(row) + stride_ : start(row) + shift();
  }

  template <class F>
  void each(F f, bool out = false) const {
    for (int64_t row = 0; row < kRows; ++row) {
      for (int64_t j = 0; j < vocab_; ++j) f(row, j, (out ? start_out(row) : start(row)) + j);
    }
  }

  FastgrpoArgs arguments(const Memory<Type>& logits) const {
    FastgrpoArgs args = {};
    args.batch = kBatch, args.tokens = kTokens, args.vocab = vocab_;
    args.dtype = Traits::kDType;
    args.out_dtype = OutTraits::kDType;
    args.logits = logits.get() + offset_;
    const int64_t wider = case_.out == kSecondHalf ? 2 : 1;
    args.logits_stride[0] = kTokens * stride_, args.out_stride[0] = wider * args.logits_stride[0];
    args.logits_stride[1] = stride_, args.out_stride[1] = wider * stride_;
    return args;
  }

  void check_around(const std::vector<OutType>& values, const std::vector<OutType>& before,
                    Comparison& comparison) const {
    std::vector<char> inside(values.size());
    each([&](int64_t, int64_t, int64_t at) { inside[at] = 1; }, true);
    for (size_t at = 0; at < values.size(); ++at) {
      if (inside[at] || memcmp(&values[at], &before[at], sizeof(OutType)) == 0) continue;
      comparison.near("what is around rows", 0, at, to_float(values[at]), to_float(before[at]), 1e-30);
    }
  }

  bool scale(const std::vector<Type>& before, Comparison& comparison) {
    const Memory<Type> x(before);
    const Memory<float> factor({case_.factor});
    FastgrpoArgs args = arguments(x);
    args.weight = factor.get();
    check(fastgrpo_cuda_scale(&args, 0, nullptr, &case_.choice), "scale");
    const std::vector<Type> after = x.values();
    each([&](int64_t row, int64_t j, int64_t at) {
      const Type want = element<Type>(to_float(before[at]) * case_.factor);  // rounded once, by both
      comparison.near("product", row, j, to_float(after[at]), to_float(want), 1e-30);
    });
    if constexpr (sizeof(Type) == sizeof(OutType)) check_around(after, before, comparison);
    return true;
  }

  bool sweep(const std::vector<Type>& values, Comparison& comparison) {
    std::vector<Row> truth;
    std::vector<int64_t> ids;
    std::vector<uint8_t> mask;
    std::vector<float> inv_temperature, old_logps, ref_logps, advantages, weight, h, g;
    for (int64_t row = 0; row < kRows; ++row) {
      ids.push_back((int64_t)((spread(row, 4) + 1) / 2 * (double)vocab_));
      mask.push_back(row != kMasked);
      inv_temperature.push_back((float)(1 + 0.4 * spread(row, 5)));
      std::vector<double> x;
      for (int64_t j = 0; j < vocab_; ++j) x.push_back(to_float(values[start(row) + j]));
      truth.push_back(statistics(x, ids.back(), inv_temperature.back()));
      old_logps.push_back((float)(truth.back().logp + 0.3 * spread(row, 6)));
      ref_logps.push_back((float)(truth.back().logp + 0.5 * spread(row, 7)));
      advantages.push_back(row == kWithoutAdvantage ? 0.0f : (float)(2 * spread(row, 8)));
      weight.push_back((float)(0.2 + 0.1 * spread(row, 9)));
      h.push_back(case_.entropy ? (float)spread(row, 10) : 0.0f);
      g.push_back(row == kWithoutAdvantage ? 0.0f : (float)spread(row, 11));
    }
    std::vector<float> rewards;
    std::vector<int32_t> seq;
    for (int b = 0; b < kBatch; ++b) rewards.push_back((float)(2 * spread(b, 12)));
    for (int64_t row = 0; row < kRows; ++row) {
      seq.push_back((int32_t)(row / kTokens));
      double mean = 0;
      for (const float reward : rewards) mean += reward / (double)kBatch;
      if (case_.groups) advantages[row] = (float)(rewards[seq.back()] - mean);
    }
    if (case_.kernel == kGrad) h[kWithoutAdvantage] = 0.0f;  // a row without any gradient

    const Memory<Type> logits(values);
    const bool within = case_.out == kInPlace || case_.out == kSecondHalf;
    const std::vector<OutType> untouched(size() + shift(), element<OutType>(kUntouched));
    const Memory<OutType> apart(case_.out == kNone ? std::vector<OutType>(1) : untouched);
    const std::vector<OutType> before = within ? logits.template values<OutType>() : untouched;
    const Memory<int64_t> at_ids(ids);
    const Memory<uint8_t> at_mask(mask);
    const Memory<float> at_inv_temperature(inv_temperature), at_old(old_logps), at_ref(ref_logps);
    const Memory<float> at_rewards(rewards), at_scratch(std::vector<float>(kBatch, kUntouched));
    const Memory<int32_t> at_seq(seq);
    const Memory<float> at_advantages(advantages), at_weight(weight), at_h(h), at_g(g);
    std::vector<std::unique_ptr<Memory<float>>> results;
    for (int i = 0; i < 7; ++i) results.emplace_back(new Memory<float>(std::vector<float>(kRows, kUntouched)));
    const auto& [logp, lse, entropy, loss, kl, ratio, dlogp] =
        *(const std::unique_ptr<Memory<float>>(*)[7]) & results[0];

    FastgrpoArgs args = arguments(logits);
    args.ids = at_ids.get();
    args.inv_temperature = at_inv_temperature.get();
    if (case_.out != kNone) args.out = (within ? (OutType*)logits.get() : apart.get()) + start_out(0);
    args.lse = lse->get();
    if (case_.entropy) args.entropy = entropy->get();
    if (case_.kernel == kGrad) {
      std::vector<float> given_logp, given_lse, given_entropy;
      for (const Row& row : truth) {
        given_logp.push_back((float)row.logp), given_lse.push_back((float)row.lse);
        given_entropy.push_back((float)row.entropy);
      }
      const Memory<float> at_logp(given_logp), at_lse(given_lse), at_entropy(given_entropy);
      args.logp = at_logp.get();
      args.lse = at_lse.get();
      args.entropy = case_.entropy ? at_entropy.get() : nullptr;
      args.g = at_g.get();
      args.h = case_.entropy ? at_h.get() : nullptr;
      check(fastgrpo_cuda_row_grad(&args, 0, nullptr, &case_.choice), "row_grad");
      check(cudaDeviceSynchronize(), "row_grad");
    } else {
      args.mask = at_mask.get();
      args.logp = logp->get();
      if (case_.kernel == kToken) {
        args.spec = {kClip, {(float)kClipLow, (float)kClipHigh, INFINITY, INFINITY}, (float)kBeta, 0, INFINITY};
        args.weight = at_weight.get(), args.advantages = at_advantages.get();
        if (case_.groups) {
          args.group_size = args.sequences = kBatch;
          args.rewards = at_rewards.get(), args.seq = at_seq.get(), args.advantages = at_scratch.get();
        }
        args.old = at_old.get(), args.ref = at_ref.get();
        args.h = case_.entropy ? at_h.get() : nullptr;
        args.loss = loss->get(), args.kl = kl->get(), args.ratio = ratio->get(), args.g = dlogp->get();
      }
      const auto call = case_.kernel == kToken ? fastgrpo_cuda_token_loss : fastgrpo_cuda_row_stats;
      const int32_t error = call(&args, 0, nullptr, &case_.choice);
      if (error == FASTGRPO_REFUSED) return false;
      check(error, "call");
      check(cudaDeviceSynchronize(), "kernel");
    }

    // A row's numbers, and what its gradient is made of.
    const std::vector<float> got[] = {logp->values(), lse->values(),   entropy->values(), loss->values(),
                                      kl->values(),   ratio->values(), dlogp->values()};
    std::vector<double> slopes, sizes;  // dL/dlogp, and what its terms come to without their signs
    for (int64_t r = 0; r < kRows; ++r) {
      const Row& row = truth[r];
      const Result result = clipped(row.logp, row.entropy, old_logps[r], ref_logps[r], advantages[r], weight[r], h[r]);
      const double terms = weight[r] * (result.ratio * fabs(advantages[r]) + kBeta * (1 + result.kl));
      slopes.push_back(case_.kernel == kGrad ? g[r] : mask[r] ? result.g : 0);
      sizes.push_back(case_.kernel == kGrad ? fabs(g[r]) : mask[r] ? terms : 0);
      if (case_.kernel == kGrad) continue;
      const double want[] = {row.logp, row.lse, row.entropy, result.loss, result.kl, result.ratio, result.g};
      const char* const names[] = {"logp", "lse", "entropy", "loss", "kl", "ratio", "g"};
      for (int i = 0; i < (case_.kernel == kToken ? 7 : 3); ++i) {
        const double true_value = i == 2 && !case_.entropy ? kUntouched : mask[r] ? want[i] : 0;
        const double allowed = i < 3 ? 2e-6 + 1e-6 * fabs(true_value) : 1e-5 * (1 + fabs(true_value));
        comparison.near(names[i], r, 0, got[i][r], true_value, allowed);
      }
    }

    const std::vector<Type> seen = logits.values();
    if (!within) {
      for (size_t at = 0; at < seen.size(); ++at) {
        comparison.near("the logits", 0, at, to_float(seen[at]), to_float(values[at]), 1e-30);
      }
    }
    if (case_.out == kNone) return true;
    const std::vector<OutType> gradient = within ? logits.template values<OutType>() : apart.values();
    check_around(gradient, before, comparison);
    each(
        [&](int64_t r, int64_t j, int64_t at) {
          const double p = truth[r].p[j], log_p = truth[r].log_p[j];
          const double slope = case_.kernel == kToken && !mask[r] ? 0 : h[r];
          double want = slopes[r] * ((j == ids[r]) - p);
          if (slope != 0 && p > 0) want -= slope * p * (log_p + truth[r].entropy);
          want *= inv_temperature[r];
          // p of a given lse, and g of a logp in fp32, have their rounding; 2^-25 is half of fp16's smallest step.
          const double size = sizes[r] + fabs(slope),
                       allowed = OutTraits::kRounding * fabs(want) + 4e-6 * size + 0x1p-25;
          comparison.near("the gradient", r, j, to_float(gradient[at]), want, size == 0 ? 1e-30 : allowed);
        },
        true);
    return true;
  }

  const Case case_;
  const int64_t vocab_, offset_, stride_;
};

// ---- the cases

std::vector<Case> cases(bool quick) {
  std::vector<Case> all;
  const int lengths[] = {61, 1003, 1, 5, 1000, 4099, 32003};
  for (int i = 0; i < (quick ? 2 : 7); ++i) {
    const int vocab = lengths[i];
    for (const bool entropy : {false, true}) {
      for (const Out out : {kInPlace, kApart, kOtherPhase}) all.push_back({kGrad, vocab, out, entropy, {}, 0});
      if (quick && entropy != (vocab == 1003)) continue;
      for (const int cluster : {-1, 0, 1, 2, 4, 8, 16}) {
        if (vocab > 30000 && cluster > 0 && cluster < 4) continue;  // these hold no such row of fp32
        const FastgrpoOnePass choice = {cluster, 0, 0, 1};
        all.push_back({kStats, vocab, kNone, entropy, choice, 0});
        for (const Out out : {kNone, kInPlace, kApart}) all.push_back({kToken, vocab, out, entropy, choice, 0});
      }
    }
    for (const float factor : {1.0f, 0.3f}) all.push_back({kScale, vocab, kInPlace, false, {}, factor});
  }
  for (const int buffers : {1, 2, 3, 4}) {
    for (const int blocks : {1, 2}) {
      const FastgrpoOnePass choice = {buffers % 2 ? 2 : 4, buffers, blocks, buffers > 2};
      all.push_back({kToken, 1003, kInPlace, true, choice, 0});
    }
  }
  all.push_back({kToken, 1003, kOtherPhase, true, {0, 0, 0, 1}, 0});
  for (const int cluster : {-1, 0}) all.push_back({kToken, 1003, kInPlace, true, {cluster, 0, 0, 1}, 0, true});
  return all;
}

// The cases that write a gradient, one in place in the second half of the rows' memory.
std::vector<Case> narrow_cases(bool quick) {
  std::vector<Case> some;
  for (Case c : cases(quick)) {
    if (c.out == kInPlace) c.out = kSecondHalf;
    if (c.out != kNone && c.kernel != kScale) some.push_back(c);
  }
  return some;
}

template <class Traits, class OutTraits = Traits>
void run_all(bool quick, const std::string& filter, int (&count)[3]) {
  const bool narrow = Traits::kDType != OutTraits::kDType;
  const std::string dtype = Traits::kName + (narrow ? std::string(" to ") + OutTraits::kName : "");
  for (const Case& c : narrow ? narrow_cases(quick) : cases(quick)) {
    const std::string name = name_of(c, dtype);
    if (name.find(filter) == std::string::npos) continue;
    Comparison comparison;
    const bool ran = Run<Traits, OutTraits>(c).run(comparison);
    const bool right = comparison.first.empty();
    ++count[!ran ? 2 : !right];
    if (!ran) {
      printf("skip   %s: the choice cannot run on this device\n", name.c_str());
    } else {
      printf("%s  %s: %.2f of what is allowed%s%s\n", right ? "ok   " : "WRONG", name.c_str(), comparison.worst,
             right ? "" : ": ", comparison.first.c_str());
    }
    fflush(stdout);
  }
}

}  // namespace

int main(int count, char** arguments) {
  bool quick = false;
  std::string filter;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--quick") {
      quick = true;
    } else if (argument == "--filter" && i + 1 < count) {
      filter = arguments[++i];
    } else {
      fprintf(stderr, "usage: %s [--quick] [--filter TEXT]\n", arguments[0]);
      return 2;
    }
  }
  if (const char* why = fastgrpo_cuda_unavailable()) {
    printf("ERROR  no kernel can run here: %s\n", why);
    return 1;
  }
  int found[3] = {};  // right, wrong, skipped
  run_all<Float32Traits>(quick, filter, found);
  run_all<BFloat16Traits>(quick, filter, found);
  run_all<Float16Traits>(quick, filter, found);
  run_all<Float32Traits, BFloat16Traits>(quick, filter, found);
  run_all<Float32Traits, Float16Traits>(quick, filter, found);
  printf("%d cases are right, %d wrong, %d skipped\n", found[0], found[1], found[2]);
  return found[0] > 0 && found[1] == 0 ? 0 : 1;
}
