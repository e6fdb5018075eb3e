// The statistics of each row of a product of hidden states and a head, whose logits never lie in memory.

#include "dispatch.h"
#include "product.h"

namespace fastgrpo {
namespace {

// Blocks of columns go over the threads. Some rows of a block lie in a cache until their sums are taken.
class Scores : Product {
 public:
  Scores(const FastgrpoMatmul& product, const FastgrpoArgs& rows, const Products& made, const Sweeps* table)
      : Product(product, made), rows_(rows), sweeps_(table[kFloat32]) {}

  void run(int64_t threads) {
    const int64_t slice = keeps_block() ? kSlice : kSliceOfPanels;
    const int64_t slices = (a_.M + slice - 1) / slice;
    for (int64_t i = 0; i < slices; ++i) {
      const int64_t m = a_.M * i / slices;
      const int64_t count = a_.M * (i + 1) / slices - m;
      run_slice(m, count, worth(count, threads));
    }
  }

 private:
  static constexpr int64_t kSlice = 2048;         // rows at a time
  static constexpr int64_t kSliceOfPanels = 512;  // where a block's logits of all of them lie in a cache
  static constexpr int64_t kKept = 2 << 20;       // bytes of a packed block that a cache holds
  static constexpr int64_t kUnits = 4;            // pieces of work for a thread, so that none waits long
  // Of a row in a block; a power of 2 would crowd few lines of a cache.
  static constexpr int64_t kStride = kBlock + 64;
  static_assert(kCapPadding <= 64, "a softcap writes so many elements behind a row");

  int64_t panels_of_block() const { return kBlock / tiles_.columns; }

  // Whether a block of the head is packed whole, for a group of rows after the other; else each of its panels is
  // packed for all rows, whose logits wait for the other panels.
  bool keeps_block() const { return panels_of_block() * panel_floats(a_.K) * 4 <= kKept; }

  struct Target {
    int64_t id;  // -1: out of range, or the row is masked
    float logit;
  };

  int64_t target(int64_t r) const {
    return rows_.mask[r] && rows_.ids[r] >= 0 && rows_.ids[r] < a_.N ? rows_.ids[r] : -1;
  }

  void cap(float* row, int64_t count) const {
    if (rows_.softcap != INFINITY) sweeps_.cap(row, row, count, rows_.softcap);
  }

  // The same bits as in the product: a sum's order does not depend on where its column lies.
  void find_targets(int64_t first, std::vector<Target>& targets, int64_t threads) const {
    share((int64_t)targets.size(), threads, [&](const auto& next) {
      Desk desk(*this, a_.K);
      std::vector<float> scratch;
      float logit[1 + kCapPadding];
      for (int64_t i; (i = next()) >= 0;) {
        const int64_t r = first + i, id = target(r);
        targets[i] = {id, -INFINITY};
        if (id < 0) continue;
        pack_columns(id, 1, 0, a_.K, desk.right.data());
        multiply(left(r, 1, 0, a_.K, scratch), 1, a_.K, desk.right.data(), desk);
        logit[0] = a_.bias == nullptr ? desk.sums.data()[0] : desk.sums.data()[0] + a_.bias[id];
        cap(logit, 1);
        targets[i].logit = logit[0];
      }
    });
  }

