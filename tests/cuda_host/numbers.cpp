// The arithmetic instructions of device.h that C has no function for. Apart from the machine, for elements.h has types
// of the same names as the kernels' own.

#include "cpu/elements.h"
#include "device.h"

namespace fastgrpo {
namespace {

// The bits of the larger number; zero is positive when either is. Equal numbers differ in nothing but a zero's sign.
uint32_t max_bits(float x, float y, uint32_t a, uint32_t b, uint32_t nan) {
  return isnan(x) || isnan(y) ? nan : x > y ? a : x < y ? b : a & b;
}

template <class Element>
uint32_t max_pair(uint32_t a, uint32_t b) {
  uint32_t pair = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const Element x = {(uint16_t)(a >> shift)}, y = {(uint16_t)(b >> shift)};
    pair |= max_bits(to_float(x), to_float(y), x.bits, y.bits, 0x7fff) << shift;
  }
  return pair;
}

template <class Element>
uint32_t pack_pair(float low, float high) {
  Element a, b;
  from_float(low, &a);
  from_float(high, &b);
  return a.bits | (uint32_t)b.bits << 16;
}

}  // namespace

uint32_t max_bf16x2(uint32_t a, uint32_t b) { return max_pair<BFloat16>(a, b); }
uint32_t max_f16x2(uint32_t a, uint32_t b) { return max_pair<Float16>(a, b); }
float max_f32(float a, float b) { return as_float(max_bits(a, b, as_bits(a), as_bits(b), 0x7fffffff)); }

void unpack_f16x2(uint32_t pair, float& low, float& high) {
  low = to_float(Float16{(uint16_t)pair});
  high = to_float(Float16{(uint16_t)(pair >> 16)});
}

uint32_t pack_bf16x2(float low, float high) { return pack_pair<BFloat16>(low, high); }
uint32_t pack_f16x2(float low, float high) { return pack_pair<Float16>(low, high); }

}  // namespace fastgrpo
