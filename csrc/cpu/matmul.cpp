// Packing and tiles of a matrix product, compiled once per instruction set on top of the vector layer in
// FASTGRPO_SIMD.
//
// As in sweeps.cpp, every function is in an unnamed namespace.

#include "matmul.h"

#include <math.h>
#include <string.h>

// See sweeps.cpp; with FASTGRPO_PAIRS there is also dot(a, b, c) = c + the products of the pairs of bf16 in each lane.
// With FASTGRPO_AMX, tiles of bf16 are those of amx.h.
#include FASTGRPO_SIMD

#ifdef FASTGRPO_AMX
#include "amx.h"
#endif

namespace fastgrpo {
namespace {

using Vec = Simd::Vec;

constexpr int kVectors = Simd::kRegisters == 32 ? 4 : 2;  // of a tile's row
constexpr int kColumns = kVectors * Simd::kWidth;
constexpr int kRows = 6;  // with the columns of a step and one element of a row, what the registers hold

template <class T>
struct Single {
  static constexpr int kElements = 1;
  static Vec step(Vec a, Vec b, Vec sum) { return Simd::fma(a, b, sum); }
  static float lane(const T* x, int64_t, bool) { return to_float(*x); }
};

#if defined(FASTGRPO_PAIRS) || defined(FASTGRPO_AMX)
struct Pair {
  static constexpr int kElements = 2;
#ifdef FASTGRPO_PAIRS
  static Vec step(Vec a, Vec b, Vec sum) { return Simd::dot(a, b, sum); }
#endif
  static float lane(const BFloat16* x, int64_t k_stride, bool whole) {
    return float_of(x[0].bits | (whole ? (uint32_t)x[k_stride].bits << 16 : 0));
  }
};
#endif

constexpr int kSquare = 16;  // lanes

// out (k, i) from the columns of x (i, k), kSquare x kSquare lanes of 4 bytes; i_stride in lanes.
void transpose(const float* x, int64_t i_stride, float* out, int64_t width) {
#ifdef FASTGRPO_TRANSPOSE
  Simd::transpose(x, i_stride, out, width);
#else
  for (int k = 0; k < kSquare; ++k) {
    for (int i = 0; i < kSquare; ++i) out[k * width + i] = x[i * i_stride + k];
  }
#endif
}

template <class T, class Op>
void pack(const void* from, int64_t k_stride, int64_t i_stride, int64_t K, int64_t count, int64_t width, float* out) {
  const T* const x = (const T*)from;
  constexpr int kElements = Op::kElements;
  const int64_t lanes = (K + kElements - 1) / kElements, whole = K / kElements;
  if (k_stride == 1) {
    // Rows of lanes to columns, a square at a time; what is left over goes lane by lane.
    float square[kSquare * kSquare];
    for (int64_t i = 0; i < width; i += kSquare) {
      const bool full = count - i >= kSquare && width - i >= kSquare;
      int64_t s = 0;
      for (; full && s + kSquare <= whole; s += kSquare) {
        const T* const corner = x + i * i_stride + s * kElements;
        if constexpr (kElements * sizeof(T) == sizeof(float)) {
          if (i_stride * (int64_t)sizeof(T) % (int64_t)sizeof(float) == 0) {
            transpose((const float*)corner, i_stride / kElements, out + s * width + i, width);
            continue;
          }
        }
        for (int r = 0; r < kSquare; ++r) {
          for (int k = 0; k < kSquare; ++k)
            square[r * kSquare + k] = Op::lane(corner + r * i_stride + k * kElements, 1, true);
        }
        transpose(square, kSquare, out + s * width + i, width);
      }
      const int64_t end = width - i < kSquare ? width : i + kSquare;
      for (; s < lanes; ++s) {
        for (int64_t j = i; j < end; ++j) {
          out[s * width + j] = j < count ? Op::lane(x + j * i_stride + s * kElements, 1, s < whole) : 0.0f;
        }
      }
    }
    return;
  }
  for (int64_t s = 0; s < lanes; ++s) {
    const T* const row = x + s * kElements * k_stride;
    float* const to = out + s * width;
    if (i_stride == 1 && s < whole) {
      for (int64_t i = 0; i < count; ++i) to[i] = Op::lane(row + i, k_stride, true);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = Op::lane(row + i * i_stride, k_stride, s < whole);
    }
    for (int64_t i = count; i < width; ++i) to[i] = 0.0f;
  }
}

template <int kHeight>
struct Sums {
  Vec at[kHeight][kVectors];

