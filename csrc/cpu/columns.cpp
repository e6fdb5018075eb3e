// A few columns of each row: their logits, which of them carry a gradient, and what the gradients of hidden states and
// weight are made of. Sums go in the order of a row's columns, and over pairs of one column in the order of the pairs.

#include <algorithm>
#include <numeric>
#include <vector>

#include "api.h"
#include "dispatch.h"
#include "row.h"
#include "threads.h"

namespace fastgrpo {
namespace {

using Args = FastgrpoColumns;

constexpr int64_t kWorth = 1 << 20;  // multiplications that are worth a thread
constexpr int64_t kAhead = 2;        // columns, of which the rows of the weight are asked for

const char* row_of(const void* x, int64_t row, int64_t stride, int32_t dtype) {
  return (const char*)x + row * stride * element_size(dtype);
}

// Asks for the row of the next column, which lies anywhere, while another one is at work.
void prefetch(const Args& a, const void* x, const int32_t* ids, int64_t count, int64_t stride) {
#if defined(__GNUC__)
  if (count <= 0 || *ids < 0) return;
  const char* const row = row_of(x, *ids, stride, a.dtype);
  for (int64_t i = 0; i < a.H * element_size(a.dtype); i += 64) __builtin_prefetch(row + i);
#else
  (void)a, (void)x, (void)ids, (void)count, (void)stride;
#endif
}

int64_t worth(const Args& a, int64_t pairs, int64_t threads) {
  return std::max<int64_t>(1, std::min(threads, pairs * a.H / kWorth));
}

void logits(const Args& a, const Gather& made, int64_t threads) {
  share(a.N, worth(a, a.N * a.width, threads), [&](const auto& next) {
    for (int64_t i; (i = next()) >= 0;) {
      const int32_t* const ids = a.ids + i * a.width;
      const char* const h = row_of(a.hidden, i, a.hidden_stride, a.dtype);
      for (int64_t k = 0; k < a.width; ++k) {
        float z = -INFINITY;
        prefetch(a, a.weight, ids + k + kAhead, a.width - k - kAhead, a.weight_stride);
        if (ids[k] >= 0) {
          z = made.dot[a.dtype](h, row_of(a.weight, ids[k], a.weight_stride, a.dtype), a.H);
          if (a.bias != nullptr) z = z + a.bias[ids[k]];
        }
        a.values[i * a.width + k] = z;
      }
    }
  });
}

void d_hidden(const Args& a, const Gather& made, int64_t threads) {
  share(a.N, worth(a, a.N * a.width, threads), [&](const auto& next) {
    std::vector<float> sum(a.H);
    for (int64_t i; (i = next()) >= 0;) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t k = i * a.width, end = k + a.width; k < end; ++k) {
        prefetch(a, a.weight, a.ids + k + kAhead, end - k - kAhead, a.weight_stride);
        if (a.ids[k] < 0) continue;
        made.add_scaled[a.dtype](sum.data(), row_of(a.weight, a.ids[k], a.weight_stride, a.dtype), a.values[k], a.H);
      }
      made.put[a.out_dtype](sum.data(), (void*)row_of(a.out, i, a.out_stride, a.out_dtype), a.H, false);
    }
  });
}

void d_weight(const Args& a, const Gather& made, int64_t threads) {
  const int64_t pairs = a.N;
  std::vector<int64_t> begin(a.V + 1, 0);
  for (int64_t i = 0; i < pairs; ++i) {
    if (a.ids[i] >= 0) ++begin[a.ids[i] + 1];
  }
  std::vector<int32_t> distinct;
  for (int64_t id = 0; id < a.V; ++id) {
    if (begin[id + 1] > 0) distinct.push_back((int32_t)id);
    begin[id + 1] += begin[id];
  }
  std::vector<int32_t> order(begin[a.V]);
  std::vector<int64_t> place(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < pairs; ++i) {
    if (a.ids[i] >= 0) order[place[a.ids[i]]++] = (int32_t)i;
  }
  constexpr int64_t kSome = 16;  // ids at a time
  const int64_t count = (int64_t)distinct.size();
  share((count + kSome - 1) / kSome, worth(a, pairs, threads), [&](const auto& next) {
    std::vector<float> sum(a.H);
    for (int64_t i; (i = next()) >= 0;) {
      for (int64_t j = i * kSome; j < std::min((i + 1) * kSome, count); ++j) {
        const int32_t id = distinct[j];
        std::fill(sum.begin(), sum.end(), 0.0f);
        float bias = 0;
        for (int64_t at = begin[id]; at < begin[id + 1]; ++at) {
          const int32_t pair = order[at];
          const char* const h = row_of(a.hidden, a.rows[pair], a.hidden_stride, a.dtype);
          made.add_scaled[a.dtype](sum.data(), h, a.values[pair], a.H);
          bias += a.values[pair];
        }
        made.put[a.out_dtype](sum.data(), (void*)row_of(a.out, id, a.out_stride, a.out_dtype), a.H, true);
        if (a.d_bias != nullptr) a.d_bias[id] += bias;
      }
    }
  });
}

