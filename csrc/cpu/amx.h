// Tiles of bf16 on AMX: 2 x 2 of 16 x 16 sums each, from two of the left operand and two of the right.

#pragma once

#include <stdint.h>
#include <string.h>

namespace fastgrpo {
namespace {

// The rows that this thread's tiles are configured for; 0: they are not.
thread_local int32_t configured_rows = 0;

// What the compiler must have written to memory before a tile reads it: not every one knows that tiles read.
void written(const void* x) { __asm__ volatile("" ::"r"(x) : "memory"); }

struct Amx {
  static constexpr int kSide = 16;  // rows and lanes of a tile
  static constexpr int kStep = 32;  // elements of k in a row of a tile
  static constexpr int kRows = 32, kColumns = 32;
  // Elements of k at a time: a panel's stay in L1, and their sums cost an eighth of multiplying.
  static constexpr int kDepth = 512;

  // 0, 1 above 2, 3: the sums; 4 above 5: of the left operand; 6, 7: of the right one. What lies below has no rows
  // where 16 are enough.
  static void configure(int32_t rows) {
    struct alignas(64) {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      const bool below = i == 2 || i == 3 || i == 5;
      const int32_t height = i >= 6 ? kSide : below ? rows - kSide : rows < kSide ? rows : kSide;
      if (height <= 0) continue;
      config.row_bytes[i] = 64;
      config.rows[i] = (uint8_t)height;
    }
    written(&config);
    _tile_loadconfig(&config);
    configured_rows = rows;
  }

  static void rest() {
    _tile_release();
    configured_rows = 0;
  }

  template <bool kBoth>
  static void step(const char* a, int64_t row, const float* right) {
    _tile_loadd(4, a, row);
    _tile_loadd(6, right, kColumns * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + kSide, kColumns * 4);
    _tile_dpbf16ps(1, 4, 7);
    if (!kBoth) return;
    _tile_loadd(5, a + kSide * row, row);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  template <bool kBoth>
  static void tile_of(const char* a, int64_t row, int64_t K, const float* right, int32_t rows, float* sums, bool add) {
    _tile_zero(0);
    _tile_zero(1);
    if (kBoth) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (; K >= kStep; K -= kStep, a += kStep * 2, right += kSide * kColumns) step<kBoth>(a, row, right);
    if (K > 0) {  // zeroes on both sides: 0 times what lies there might be NaN
      alignas(64) uint16_t rest_of_a[kRows][kStep] = {};
      alignas(64) float rest_of_right[kSide][kColumns] = {};
      for (int32_t r = 0; r < rows; ++r) memcpy(rest_of_a[r], a + r * row, K * 2);
      memcpy(rest_of_right, right, (K + 1) / 2 * sizeof rest_of_right[0]);
      written(rest_of_a);
      written(rest_of_right);
      step<kBoth>((const char*)rest_of_a, sizeof rest_of_a[0], rest_of_right[0]);
    }
    alignas(64) float fresh[kRows * kColumns];
    float* const to = add ? fresh : sums;
    _tile_stored(0, to, kColumns * 4);
    _tile_stored(1, to + kSide, kColumns * 4);
    if (kBoth) {
      _tile_stored(2, to + kSide * kColumns, kColumns * 4);
      _tile_stored(3, to + kSide * kColumns + kSide, kColumns * 4);
    }
    for (int32_t i = 0; add && i < rows * kColumns; ++i) sums[i] += fresh[i];
  }

  static void tile(const char* a, int64_t row, int64_t, int64_t K, const float* right, int32_t rows, float* sums,
                   bool add) {
    if (rows != configured_rows) configure(rows);
    written(right);
    (rows > kSide ? tile_of<true> : tile_of<false>)(a, row, K, right, rows, sums, add);
  }
};

}  // namespace
}  // namespace fastgrpo
