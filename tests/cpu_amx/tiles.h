// The AMX instructions of csrc/cpu/amx.h on any CPU, by the rules of Intel's manual; what a CPU would refuse is
// remembered.

#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_tile_loadconfig
#define _tile_release emulated_tile_release
#endif

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <atomic>

namespace emulated {

struct Tile {
  int rows, bytes;  // of a row; 0 and 0: not configured
  uint8_t data[16][64];
};

// Configurations that were loaded, and threads whose tiles are in use.
static std::atomic<int64_t> loaded(0), in_use(0);
static thread_local Tile tiles[8];
static thread_local bool configured = false;

static std::atomic<const char*> violation(nullptr);  // the first one since it was asked for

static inline bool require(bool holds, const char* what) {
  const char* none = nullptr;
  if (!holds) violation.compare_exchange_strong(none, what);
  return holds;
}

static inline Tile& tile(int i) {
  require(configured && tiles[i].rows > 0, "a tile that is not configured");
  return tiles[i];
}

static inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
static inline float read(const uint8_t* at) {
  float x;
  memcpy(&x, at, sizeof x);
  return flushed(x);
}
static inline float widened(const uint8_t* at) {
  const uint8_t bytes[4] = {0, 0, at[0], at[1]};
  return read(bytes);
}

}  // namespace emulated

static inline void _tile_release() {
  if (emulated::configured) --emulated::in_use;
  emulated::configured = false;
}

static inline void _tile_loadconfig(const void* from) {
  using emulated::require;
  uint8_t config[64];
  memcpy(config, from, sizeof config);
  bool good = require(config[0] == 1, "a palette that is not 1");
  for (int i = 1; i < 16; ++i) good &= require(config[i] == 0, "a configuration with a start or reserved bytes");
  for (int i = 0; i < 16; ++i) {
    const int bytes = config[16 + 2 * i] + 256 * config[17 + 2 * i], rows = config[48 + i];
    good &= require(i < 8 || (bytes == 0 && rows == 0), "a ninth tile");
    good &= require(bytes <= 64 && rows <= 16 && (bytes == 0) == (rows == 0), "rows or bytes that no tile has");
    if (good && i < 8) emulated::tiles[i] = {rows, bytes, {}};
  }
  if (!emulated::configured) ++emulated::in_use;
  emulated::configured = true;
  ++emulated::loaded;
}

static inline void _tile_zero(int to) {
  emulated::Tile& tile = emulated::tile(to);
  memset(tile.data, 0, sizeof tile.data);
}

static inline void _tile_loadd(int to, const void* from, int64_t stride) {
  emulated::Tile& tile = emulated::tile(to);
  memset(tile.data, 0, sizeof tile.data);
  for (int r = 0; r < tile.rows; ++r) memcpy(tile.data[r], (const char*)from + r * stride, tile.bytes);
}

static inline void _tile_stored(int from, void* to, int64_t stride) {
  const emulated::Tile& tile = emulated::tile(from);
  for (int r = 0; r < tile.rows; ++r) memcpy((char*)to + r * stride, tile.data[r], tile.bytes);
}

// sums += a times b, whose elements are pairs: the first of each are summed by themselves, and the second ones.
static inline void _tile_dpbf16ps(int sums, int left, int right) {
  using namespace emulated;
  Tile& c = tile(sums);
  const Tile &a = tile(left), &b = tile(right);
  const bool good = sums != left && sums != right && left != right && a.rows == c.rows && a.bytes == b.rows * 4 &&
                    b.bytes == c.bytes && c.bytes % 4 == 0;
  if (!require(good, "tiles that do not fit each other")) return;
  for (int m = 0; m < c.rows; ++m) {
    float temp[32] = {};
    for (int k = 0; k < a.bytes / 4; ++k) {
      const float x[2] = {widened(a.data[m] + 4 * k), widened(a.data[m] + 4 * k + 2)};
      for (int n = 0; n < c.bytes / 2; ++n) {
        temp[n] = flushed(fmaf(x[n % 2], widened(b.data[k] + 2 * n), temp[n]));
      }
    }
    for (int n = 0; n < c.bytes / 4; ++n) {
      const float sum = flushed(read(c.data[m] + 4 * n) + flushed(temp[2 * n] + temp[2 * n + 1]));
      memcpy(c.data[m] + 4 * n, &sum, sizeof sum);
    }
  }
}

extern "C" __attribute__((visibility("default"))) const char* fastgrpo_host_tiles_violation() {
  return emulated::violation.exchange(nullptr);
}
extern "C" __attribute__((visibility("default"))) int64_t fastgrpo_host_tiles_loaded() { return emulated::loaded; }
extern "C" __attribute__((visibility("default"))) int64_t fastgrpo_host_tiles_in_use() { return emulated::in_use; }
