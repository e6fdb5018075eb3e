"""Constants, and the functions of a number that statistics, gradient and objective share."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.9259629911266175e-08)  # log2(e) minus its fp32 value
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
RANGE = tl.constexpr(4096.0)  # exponents are taken as they are up to here


@triton.jit
def expm1(q):
    """(expm1(q), expm1(q) - q), both without cancellation near 0."""
    k = 2.50521084e-08  # 1/11!
    k = tl.fma(k, q, 2.75573192e-07)
    k = tl.fma(k, q, 2.75573192e-06)
    k = tl.fma(k, q, 2.48015873e-05)
    k = tl.fma(k, q, 1.98412698e-04)
    k = tl.fma(k, q, 1.38888889e-03)
    k = tl.fma(k, q, 8.33333333e-03)
    k = tl.fma(k, q, 4.16666667e-02)
    k = tl.fma(k, q, 1.66666667e-01)
    k = tl.fma(k, q, 0.5) * q * q
    far = tl.exp2(q * LOG2E) - 1.0
    small = tl.abs(q) < 1.0
    return tl.where(small, q + k, far), tl.where(small, k, far - q)


@triton.jit
def log1p(q):
    """log(1 + q) for 0 <= q <= 1, without cancellation near 0: 2 atanh(q / (2 + q))."""
    s = q / (2.0 + q)
    square = s * s
    k = 2.0 / 15
    k = tl.fma(k, square, 2.0 / 13)
    k = tl.fma(k, square, 2.0 / 11)
    k = tl.fma(k, square, 2.0 / 9)
    k = tl.fma(k, square, 2.0 / 7)
    k = tl.fma(k, square, 2.0 / 5)
    k = tl.fma(k, square, 2.0 / 3)
    return tl.fma(k * square, s, 2.0 * s)


@triton.jit
def tanh_of(x, softcap):
    """tanh(x / softcap), to 1e-7 of 1: a capped logit is good to 1e-7 of the cap. -1 and 1 at the infinities."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E / softcap)))


@triton.jit
def capped(x, softcap):
    """Logits as the statistics take them: softcap * tanh(x / softcap), or x itself without a softcap (None)."""
    if softcap is not None:
        x = softcap * tanh_of(x, softcap)
    return x