// Which columns of a row carry its gradient. The threshold is found among candidates. What is below them is dropped: a
// first look takes those for few, and if what it left out is more than the budget, a second takes all that may count.
// A row that keeps too many is left early, by their count.
class Selection {
 public:
  Selection(const Args& a, const Gather& made) : a_(a), made_(made) {}

  void row(const FastgrpoArgs& rows, const Sweeps* table, int64_t r) {
    const int64_t count = find(rows, table, r);
    a_.count[r] = (int32_t)std::min(count, a_.width + 1);
    if (count > a_.width) return;
    std::copy_n(ids_.data(), count, a_.found + r * a_.width);
    std::copy_n(values_.data(), count, a_.values + r * a_.width);
  }

 private:
  static constexpr double kRounding = 4e-6;  // of a sum of |dz|
  static constexpr double kFew = 1024;       // a first candidate has at least this part of the budget
  static constexpr double kSpare = 16;       // what is known of a sum in vain: this part of the budget at the most
  static constexpr int kBits = 20, kBins = 1 << (31 - kBits);  // of magnitudes: exponent, 3 bits of the mantissa
  static constexpr int64_t kSearched = 4096;                   // elements at a time

  int64_t overflow() const { return a_.width + 1; }

  // The number of columns, which are in ids_ and values_.
  int64_t find(const FastgrpoArgs& rows, const Sweeps* table, int64_t r) {
    const float g = rows.g[r], h = rows.h == nullptr ? 0.0f : rows.h[r];
    if (g == 0 && h == 0) return 0;
    Row row(rows, table, r);
    const float lse = rows.lse[r], entropy = h == 0 ? 0.0f : rows.entropy[r], lp = row.target < 0 ? 0 : rows.logp[r];
    // Also false where one is NaN.
    if (!(fabsf(lse) < INFINITY && fabsf(g) < INFINITY && fabsf(h) < INFINITY && fabsf(entropy) < INFINITY)) {
      return overflow();
    }
    if (!(lp < INFINITY)) return overflow();
    const RowGradient others = row.gradient_of_others(lse / row.scale.unit, g, h, entropy);
    float own = row.target < 0 ? 0.0f : row.gradient_of_target(lp, g, h, entropy);
    const bool plain = h == 0 && rows.softcap == INFINITY;
    const bool fits = plain ? among_logits(row, others, g, lp, lse) : among_gradients(row, others, &own);
    if (!fits) return overflow();
    if (row.target >= 0) {
      const auto at = std::lower_bound(ids_.begin(), ids_.end(), (int32_t)row.target);
      values_.insert(values_.begin() + (at - ids_.begin()), own);
      ids_.insert(at, (int32_t)row.target);
    }
    return (int64_t)ids_.size();
  }

