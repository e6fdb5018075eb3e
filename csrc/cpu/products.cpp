// Matrix products over threads: which operand is packed when, and the order of every sum.
//
// An element is the sum over k of a depth of products at a time, added one after the other; beyond kDeep they add up
// to the sums of segments first, which are added one after the other. That depends on K alone, so an element has the
// same bits whatever M, N and the number of threads are.

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "api.h"
#include "dispatch.h"
#include "matmul.h"
#include "row.h"
#include "threads.h"

namespace fastgrpo {
namespace {

using Args = FastgrpoMatmul;

constexpr int64_t kDeep = 16384;        // more of K is cut into segments, and these go over the threads
constexpr int64_t kSegment = 4032;      // which is 21 times 192, the usual depth
constexpr int64_t kGroup = 96;          // rows whose sums wait in a cache for the next depth of K
constexpr int64_t kPartial = 4 << 20;   // bytes of a segment's sums, for each thread
constexpr int64_t kWorth = 4 << 20;     // multiplications that are worth a thread
constexpr int64_t kStreamed = 8 << 20;  // bytes of a result that no cache would keep

constexpr int64_t kLine = 64;  // bytes of a cache line
float* on_line(float* x) { return (float*)(((uintptr_t)x + kLine - 1) / kLine * kLine); }

// Memory on a cache line.
class Floats {
 public:
  explicit Floats(int64_t count) : held_(count + 16) { fastgrpo_cpu_prefer_large_pages(held_.data(), count * 4); }
  float* data() { return on_line(&held_.data()->x); }

 private:
  struct Raw {
    float x;
    Raw() {}  // left as it is
  };
  std::vector<Raw> held_;
};

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A left operand: lane s of row m lies m * row + s * lane bytes from `at`.
struct Left {
  const char* at;
  int64_t row, lane;

  Left from(int64_t m, int64_t lanes) const { return {at + m * row + lanes * lane, row, lane}; }
};

class Product {
 public:
  Product(const Args& a, const Products& made)
      : a_(a), made_(made), tiles_(made.tiles[a.dtype]), size_(element_size(a.dtype)) {}

  int64_t panels() const { return (a_.N + tiles_.columns - 1) / tiles_.columns; }
  int64_t lanes(int64_t K) const { return (K + tiles_.elements - 1) / tiles_.elements; }
  int64_t panel_floats(int64_t K) const { return lanes(K) * tiles_.columns; }
  bool direct() const { return tiles_.reads_rows && a_.a_stride[1] == 1; }

  // What a thread multiplies with.
  struct Desk {
    Floats right, sums, more;  // a panel, and the sums of a group of rows, twice
    const Tiles& tiles;

    Desk(const Product& product, int64_t K)
        : right(product.panel_floats(K)),
          sums(kGroup * product.tiles_.columns),
          more(kGroup * product.tiles_.columns),
          tiles(product.tiles_) {}
    ~Desk() {
      if (tiles.rest != nullptr) tiles.rest();
    }
  };

  // [k, k + K) of a panel of the right operand.
  void pack_right(int64_t panel, int64_t k, int64_t K, float* out) const {
    const int64_t n = panel * tiles_.columns;
    pack_columns(n, std::min<int64_t>(tiles_.columns, a_.N - n), k, K, out);
  }

  void pack_columns(int64_t n, int64_t count, int64_t k, int64_t K, float* out) const {
    const char* const x = (const char*)a_.b + (k * a_.b_stride[0] + n * a_.b_stride[1]) * size_;
    tiles_.pack(x, a_.b_stride[0], a_.b_stride[1], K, count, tiles_.columns, out);
  }

  // [k, k + K) of rows [m, m + count), packed into `scratch` unless they can be read where they are.
  Left left(int64_t m, int64_t count, int64_t k, int64_t K, std::vector<float>& scratch) const {
    const char* const x = (const char*)a_.a + (m * a_.a_stride[0] + k * a_.a_stride[1]) * size_;
    if (direct()) return {x, a_.a_stride[0] * size_, 4};
    if (tiles_.pack_rows != nullptr) {
      scratch.resize(count * lanes(K) + kLine / 4);
      float* const rows = on_line(scratch.data());
      tiles_.pack_rows(x, a_.a_stride[1], a_.a_stride[0], K, count, rows);
      return {(const char*)rows, lanes(K) * 4, 4};
    }
    const int64_t width = up(count, 16);
    scratch.resize(lanes(K) * width);
    tiles_.pack(x, a_.a_stride[1], a_.a_stride[0], K, count, width, scratch.data());
    return {(const char*)scratch.data(), 4, width * 4};
  }

