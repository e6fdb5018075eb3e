"""The gradient of a row of logits, from its statistics and two numbers: dL/dlogp and dL/dentropy."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .memory import end_elements, ends, load, narrow, store
from .numeric import LN2, LOG2E, LOG2E_LOW, RANGE, expm1, tanh_of


class Backward(NamedTuple):
    """What the gradient of a row is made of: numbers, or in a kernel's arguments pointers to (N,) of them."""

    g: Any  # dL/dlogp
    h: Any  # dL/dentropy; a kernel's None: 0
    logp: Any
    lse: Any
    entropy: Any  # as h


class Curve(NamedTuple):
    """What `gradient_of` is made of, the same all through a row: p * (a + b*log2(p)) with p = 2^(x*c - shift)."""

    c: Any  # log2(e) over the temperature
    shift: Any  # lse * log2(e)
    inv_temperature: Any
    lse: Any
    a: Any
    b: Any


@triton.jit
def curve_of(at_row, inv_temperature, HAS_H: tl.constexpr):
    """(`Curve`, careful) of a `Backward`. p = 2^(x*c - shift) * 2^-low, whose last factor is in a and b: what rounding
    took from the shift. careful: the shift is so large that exponents are taken otherwise."""
    g, h, _, lse, entropy = at_row
    shift = lse * LOG2E
    low = tl.fma(lse, LOG2E, -shift) + lse * LOG2E_LOW
    careful = ~(tl.abs(shift) < RANGE)
    low = tl.where(careful, 0.0, low)
    factor = tl.exp2(-low) * inv_temperature
    a = -g * factor
    b = 0.0
    if HAS_H:
        a = -(g + h * (entropy - low * LN2)) * factor
        b = -h * LN2 * factor
    return Curve(inv_temperature * LOG2E, shift, inv_temperature, lse, a, b), careful


@triton.jit
def gradient_at_target(target, at_row, inv_temperature, softcap, HAS_H: tl.constexpr):
    """That of the target's element, from log p and expm1, so that nothing cancels when p is near 1.

    target: its logit, capped; not used without a softcap.
    """
    g, h, logp, _, entropy = at_row
    p_minus_one, _ = expm1(logp)
    at_target = g * -p_minus_one
    if HAS_H:
        at_target -= h * tl.exp2(logp * LOG2E) * (tl.maximum(logp, -1000.0) + entropy)
    at_target *= inv_temperature
    if softcap is not None:
        at_target *= 1.0 - (target / softcap) * (target / softcap)
    return at_target


@triton.jit
def gradient_of(x, row, softcap, HAS_H: tl.constexpr, CAREFUL: tl.constexpr):
    """p * (a + b*log2(p)) with p = 2^(x*c - shift); with a softcap x is capped first, and led through its slope."""
    a = row.a
    b = row.b
    if softcap is not None:
        tanh = tanh_of(x, softcap)
        a *= 1.0 - tanh * tanh
        b *= 1.0 - tanh * tanh
        x = softcap * tanh
    if CAREFUL:
        t = (x * row.inv_temperature - row.lse) * LOG2E
    else:
        t = tl.fma(x, row.c, -row.shift)
    p = tl.exp2(t)
    if HAS_H:
        # Bounded, so that p == 0 gives exactly 0; a NaN goes on in p.
        return p * tl.fma(tl.maximum(t, -1000.0), b, a)
    return p * a