  void run_slice(int64_t first, int64_t count, int64_t threads) const {
    std::vector<Target> targets(count);
    find_targets(first, targets, threads);
    const int64_t blocks = (a_.N + kBlock - 1) / kBlock, groups = (count + kGroup - 1) / kGroup;
    std::vector<RowSums> sums_of(count * blocks);
    const Groups rows(*this, first, count, threads);
    // A block may go to several threads, each with some groups of its rows.
    const int64_t parts = std::min(groups, (kUnits * threads + blocks - 1) / blocks);
    const int64_t some = keeps_block() ? kGroup : (groups + parts - 1) / parts * kGroup;
    share(blocks * parts, threads, [&](const auto& next) {
      Desk desk(*this, 0);
      Floats right(panel_floats(a_.K) * (keeps_block() ? panels_of_block() : 1)), logits(some * kStride);
      for (int64_t unit; (unit = next()) >= 0;) {
        const int64_t block = unit / parts, part = unit % parts;
        const int64_t end = std::min(count, groups * (part + 1) / parts * kGroup);
        for (int64_t begin = groups * part / parts * kGroup, m = begin; m < end; m += some) {
          const int64_t here = std::min(some, end - m);
          fill(rows, m, here, block, m == begin || !keeps_block(), right.data(), desk, logits.data());
          for (int64_t i = 0; i < here; ++i) {
            if (!rows_.mask[first + m + i]) continue;
            sums_of[(m + i) * blocks + block] =
                sums(first + m + i, block, targets[m + i], logits.data() + i * kStride);
          }
        }
      }
    });

    for (int64_t r = 0; r < count; ++r) {
      Score s = {0.0, 0.0f, 0.0f, 0.0f};
      if (rows_.mask[first + r]) {
        RowSums others = {-INFINITY, 0.0, 0.0};
        for (int64_t block = 0; block < blocks; ++block) add_block(others, sums_of[r * blocks + block]);
        s = score_of(others, targets[r].id >= 0, targets[r].logit, Scale(rows_.inv_temperature[first + r]),
                     rows_.entropy != nullptr);
      }
      rows_.logp[first + r] = s.logp;
      rows_.lse[first + r] = s.lse;
      if (rows_.entropy != nullptr) rows_.entropy[first + r] = s.entropy;
    }
  }

  // The logits of rows [m, m + count) of a slice in a block. pack: its panels are not in `right` yet.
  void fill(const Groups& rows, int64_t m, int64_t count, int64_t block, bool pack, float* right, Desk& desk,
            float* logits) const {
    const int64_t first = block * panels_of_block(), end = std::min(panels(), first + panels_of_block());
    for (int64_t panel = first; panel < end; ++panel) {
      const int64_t n = panel * tiles_.columns, columns = std::min<int64_t>(tiles_.columns, a_.N - n);
      float* const packed = right + (keeps_block() ? (panel - first) * panel_floats(a_.K) : 0);
      if (pack) pack_right(panel, 0, a_.K, packed);
      for (int64_t i = 0; i < count; i += kGroup) {
        const int64_t here = std::min(kGroup, count - i);
        multiply(rows.at(m + i), here, a_.K, packed, desk);
        for (int64_t r = 0; r < here; ++r) {
          made_.finish(desk.sums.data() + r * tiles_.columns, columns, a_.bias == nullptr ? nullptr : a_.bias + n,
                       false, false, logits + (i + r) * kStride + (panel - first) * tiles_.columns, kFloat32);
        }
      }
    }
  }

  RowSums sums(int64_t r, int64_t block, const Target& target, float* logits) const {
    const int64_t begin = block * kBlock, width = std::min<int64_t>(kBlock, a_.N - begin);
    const int64_t inside = target.id >= begin && target.id < begin + width ? target.id - begin : -1;
    cap(logits, width);
    return sweeps_.sums(logits, 0, width, inside, target.logit, Scale(rows_.inv_temperature[r]).c,
                        rows_.entropy != nullptr);
  }

  const FastgrpoArgs& rows_;
  const Sweeps& sweeps_;
};

}  // namespace
}  // namespace fastgrpo

int32_t fastgrpo_cpu_head_stats(const FastgrpoMatmul* product, const FastgrpoArgs* rows, int32_t isa,
                                int32_t threads) {
  const auto which = (fastgrpo::Isa)isa;
  return fastgrpo::error_of([&] {
    fastgrpo::Scores(*product, *rows, *fastgrpo::products_for(which), fastgrpo::sweeps_for(which)).run(threads);
  });
}