  // Rows [first, first + count) over all of K, some of kGroup at a time; packed, where they have to be, by the
  // threads.
  class Groups {
   public:
    Groups(const Product& product, int64_t first, int64_t count, int64_t threads)
        : groups_(product.direct() ? 1 : (count + kGroup - 1) / kGroup), held_(groups_), left_(groups_) {
      if (groups_ <= 1) threads = 1;
      share(groups_, threads, [&](const auto& next) {
        for (int64_t group; (group = next()) >= 0;) {
          const int64_t m = group * kGroup, rows = product.direct() ? count : std::min(kGroup, count - m);
          left_[group] = product.left(first + m, rows, 0, product.a_.K, held_[group]);
        }
      });
    }

    Left at(int64_t m) const { return held_[0].empty() ? left_[0].from(m, 0) : left_[m / kGroup]; }

   private:
    const int64_t groups_;
    std::vector<std::vector<float>> held_;
    std::vector<Left> left_;
  };

  // The sums (count <= kGroup, columns) of rows of `left` and a packed panel, over k < K.
  void multiply(const Left& left, int64_t count, int64_t K, const float* right, Desk& desk) const {
    float* const sums = desk.sums.data();
    float* const more = desk.more.data();
    if (K <= kDeep) return multiply_segment(left, count, K, right, sums);
    for (int64_t k = 0; k < K; k += kSegment) {
      const Left part = left.from(0, k / tiles_.elements);
      const int64_t depth = std::min(kSegment, K - k);
      multiply_segment(part, count, depth, right + k / tiles_.elements * tiles_.columns, k == 0 ? sums : more);
      if (k > 0) made_.finish(more, count * tiles_.columns, nullptr, true, false, sums, kFloat32);
    }
  }

  void multiply_segment(const Left& left, int64_t count, int64_t K, const float* right, float* sums) const {
    const int64_t heights = (count + tiles_.rows - 1) / tiles_.rows;
    for (int64_t k = 0; k == 0 || k < K; k += tiles_.depth) {  // without any k, the sums are 0
      int64_t depth = std::min(tiles_.depth, K - k);
      if (!direct()) depth = lanes(depth) * tiles_.elements;  // what is packed has whole lanes
      for (int64_t i = 0; i < heights; ++i) {                 // of nearly equal heights
        const int64_t m = count * i / heights, rows = count * (i + 1) / heights - m;
        const Left corner = left.from(m, k / tiles_.elements);
        tiles_.tile(corner.at, corner.row, corner.lane, depth, right + k / tiles_.elements * tiles_.columns,
                    (int32_t)rows, sums + m * tiles_.columns, k > 0);
      }
    }
  }

  // Rows [m, m + count) of a panel to the result.
  void finish(int64_t m, int64_t count, int64_t panel, const float* sums, int64_t stride) const {
    const int64_t n = panel * tiles_.columns, columns = std::min<int64_t>(tiles_.columns, a_.N - n);
    const float* const bias = a_.bias == nullptr ? nullptr : a_.bias + n;
    const bool stream = streams_ && columns % 32 == 0;
    for (int64_t r = 0; r < count; ++r) {
      void* const out = (char*)a_.out + ((m + r) * a_.out_stride + n) * element_size(a_.out_dtype);
      made_.finish(sums + r * stride, columns, bias, a_.add != 0, stream && (uintptr_t)out % 64 == 0, out,
                   a_.out_dtype);
    }
  }

  // All of K at a time. Panels go over the threads, each packed by the one that multiplies it.
  void by_panels(int64_t threads) const {
    const Groups rows(*this, 0, a_.M, threads);
    share(panels(), threads, [&](const auto& next) {
      Desk desk(*this, a_.K);
      for (int64_t panel; (panel = next()) >= 0;) {
        pack_right(panel, 0, a_.K, desk.right.data());
        for (int64_t m = 0; m < a_.M; m += kGroup) {
          const int64_t count = std::min(kGroup, a_.M - m);
          multiply(rows.at(m), count, a_.K, desk.right.data(), desk);
          finish(m, count, panel, desk.sums.data(), tiles_.columns);
        }
      }
    });
  }

  // All of K at a time. Groups of rows go over the threads; the right operand is packed before.
  void by_rows(int64_t threads) const {
    const int64_t size = panel_floats(a_.K);
    Floats right(panels() * size);
    share(panels(), threads, [&](const auto& next) {
      for (int64_t panel; (panel = next()) >= 0;) pack_right(panel, 0, a_.K, right.data() + panel * size);
    });
    share((a_.M + kGroup - 1) / kGroup, threads, [&](const auto& next) {
      Desk desk(*this, 0);
      std::vector<float> scratch;
      for (int64_t group; (group = next()) >= 0;) {
        const int64_t m = group * kGroup, count = std::min(kGroup, a_.M - m);
        const Left rows = left(m, count, 0, a_.K, scratch);
        for (int64_t panel = 0; panel < panels(); ++panel) {
          multiply(rows, count, a_.K, right.data() + panel * size, desk);
          finish(m, count, panel, desk.sums.data(), tiles_.columns);
        }
      }
    });
  }

