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
constexpr int64_t kAhead = 4;        // columns, of which the rows of the weight are asked for

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

// out = sum, or out += sum
void write(const float* sum, int64_t n, bool add, void* out, int32_t dtype) {
  for (int64_t i = 0; i < n; ++i) {
    write_element(add ? read_element(out, i, dtype) + sum[i] : sum[i], out, i, dtype);
  }
}

void d_hidden(const Args& a, const Gather& made, int64_t threads) {
  share(a.N, worth(a, a.N * a.width, threads), [&](const auto& next) {
    std::vector<float> sum(a.H);
    for (int64_t i; (i = next()) >= 0;) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t k = i * a.width; k < (i + 1) * a.width; ++k) {
        if (a.ids[k] < 0 || a.values[k] == 0) continue;
        made.add_scaled[a.dtype](sum.data(), row_of(a.weight, a.ids[k], a.weight_stride, a.dtype), a.values[k], a.H);
      }
      write(sum.data(), a.H, false, (void*)row_of(a.out, i, a.out_stride, a.out_dtype), a.out_dtype);
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
        write(sum.data(), a.H, true, (void*)row_of(a.out, id, a.out_stride, a.out_dtype), a.out_dtype);
        if (a.d_bias != nullptr) a.d_bias[id] += bias;
      }
    }
  });
}

// Which columns of a row carry its gradient.
class Selection {
 public:
  Selection(const Args& a, const Gather& made) : a_(a), made_(made) {}

  void row(const FastgrpoArgs& rows, const Sweeps* table, int64_t r) {
    int32_t* const ids = a_.found + r * a_.width;
    float* const values = a_.values + r * a_.width;
    const int64_t count = find(rows, table, r);
    a_.count[r] = (int32_t)std::min(count, a_.width + 1);
    const int64_t kept = count > a_.width ? 0 : count;
    std::copy_n(ids_.data(), kept, ids);
    std::copy_n(values_.data(), kept, values);
    std::fill(ids + kept, ids + a_.width, -1);
    std::fill(values + kept, values + a_.width, 0.0f);
  }

 private:
  static constexpr double kRounding = 2e-6;  // of a sum of probabilities
  static constexpr int kBins = 4096;         // of magnitudes: the exponent and four bits of the mantissa

  int64_t overflow() const { return a_.width + 1; }

  // The number of columns, which are in ids_ and values_.
  int64_t find(const FastgrpoArgs& rows, const Sweeps* table, int64_t r) {
    const float g = rows.g[r], h = rows.h == nullptr ? 0.0f : rows.h[r];
    if (g == 0 && h == 0) return 0;
    Row row(rows, table, r);
    row.cap();
    const int64_t V = rows.vocab;
    const double lse2 = rows.lse[r] / row.scale.unit, entropy = h == 0 ? 0.0f : rows.entropy[r];
    if (!(lse2 - lse2 == 0) || !(g - g == 0) || !(h - h == 0) || !(entropy - entropy == 0)) return overflow();
    const double slope = rows.softcap == INFINITY ? 1.0 : slope_at(row.target_logit(), rows.softcap);
    const double own = row.target < 0 ? 0.0 : slope * row.gradient_of_target(row.target_logit(), lse2, g, h, entropy);
    const bool plain = h == 0 && rows.softcap == INFINITY;
    ids_.clear();
    values_.clear();
    const bool finite = plain ? collect(row, g, lse2) : collect_dense(row, own, lse2, g, h, entropy);
    if (!finite) return overflow();
    if (row.target >= 0) {  // of which there is always one
      const auto at = std::lower_bound(ids_.begin(), ids_.end(), (int32_t)row.target);
      values_.insert(values_.begin() + (at - ids_.begin()), (float)own);
      ids_.insert(at, (int32_t)row.target);
    }
    return (int64_t)ids_.size();
  }

  // Where |dz_j| = |g| p_j over the temperature, the logits themselves are searched. False: the row overflows.
  bool collect(const Row& row, float g, double lse2) {
    const double factor = fabs((double)row.inv_temperature * g), sides = row.target < 0 ? 1 : 2;
    const double lp = row.target < 0 ? -INFINITY : (row.target_logit() * (double)row.scale.c - lse2) * row.scale.unit;
    // The sum over the others is known but to the rounding of lse: too little where p of the target is near 1.
    const double others = std::max(-expm1(lp), kRounding) * factor, slack = 2 * kRounding * factor;
    const double many = others > 100 * slack ? a_.tolerance * sides * others / a_.width : INFINITY;
    const int64_t V = row.args.vocab;
    double held = others, least = 0;
    for (int attempt = 0; attempt < 4; ++attempt) {
      const double least_now = held > 0 ? a_.tolerance * sides * held / (8 * V) : least * 1e-6;
      if (attempt > 0 && held > 0 && least <= 2 * least_now) break;
      least = least_now;
      if (!search(row, true, g, lse2, least, many)) return false;
      held = 0;
      for (float x : values_) held += fabs(x);
    }
    const double rest = std::min(least * V, std::max(0.0, others - held) + slack);  // that was not looked at
    drop(a_.tolerance * sides * held - rest);
    return true;
  }