  template <class Op, class F>
  void step(const float* right, F left) {
    Vec v[kVectors];
    for (int i = 0; i < kVectors; i += 2) Simd::load2(right + i * Simd::kWidth, v[i], v[i + 1]);
#pragma GCC unroll 8
    for (int r = 0; r < kHeight; ++r) {
      const Vec a = Simd::set(left(r));
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) at[r][i] = Op::step(a, v[i], at[r][i]);
    }
  }
};

template <class Op, int kHeight>
void tile_of(const char* a, int64_t row, int64_t lane, int64_t K, const float* right, float* sums, bool add) {
  Sums<kHeight> sum;
  for (int r = 0; r < kHeight; ++r) {
    for (int i = 0; i < kVectors; ++i) sum.at[r][i] = Simd::set(0.0f);
  }
  for (int64_t s = 0; s < K / Op::kElements; ++s, a += lane, right += kColumns) {
    sum.template step<Op>(right, [&](int r) {
      float x;
      memcpy(&x, a + r * row, sizeof x);
      return x;
    });
  }
  if (K % Op::kElements != 0) {
    sum.template step<Op>(right, [&](int r) {
      uint16_t half;
      memcpy(&half, a + r * row, sizeof half);
      return float_of(half);
    });
  }
  for (int r = 0; r < kHeight; ++r) {
    for (int i = 0; i < kVectors; i += 2) {
      float* const at = sums + r * kColumns + i * Simd::kWidth;
      if (add) {
        Vec p, q;
        Simd::load2(at, p, q);
        sum.at[r][i] = Simd::add(p, sum.at[r][i]);
        sum.at[r][i + 1] = Simd::add(q, sum.at[r][i + 1]);
      }
      Simd::store2(at, sum.at[r][i], sum.at[r][i + 1]);
    }
  }
}

template <class Op>
void tile(const char* a, int64_t row, int64_t lane, int64_t K, const float* right, int32_t rows, float* sums,
          bool add) {
  switch (rows) {
    case 1:
      return tile_of<Op, 1>(a, row, lane, K, right, sums, add);
    case 2:
      return tile_of<Op, 2>(a, row, lane, K, right, sums, add);
    case 3:
      return tile_of<Op, 3>(a, row, lane, K, right, sums, add);
    case 4:
      return tile_of<Op, 4>(a, row, lane, K, right, sums, add);
    case 5:
      return tile_of<Op, 5>(a, row, lane, K, right, sums, add);
    default:
      return tile_of<Op, kRows>(a, row, lane, K, right, sums, add);
  }
}

template <class T>
void finish_as(const float* sums, int64_t count, const float* bias, bool add, bool stream, T* out) {
  constexpr int64_t kTwo = 2 * Simd::kWidth;
  int64_t i = 0;
  (void)stream;
  const bool vectors = sizeof(T) == sizeof(float) || !add;
  for (; vectors && i + kTwo <= count; i += kTwo) {
    Vec a, b, c, d;
    Simd::load2(sums + i, a, b);
    if (bias != nullptr) {
      Simd::load2(bias + i, c, d);
      a = Simd::add(a, c);
      b = Simd::add(b, d);
    }
#ifdef FASTGRPO_STREAM
    if (stream) {
      Simd::stream2(out + i, a, b);
      continue;
    }
#endif
    if constexpr (sizeof(T) == sizeof(float)) {
      if (add) {
        Simd::load2(out + i, c, d);
        a = Simd::add(c, a);
        b = Simd::add(d, b);
      }
      Simd::store2(out + i, a, b);
    } else {
      Simd::store2_in_order(out + i, a, b);
    }
  }
  for (; i < count; ++i) {
    float x = sums[i];
    if (bias != nullptr) x = x + bias[i];
    if (add) x = to_float(out[i]) + x;
    from_float(x, out + i);
  }
}

void finish(const float* sums, int64_t count, const float* bias, bool add, bool stream, void* out, int32_t dtype) {
  if (dtype == 0) return finish_as(sums, count, bias, add, stream, (float*)out);
  if (dtype == 1) return finish_as(sums, count, bias, add, stream, (BFloat16*)out);
  return finish_as(sums, count, bias, add, stream, (Float16*)out);
}

#ifdef FASTGRPO_AMX
// [count][lanes], a square at a time.
void pack_rows(const void* from, int64_t k_stride, int64_t i_stride, int64_t K, int64_t count, float* out) {
  const BFloat16* const x = (const BFloat16*)from;
  const int64_t lanes = (K + 1) / 2, whole = K / 2;
  float square[kSquare * kSquare];
  for (int64_t i = 0; i < count; i += kSquare) {
    for (int64_t s = 0; s < lanes; s += kSquare) {
      const BFloat16* const corner = x + i * i_stride + s * 2 * k_stride;
      const bool full = i_stride == 1 && i + kSquare <= count && s + kSquare <= whole;
      if (full) {
        for (int k = 0; k < kSquare; ++k) {
          for (int r = 0; r < kSquare; ++r)
            square[k * kSquare + r] = Pair::lane(corner + k * 2 * k_stride + r, k_stride, true);
        }
        transpose(square, kSquare, out + i * lanes + s, lanes);
        continue;
      }
      for (int64_t r = 0; r < kSquare && i + r < count; ++r) {
        for (int64_t k = 0; k < kSquare && s + k < lanes; ++k) {
          out[(i + r) * lanes + s + k] = Pair::lane(corner + k * 2 * k_stride + r * i_stride, k_stride, s + k < whole);
        }
      }
    }
  }
}
#endif

}  // namespace

namespace FASTGRPO_PRODUCTS {

extern const Products kProducts = {
    {
        {kRows, kColumns, 1, true, pack<float, Single<float>>, tile<Single<float>>},
#if defined(FASTGRPO_AMX)
        {Amx::kRows, Amx::kColumns, 2, true, pack<BFloat16, Pair>, Amx::tile, pack_rows, Amx::rest, Amx::kDepth},
#elif defined(FASTGRPO_PAIRS)
        {kRows, kColumns, 2, true, pack<BFloat16, Pair>, tile<Pair>},
#else
        {kRows, kColumns, 1, false, pack<BFloat16, Single<BFloat16>>, tile<Single<BFloat16>>},
#endif
        {kRows, kColumns, 1, false, pack<Float16, Single<Float16>>, tile<Single<Float16>>},
    },
    finish,
};

}  // namespace FASTGRPO_PRODUCTS
}  // namespace fastgrpo