  // Segments of K go over the threads, some rows at a time; their sums are added in the order of K.
  void by_segments(int64_t threads) const {
    const int64_t stride = panels() * tiles_.columns;
    const int64_t most = direct() ? a_.M : kPartial / 4 / kSegment;  // rows that are packed take memory, too
    const int64_t some = std::max<int64_t>(1, std::min({a_.M, most, kPartial / 4 / stride}));
    const int64_t segments = (a_.K + kSegment - 1) / kSegment;
    for (int64_t first = 0; first < a_.M; first += some) {
      const int64_t count = std::min(some, a_.M - first);
      Floats total(count * stride);
      int64_t turn = 0;
      std::mutex mutex;
      std::condition_variable turned;
      share(segments, threads, [&](const auto& next) {
        Desk desk(*this, kSegment);
        Floats partial(count * stride);
        std::vector<float> scratch;
        for (int64_t segment; (segment = next()) >= 0;) {
          const int64_t k = segment * kSegment, K = std::min(kSegment, a_.K - k);
          const Left rows = left(first, count, k, K, scratch);
          for (int64_t panel = 0; panel < panels(); ++panel) {
            pack_right(panel, k, K, desk.right.data());
            for (int64_t m = 0; m < count; m += kGroup) {
              const int64_t here = std::min(kGroup, count - m);
              multiply_segment(rows.from(m, 0), here, K, desk.right.data(), desk.sums.data());
              for (int64_t r = 0; r < here; ++r) {
                std::copy_n(desk.sums.data() + r * tiles_.columns, tiles_.columns,
                            partial.data() + (m + r) * stride + panel * tiles_.columns);
              }
            }
          }
          std::unique_lock<std::mutex> lock(mutex);
          turned.wait(lock, [&] { return turn == segment; });
          lock.unlock();  // nobody else's turn comes before this one says so
          made_.finish(partial.data(), count * stride, nullptr, segment > 0, false, total.data(), kFloat32);
          lock.lock();
          ++turn;
          turned.notify_all();
        }
      });
      for (int64_t panel = 0; panel < panels(); ++panel) {
        finish(first, count, panel, total.data() + panel * tiles_.columns, stride);
      }
    }
  }

  // The threads that so many rows are worth.
  int64_t worth(int64_t rows, int64_t threads) const {
    return std::max<int64_t>(1, std::min(threads, rows * a_.N * std::max<int64_t>(1, a_.K) / kWorth));
  }

  void run(int64_t threads) {
    if (a_.M == 0 || a_.N == 0) return;
    threads = worth(a_.M, threads);
    streams_ = !a_.add && a_.M * a_.N * element_size(a_.out_dtype) >= kStreamed;
    // Segments keep no more threads busy than there are; panels of so much of K fit beside each other while it is
    // short.
    const int64_t segments = (a_.K + kSegment - 1) / kSegment;
    const bool few = segments < std::min(threads, panels()) && panel_floats(a_.K) * 4 <= 2 * kPartial;
    if (a_.K > kDeep && !(few && direct())) return by_segments(threads);
    if (a_.K > kDeep) return by_panels(threads);
    return a_.N > a_.M ? by_panels(threads) : by_rows(threads);
  }

 protected:
  const Args& a_;
  const Products& made_;
  const Tiles& tiles_;
  const int64_t size_;
  bool streams_ = false;
};

// The panels of a product, block by block. A block has a buffer from its first panel until its sums are taken. A
// thread stays with a block, whose lines are in its caches, and helps with another's when there is no new one.
class Queue {
 public:
  Queue(int64_t blocks, int64_t each, int64_t panels, int64_t buffers, int64_t floats)
      : blocks_(blocks), each_(each), panels_(panels) {
    for (int64_t i = 0; i < buffers; ++i) held_.emplace_back(floats);
    for (Floats& buffer : held_) free_.push_back(buffer.data());
  }

  // A panel to multiply, of `block` while that has some, and its block; -1: there is none left.
  int64_t next(int64_t& block) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (block >= 0 && taken_[block].begun < size(block)) return take(block);
      if ((int64_t)taken_.size() < blocks_ && !free_.empty()) {
        block = (int64_t)taken_.size();
        taken_.push_back({0, 0, free_.back()});
        free_.pop_back();
        return take(block);
      }
      for (block = (int64_t)taken_.size() - 1; block >= 0; --block) {
        if (taken_[block].begun < size(block)) return take(block);
      }
      if ((int64_t)taken_.size() == blocks_) return -1;
      freed_.wait(lock);
    }
  }