@triton.jit
def _tile(body, out, start, left, fence, row, softcap, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
          HAS_H: tl.constexpr, CAREFUL: tl.constexpr, SAME_PHASE: tl.constexpr):  # fmt: skip
    """Gradient of the tile at `start`, of `left` vectors (None: all); if `fence`, with a barrier between its loads and
    its stores."""
    x = load(tl.multiple_of(body + start, 16), left, UNROLL, LANES, K, "evict_first")
    if fence:
        tl.debug_barrier()
    y = gradient_of(x, row, softcap, HAS_H, CAREFUL)
    sink = out + start
    if SAME_PHASE:
        sink = tl.multiple_of(sink, K * out.dtype.element_ty.primitive_bitwidth // 8)
    store(sink, y, left, UNROLL, LANES, K)


@triton.jit
def _sweep(body, out, n_vec, row, softcap, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
           HAS_H: tl.constexpr, CAREFUL: tl.constexpr, SAME_PHASE: tl.constexpr, NARROWER: tl.constexpr):  # fmt: skip
    """Gradient of n_vec vectors, from the last to the first: the end of a row is what a cache still holds of it.

    NARROWER: `out` lies in the second half of the row, all of whose vectors these are. The gradient of an element that
    is d elements from the row's end lies on elements that are at most d/2 from there: later tiles read none of them.
    """
    # The race: those elements may belong to this tile, or to one that a slower warp has not read yet. After a barrier
    # between a tile's loads and its stores, every warp has read all from this tile to the row's end, and stores are
    # free until the sweep is twice as far from there. So a barrier in what is left over at the row's end, and in the
    # 1st, 3rd, 7th, ... full tile is enough.
    TILE: tl.constexpr = UNROLL * LANES
    full = n_vec // TILE
    if full * TILE < n_vec:
        _tile(body, out, full * (TILE * K), n_vec - full * TILE, NARROWER, row, softcap, K, LANES, UNROLL, HAS_H,
              CAREFUL, SAME_PHASE)  # fmt: skip
    for i in range(full):
        fence = (((i + 1) & (i + 2)) == 0) if NARROWER else False
        _tile(body, out, (full - 1 - i) * (TILE * K), None, fence, row, softcap, K, LANES, UNROLL, HAS_H, CAREFUL,
              SAME_PHASE)  # fmt: skip


@triton.jit
def all_have_the_target(INPLACE: tl.constexpr):
    """The race: every warp reads the target's logit, and where the gradient lies in the row's memory one of them
    overwrites it; all must have read before one writes, be it zeroes."""
    if INPLACE:
        tl.debug_barrier()


@triton.jit
def row_gradient(row_ptr, out, id, target, V, at_row, inv_temperature, softcap, first, n_max, with_ends,
                 K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, HAS_H: tl.constexpr,
                 SAME_PHASE: tl.constexpr, INPLACE: tl.constexpr):  # fmt: skip
    """Gradient of the vectors [first, first + n_max) of a row, and of its ends if asked.

    All of the row: first 0, n_max None, with_ends True. target: `target_logit`, read with a softcap only. INPLACE:
    `out` lies in the row's memory; where the target was read, `all_have_the_target` comes before. If it is narrower,
    too, then a program takes all of the row.

    out_j = inv_temperature * (g * (1[j == id] - p_j) - h * p_j * (log p_j + entropy)) with the `Backward` of the row;
    off the target that is p_j * (a + b * log2 p_j).
    """
    NARROWER: tl.constexpr = INPLACE and out.dtype.element_ty != row_ptr.dtype.element_ty
    row, careful = curve_of(at_row, inv_temperature, HAS_H)
    head, n_vec = ends(row_ptr, V, K)
    known = (id >= 0) & (id < V)
    at = tl.where(known, id, 0).to(tl.int32)
    at_target = gradient_at_target(target, at_row, inv_temperature, softcap, HAS_H)
    if with_ends:
        j, inside = end_elements(V, head, n_vec, K, LANES)
        x = tl.load(row_ptr + j, mask=inside, other=0.0).to(tl.float32)
        if careful:
            y = gradient_of(x, row, softcap, HAS_H, True)
        else:
            y = gradient_of(x, row, softcap, HAS_H, False)
        if not NARROWER:
            tl.store(out + j, narrow(y, out.dtype.element_ty), mask=inside)
    body = row_ptr + head + first * K
    sink = out + head + first * K
    n_here = n_vec - first if n_max is None else tl.minimum(n_vec - first, n_max)
    if careful:
        _sweep(body, sink, n_here, row, softcap, K, LANES, 1, HAS_H, True, SAME_PHASE, NARROWER)
    else:
        _sweep(body, sink, n_here, row, softcap, K, LANES, 2 * UNROLL, HAS_H, False, SAME_PHASE, NARROWER)
    if n_max is not None:
        at_end = (at < head) | (at >= head + n_vec * K)
        here = (at >= head + first * K) & (at < head + (first + n_here) * K)
        known = known & (here | (at_end & with_ends))
    if NARROWER:
        # The race: the gradient of the row's head lies on its middle, which every warp must have read.
        tl.debug_barrier()
        tl.store(out + j, narrow(y, out.dtype.element_ty), mask=inside)
    # The race: the sweep's thread that owns the target's vector also writes this element, with the value of a
    # non-target; that store must come first.
    tl.debug_barrier()
    tl.store(out + at, narrow(at_target, out.dtype.element_ty), mask=known)