  // With an entropy's gradient, or a softcap, all of the gradient is made and searched. False: the row overflows.
  bool collect_dense(const Row& row, double own, double lse2, float g, float h, float entropy) {
    whole_gradient(row, lse2, g, h, entropy);
    const int64_t V = row.args.vocab;
    const double others = made_.magnitudes(dense_.data(), V), bound = a_.tolerance * (others + fabs(own));
    if (!(bound - bound == 0)) return false;
    if (bound == 0) return true;
    if (!search(row, false, g, lse2, bound / (8 * V), bound / a_.width)) return false;
    double held = 0;
    for (float x : values_) held += fabs(x);
    drop(bound - std::min(bound / 8, std::max(0.0, others - held) + kRounding * others));
    return true;
  }

  // The columns with |dz| >= least beside the target; false if far too many are >= many.
  bool search(const Row& row, bool plain, float g, double lse2, double least, double many) {
    const double factor = fabs((double)row.inv_temperature * g);
    const auto limit = [&](double magnitude) {  // in a plain row: of a logit with such a gradient
      return (float)(plain ? (log2(magnitude / factor) + lse2) / row.scale.c : magnitude);
    };
    const float low = limit(least), high = limit(many);
    const int32_t dtype = plain ? row.dtype : (int32_t)kFloat32;
    const char* const x = plain ? (const char*)row.source() : (const char*)dense_.data();
    candidates_.resize(kSearched);
    ids_.clear();
    values_.clear();
    int64_t above = 0;
    for (int64_t begin = 0; begin < row.args.vocab; begin += kSearched) {
      const int64_t n = std::min(kSearched, row.args.vocab - begin);
      int64_t more;
      const int64_t found = made_.at_least[dtype](x + begin * element_size(dtype), n, !plain, low - fabsf(low) * 1e-6f,
                                                  high, candidates_.data(), &more);
      above += more;
      // Of so many, more than `width` cannot be dropped.
      if (above > 2 * a_.width + 1) return false;
      for (int64_t i = 0; i < found; ++i) {
        const int64_t j = begin + candidates_[i];
        if (j == row.target) continue;
        ids_.push_back((int32_t)j);
        values_.push_back(read_element(x, j, dtype));
      }
    }
    if (plain) {
      const RowGradient others = row.gradient_of_others(lse2, g, 0.0f, 0.0f);
      float* const dz = values_.data();
      row.table[kFloat32].gradient[kFloat32](dz, dz, (int64_t)values_.size(), row.scale.c, others, nullptr);
    }
    return true;
  }

  static double slope_at(double capped, double softcap) { return 1 - (capped / softcap) * (capped / softcap); }

  // To dense_, without the target's.
  void whole_gradient(const Row& row, double lse2, float g, float h, float entropy) {
    const int64_t V = row.args.vocab;
    const float softcap = row.args.softcap;
    dense_.resize(V);
    for (int64_t j = 0; j < V; ++j) dense_[j] = read_element(row.source(), j, row.dtype);
    const RowGradient others = row.gradient_of_others(lse2, g, h, entropy);
    row.table[kFloat32].gradient[kFloat32](dense_.data(), dense_.data(), V, row.scale.c, others, nullptr);
    if (softcap != INFINITY) {
      for (int64_t j = 0; j < V; ++j) dense_[j] *= (float)slope_at(row.capped[j], softcap);
    }
    if (row.target >= 0) dense_[row.target] = 0;
  }

  // Drops the smallest, as long as their sum leaves some of `room`.
  void drop(double room) {
    double sums[kBins] = {};
    const auto bin = [](float x) { return bits_of(x) >> 19 & (kBins - 1); };
    for (float x : values_) sums[bin(x)] += fabs(x);
    int first = 0;
    for (; first < kBins && room >= sums[first]; ++first) room -= sums[first];
    int64_t kept = 0;
    for (size_t i = 0; i < values_.size(); ++i) {
      if ((int)bin(values_[i]) < first) continue;
      ids_[kept] = ids_[i];
      values_[kept++] = values_[i];
    }
    ids_.resize(kept);
    values_.resize(kept);
  }

  static constexpr int64_t kSearched = 4096;  // elements at a time
  const Args& a_;
  const Gather& made_;
  std::vector<float> dense_, values_;
  std::vector<int32_t> candidates_, ids_;
};

void select(const Args& a, const FastgrpoArgs& rows, const Gather& made, const Sweeps* table, int64_t threads) {
  const int64_t n = rows.batch * rows.tokens;
  threads = std::max<int64_t>(1, std::min(threads, n * rows.vocab >> 19));
  share(n, threads, [&](const auto& next) {
    Selection selection(a, made);
    for (int64_t r; (r = next()) >= 0;) selection.row(rows, table, r);
  });
}

}  // namespace
}  // namespace fastgrpo

void fastgrpo_cpu_column_logits(const FastgrpoColumns* args, int32_t isa, int32_t threads) {
  fastgrpo::logits(*args, *fastgrpo::gather_for((fastgrpo::Isa)isa), threads);
}

void fastgrpo_cpu_column_d_hidden(const FastgrpoColumns* args, int32_t isa, int32_t threads) {
  fastgrpo::d_hidden(*args, *fastgrpo::gather_for((fastgrpo::Isa)isa), threads);
}

void fastgrpo_cpu_column_d_weight(const FastgrpoColumns* args, int32_t isa, int32_t threads) {
  fastgrpo::d_weight(*args, *fastgrpo::gather_for((fastgrpo::Isa)isa), threads);
}

void fastgrpo_cpu_select_columns(const FastgrpoColumns* args, const FastgrpoArgs* rows, int32_t isa, int32_t threads) {
  const auto which = (fastgrpo::Isa)isa;
  fastgrpo::select(*args, *rows, *fastgrpo::gather_for(which), fastgrpo::sweeps_for(which), threads);
}