  float* buffer(int64_t block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return taken_[block].buffer;
  }

  // After a panel: whether it was the last of its block.
  bool completes(int64_t block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return ++taken_[block].done == size(block);
  }

  void release(int64_t block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(taken_[block].buffer);
    freed_.notify_all();
  }

 private:
  struct Taken {
    int64_t begun, done;  // panels
    float* buffer;
  };

  int64_t size(int64_t block) const { return std::min(each_, panels_ - block * each_); }
  int64_t take(int64_t block) { return block * each_ + taken_[block].begun++; }

  const int64_t blocks_, each_, panels_;
  std::vector<Floats> held_;
  std::vector<float*> free_;
  std::vector<Taken> taken_;
  std::mutex mutex_;
  std::condition_variable freed_;
};

// The statistics of each row of a product of hidden states and a head, which is not written to memory: a block of its
// columns lies in a cache until its sums are taken.
class Scores : Product {
 public:
  Scores(const Args& product, const FastgrpoArgs& rows, const Products& made, const Sweeps* table)
      : Product(product, made), rows_(rows), sweeps_(table[kFloat32]) {}

  void run(int64_t threads) {
    const int64_t slices = (a_.M + kSlice - 1) / kSlice;
    for (int64_t i = 0; i < slices; ++i) {
      const int64_t m = a_.M * i / slices;
      const int64_t count = a_.M * (i + 1) / slices - m;
      run_slice(m, count, worth(count, threads));
    }
  }

 private:
  static constexpr int64_t kSlice = 512;  // rows at a time
  static constexpr int64_t kStride =
      kBlock + 64;  // of a row in a block; a power of 2 would crowd few lines of a cache
  static_assert(kCapPadding <= 64, "a softcap writes so many elements behind a row");

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
    const int64_t blocks = (a_.N + kBlock - 1) / kBlock, each = kBlock / tiles_.columns;
    std::vector<RowSums> sums_of(count * blocks);
    const Groups rows(*this, first, count, threads);
    Queue queue(blocks, each, panels(), std::min(threads, std::clamp<int64_t>(threads / 4, 4, 16)), count * kStride);
    share(threads, threads, [&](const auto&) {
      Desk desk(*this, a_.K);
      for (int64_t block = -1, panel; (panel = queue.next(block)) >= 0;) {
        float* const buffer = queue.buffer(block);
        const int64_t n = panel * tiles_.columns, begin = block * kBlock;
        const int64_t columns = std::min<int64_t>(tiles_.columns, a_.N - n);
        pack_right(panel, 0, a_.K, desk.right.data());
        for (int64_t m = 0; m < count; m += kGroup) {
          const int64_t here = std::min(kGroup, count - m);
          multiply(rows.at(m), here, a_.K, desk.right.data(), desk);
          for (int64_t r = 0; r < here; ++r) {
            made_.finish(desk.sums.data() + r * tiles_.columns, columns, a_.bias == nullptr ? nullptr : a_.bias + n,
                         false, false, buffer + (m + r) * kStride + (n - begin), kFloat32);
          }
        }
        if (!queue.completes(block)) continue;
        const int64_t width = std::min<int64_t>(kBlock, a_.N - begin);
        for (int64_t r = 0; r < count; ++r) {
          if (!rows_.mask[first + r]) continue;
          cap(buffer + r * kStride, width);
          const int64_t id = targets[r].id, inside = id >= begin && id < begin + width ? id - begin : -1;
          sums_of[r * blocks + block] =
              sweeps_.sums(buffer + r * kStride, 0, width, inside, targets[r].logit,
                           Scale(rows_.inv_temperature[first + r]).c, rows_.entropy != nullptr);
        }
        queue.release(block);
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

  const FastgrpoArgs& rows_;
  const Sweeps& sweeps_;
};

}  // namespace
}  // namespace fastgrpo

void fastgrpo_cpu_head_stats(const FastgrpoMatmul* product, const FastgrpoArgs* rows, int32_t isa, int32_t threads) {
  fastgrpo::Scores(*product, *rows, *fastgrpo::products_for((fastgrpo::Isa)isa),
                   fastgrpo::sweeps_for((fastgrpo::Isa)isa))
      .run(threads);
}

void fastgrpo_cpu_matmul(const FastgrpoMatmul* args, int32_t isa, int32_t threads) {
  fastgrpo::Product(*args, *fastgrpo::products_for((fastgrpo::Isa)isa)).run(threads);
}
