// Matrix products whose sums are in fp32, each in one order: what matmul.cpp offers, once per instruction set.
//
// A lane is 32 bits: one fp32 element of k or, where the CPU multiplies them itself, a pair of bf16 ones. Packed
// operands are [lanes of k][width], zero where there is nothing to pack.

#pragma once

#include <stdint.h>

namespace fastgrpo {

struct Tiles {
  int32_t rows, columns;  // of the largest tile; a packed right operand is `columns` wide
  int32_t elements;       // of k in a lane
  bool reads_rows;        // of a left operand with unit stride in k, as they are
  // x: element (k, i) lies k * k_stride + i * i_stride elements from it.
  void (*pack)(const void* x, int64_t k_stride, int64_t i_stride, int64_t K, int64_t count, int64_t width, float* out);
  // sums (rows, columns) = or += the product of K <= depth elements; the lane s of row r lies r * row + s * lane
  // bytes from a. A last lane that K fills by half is read by half.
  void (*tile)(const char* a, int64_t row, int64_t lane, int64_t K, const float* right, int32_t rows, float* sums,
               bool add);
  // As `pack`, but [count][lanes of k]; null: a left operand is packed as a right one is.
  void (*pack_rows)(const void* x, int64_t k_stride, int64_t i_stride, int64_t K, int64_t count, float* out) = nullptr;
  // Null, or what a thread calls after its last tile.
  void (*rest)() = nullptr;
  // Elements of k whose products a tile sums up before they join the sums in memory. A part of every sum's order: its
  // error grows with the root of this number, and at 192 is that of the usual libraries' fp32 products.
  int64_t depth = 192;
};

struct Products {
  Tiles tiles[3];  // by the DType of the operands
  // out[i] = sums[i] (+ bias[i]), or += with `add`; out has that DType. stream: written past the caches; out is
  // then on a cache line, count a multiple of 32, and nothing is added.
  void (*finish)(const float* sums, int64_t count, const float* bias, bool add, bool stream, void* out, int32_t dtype);
};

// One table per instruction set; defined where CMakeLists.txt compiles matmul.cpp for it.
namespace portable {
extern const Products kProducts;
}
namespace avx2 {
extern const Products kProducts;
}
namespace avx512 {
extern const Products kProducts;
}
namespace avx512bf16 {
extern const Products kProducts;
}
namespace amx {
extern const Products kProducts;
}
namespace neon {
extern const Products kProducts;
}
namespace neonbf16 {
extern const Products kProducts;
}

}  // namespace fastgrpo