  // Where |dz_j| = |g| p_j over the temperature, the logits themselves are searched, and Σ|dz| is known from logp. The
  // target is left out. False: the row overflows.
  bool among_logits(const Row& row, const RowGradient& others, float g, float lp, float lse) {
    const double factor = fabs((double)row.inv_temperature * g), sides = row.target < 0 ? 1 : 2;
    const double sum = row.target < 0 ? factor : -expm1((double)lp) * factor;  // over the others
    if (sum == 0) return nothing_else();
    // p_j of the others come from the rounded lse.
    const double rounding = kRounding + fabs(lse) * 2.4e-7;
    const double budget = a_.tolerance * sides * sum * std::max(0.0, 1 - rounding);
    const auto limit = [&](double magnitude, float margin) {  // of a logit with such a gradient
      const float x = (float)((log2(magnitude / factor) + others.lse2) / row.scale.c);
      return x + fabsf(x) * margin;
    };
    return choose(row.logits, row.dtype, row, false, limit, budget, sum, rounding, [&] {
      float* const x = values_.data();
      row.table[kFloat32].gradient[kFloat32](x, x, (int64_t)values_.size(), row.scale.c, others, nullptr);
    });
  }

  // With an entropy's gradient, or a softcap, all of the gradient is made and searched; own: that of the target.
  // False: the row overflows.
  bool among_gradients(Row& row, const RowGradient& others, float* own) {
    const int64_t V = row.args.vocab;
    const float* x = (const float*)row.logits;
    if (row.dtype != kFloat32) {
      wide_.resize(V + kCapPadding);
      made_.widen[row.dtype](row.logits, wide_.data(), V);
      x = wide_.data();
    }
    const Sweeps& sweeps = row.table[kFloat32];
    dense_.resize(V + kCapPadding);
    float* const dz = dense_.data();
    if (row.args.softcap == INFINITY) {
      sweeps.gradient[kFloat32](x, dz, V, row.scale.c, others, nullptr);
    } else {
      sweeps.cap(x, dz, V, row.args.softcap);
      sweeps.gradient[kFloat32](dz, dz, V, row.scale.c, others, nullptr);
      if (row.target >= 0) dz[row.target] = *own;
      sweeps.uncap[kFloat32](x, dz, dz, V, row.args.softcap);
      if (row.target >= 0) *own = dz[row.target];
    }
    if (row.target >= 0) dz[row.target] = 0;
    const double sum = made_.magnitudes(dz, V);
    if (!(sum + fabsf(*own) < INFINITY)) return false;
    if (sum == 0) return nothing_else();
    const double budget = a_.tolerance * (sum + fabsf(*own)) * (1 - kRounding);
    const auto limit = [](double magnitude, float margin) { return (float)magnitude * (1 + margin); };
    return choose(dz, kFloat32, row, true, limit, budget, sum, kRounding, [] {});
  }

  bool nothing_else() {
    ids_.clear();
    values_.clear();
    return true;
  }

  // The columns of x to be kept, without the target's: limit(|dz|, margin) is its element with such a gradient, `sum`
  // what the gradients make but for `rounding`, and differentiate() makes them of values_. False: the row overflows.
  template <class Limit, class Differentiate>
  bool choose(const void* x, int32_t dtype, const Row& row, bool magnitude, Limit limit, double budget, double sum,
              double rounding, Differentiate differentiate) {
    const int64_t V = row.args.vocab;
    const float high = limit(budget / a_.width, 1e-6f);
    // Where the sum is too little known to tell what a look left out, there is no first one.
    const bool known = rounding * sum <= budget / kSpare;
    for (const double parts : {kFew, kSpare * V}) {
      if (parts == kFew && (!known || V < kFew)) continue;
      const double least = budget / parts;
      if (!search(x, dtype, magnitude, limit(least, -1e-6f), high, row.target, V)) return false;
      differentiate();
      double held = 0;
      for (float value : values_) held += fabsf(value);
      if (!(held < INFINITY)) return false;
      const double left = std::min(least * V, std::max(0.0, sum * (1 + rounding) - held));
      if (left > budget) continue;
      drop(budget - left);
      break;
    }
    return true;
  }

