// What every product over threads is made of: how its operands are packed and read, and the order of a sum.
//
// An element is the sum over k of a depth of products at a time, added one after the other; beyond kDeep they add up
// to the sums of segments first, which are added one after the other. That depends on K alone, so an element has the
// same bits whatever M, N and the number of threads are.

#pragma once

#include <algorithm>
#include <vector>

#include "api.h"
#include "matmul.h"
#include "row.h"
#include "threads.h"

namespace fastgrpo {

constexpr int64_t kDeep = 16384;     // more of K is cut into segments, and these go over the threads
constexpr int64_t kSegment = 4032;   // which is 21 times 192, the usual depth
constexpr int64_t kGroup = 96;       // rows whose sums wait in a cache for the next depth of K
constexpr int64_t kWorth = 4 << 20;  // multiplications that are worth a thread
constexpr int64_t kLine = 64;        // bytes of a cache line

inline float* on_line(float* x) { return (float*)(((uintptr_t)x + kLine - 1) / kLine * kLine); }
inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

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

// A left operand: lane s of row m lies m * row + s * lane bytes from `at`.
struct Left {
  const char* at;
  int64_t row, lane;

  Left from(int64_t m, int64_t lanes) const { return {at + m * row + lanes * lane, row, lane}; }
};

class Product {
 protected:
  Product(const FastgrpoMatmul& a, const Products& made)
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

  // The most that `left` packs of so many rows into.
  int64_t packed_floats(int64_t count, int64_t K) const { return lanes(K) * up(count, 16) + kLine / 4; }

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

  // The threads that so many rows are worth.
  int64_t worth(int64_t rows, int64_t threads) const {
    return std::max<int64_t>(1, std::min(threads, rows * a_.N * std::max<int64_t>(1, a_.K) / kWorth));
  }

  const FastgrpoMatmul& a_;
  const Products& made_;
  const Tiles& tiles_;
  const int64_t size_;
  bool streams_ = false;
};

}  // namespace fastgrpo