  // The columns of x not below `low` and their values, but the target's. False: more than `width` of those not below
  // `high` have to be kept, because at most `width` of them can be dropped.
  bool search(const void* x, int32_t dtype, bool magnitude, float low, float high, int64_t target, int64_t V) {
    const auto part = [&](int64_t begin) { return (const char*)x + begin * element_size(dtype); };
    int64_t counted = 0, above = 0;
    const auto count_to = [&](int64_t end) {
      for (int64_t n; counted < end; counted += n) {
        n = std::min(kSearched, end - counted);
        above += made_.count[dtype](part(counted), n, magnitude, high);
        if (above > 2 * a_.width + 1) return false;
      }
      return true;
    };
    candidates_.resize(kSearched);
    ids_.clear();
    values_.clear();
    if (!count_to(std::min(V, 8 * a_.width))) return false;  // a flat row ends here
    for (int64_t begin = 0; begin < V; begin += kSearched) {
      const int64_t n = std::min(kSearched, V - begin);
      if (!count_to(begin + n)) return false;
      const int64_t found = made_.find[dtype](part(begin), n, magnitude, low, candidates_.data());
      for (int64_t i = 0; i < found; ++i) {
        const int64_t j = begin + candidates_[i];
        if (j == target) continue;
        ids_.push_back((int32_t)j);
        values_.push_back(read_element(x, j, dtype));
      }
    }
    return true;
  }

  // Drops bins from the smallest on, and of the first that does not fit the columns that do, in their order.
  void drop(double room) {
    double sums[kBins] = {};
    const auto bin = [](float x) { return (int)(bits_of(x) >> kBits & (kBins - 1)); };
    for (float x : values_) sums[bin(x)] += fabsf(x);
    int first = 0;
    for (; first < kBins && sums[first] <= room; ++first) room -= sums[first];
    size_t kept = 0;
    for (size_t i = 0; i < values_.size(); ++i) {
      const int at = bin(values_[i]);
      if (at < first) continue;
      if (at == first && room >= 0) {
        room -= fabsf(values_[i]);
        if (room >= 0) continue;
      }
      ids_[kept] = ids_[i];
      values_[kept++] = values_[i];
    }
    ids_.resize(kept);
    values_.resize(kept);
  }

  const Args& a_;
  const Gather& made_;
  std::vector<float> wide_, dense_, values_;
  std::vector<int32_t> candidates_, ids_;
};

void select(const Args& a, const FastgrpoArgs& rows, const Gather& made, const Sweeps* table, int64_t threads) {
  const int64_t n = rows.batch * rows.tokens;
  share(n, std::max<int64_t>(1, std::min(threads, n * rows.vocab >> 19)), [&](const auto& next) {
    Selection selection(a, made);
    for (int64_t r; (r = next()) >= 0;) selection.row(rows, table, r);
  });
  int32_t most = 0;
  for (int64_t r = 0; r < n; ++r) most = std::max(most, a.count[r] > a.width ? 0 : a.count[r]);
  share(n, std::max<int64_t>(1, std::min(threads, n * most >> 18)), [&](const auto& next) {
    for (int64_t r; (r = next()) >= 0;) {
      const int64_t kept = a.count[r] > a.width ? 0 : a.count[r], at = r * a.width;
      std::fill(a.found + at + kept, a.found + at + most, -1);
      std::fill(a.values + at + kept, a.values + at + most, 0.0f);
    }
  });
}

}  // namespace
}  // namespace fastgrpo

int32_t fastgrpo_cpu_column_logits(const FastgrpoColumns* args, int32_t isa, int32_t threads) {
  return fastgrpo::error_of([&] { fastgrpo::logits(*args, *fastgrpo::gather_for((fastgrpo::Isa)isa), threads); });
}

int32_t fastgrpo_cpu_column_d_hidden(const FastgrpoColumns* args, int32_t isa, int32_t threads) {
  return fastgrpo::error_of([&] { fastgrpo::d_hidden(*args, *fastgrpo::gather_for((fastgrpo::Isa)isa), threads); });
}

int32_t fastgrpo_cpu_column_d_weight(const FastgrpoColumns* args, int32_t isa, int32_t threads) {
  return fastgrpo::error_of([&] { fastgrpo::d_weight(*args, *fastgrpo::gather_for((fastgrpo::Isa)isa), threads); });
}

int32_t fastgrpo_cpu_select_columns(const FastgrpoColumns* args, const FastgrpoArgs* rows, int32_t isa,
                                    int32_t threads) {
  const auto which = (fastgrpo::Isa)isa;
  return fastgrpo::error_of(
      [&] { fastgrpo::select(*args, *rows, *fastgrpo::gather_for(which), fastgrpo::sweeps_for(which), threads); });
}
