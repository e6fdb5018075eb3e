"""The columns of a row of logits that carry its gradient: all but a tail whose sum is within a tolerance.

One reading of a row gives its sum of |dz|. The next sets the columns apart that may be kept, those above the least
threshold that there can be, for they are few. The threshold is found on them alone, by bisection over bins of
magnitude, and the bin that fits in part is dropped column by column. Sums are over classes of columns as in
`statistics`, so that bits depend on the row alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .gradient import Backward, curve_of, gradient_at_target, gradient_of
from .memory import load, row_pointer
from .numeric import INF
from .statistics import _power_of_two, _sum, target_logit

BITS = tl.constexpr(20)  # of a magnitude's 31 that its bin leaves out: 3 bits of the mantissa stay
BELOW_ONE = tl.constexpr(1.0 - 2.0**-16)  # of the tolerance: what rounding may take from a sum
UNIT = tl.constexpr(2.0**18)  # of integers whose sum over a tile is exact: 2^12 of them stay below 2^31

_kernel = triton.jit(do_not_specialize=["V", "T", "stride_b", "stride_t", "n_rows", "room"])


class Chosen(NamedTuple):
    """What `choose_kernel` writes, as pointers."""

    ids: Any  # as in `Columns`
    dz: Any
    sizes: Any
    candidates: Any  # (programs, capacity) int64, for a program's own use


class Source(NamedTuple):
    """Where the gradient of a row comes from: from its logits, or from candidates that were made of them."""

    base: Any  # of the logits, rounded down to 16 bytes; or of the candidates, (column << 32 | bits of dz) each
    lead: Any  # elements between the base and the row; 0
    count: Any  # V; how many candidates
    careful: Any
    target: Any  # its column, -1 where there is none
    at_target: Any  # dz there


@triton.jit
def _total(s):
    """The sum of a tile, in 64-bit integers as in `statistics.totals`. inf where one is NaN."""
    top = tl.max(tl.max(tl.max(tl.where(s == s, s, INF), 2), 1), 0)
    up, down = _power_of_two(top)
    total = _sum((s * up).to(tl.int64)).to(tl.float32) * down
    return tl.where(top < INF, total, INF)


@triton.jit
def _place(i, K: tl.constexpr, LANES: tl.constexpr):
    """The places of tile i, [1, LANES, K]."""
    return tl.arange(0, LANES)[None, :, None] * K + tl.arange(0, K)[None, None, :] + i * (LANES * K)


@triton.jit
def _row_tile(source, curve, i, at, softcap, K: tl.constexpr, LANES: tl.constexpr, HAS_H: tl.constexpr):
    """(dz, columns) of tile i of a row, [1, LANES, K]: `at` for the target, and 0 outside the row."""
    TILE: tl.constexpr = LANES * K
    j = _place(i, K, LANES) - source.lead
    inside = (j >= 0) & (j < source.count)
    base = source.base + i * TILE
    if (i * TILE >= source.lead) & ((i + 1) * TILE - source.lead <= source.count):
        x = load(tl.multiple_of(base, 16), None, 1, LANES, K, "")
    else:
        x = tl.load(base + _place(0, K, LANES), mask=inside, other=0.0).to(tl.float32)
    if source.careful:
        y = gradient_of(x, curve, softcap, HAS_H, True)
    else:
        y = gradient_of(x, curve, softcap, HAS_H, False)
    return tl.where(inside, tl.where(j == source.target, at, y), 0.0), j


@triton.jit
def _sum_of_row(source, curve, softcap, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
                HAS_H: tl.constexpr, CAREFUL: tl.constexpr):  # fmt: skip
    """Σ|dz|; inf where a dz is no number. A class takes its elements in the order of the row, as in `statistics`."""
    TILE: tl.constexpr = LANES * K
    end = source.lead + source.count
    first = tl.where(source.lead > 0, 1, 0)
    rest = first + tl.maximum(end // TILE - first, 0) // UNROLL * UNROLL
    s = tl.zeros([1, LANES, K], tl.float32)
    for i in range(0, first):
        y, _ = _row_tile(source, curve, i, source.at_target, softcap, K, LANES, HAS_H)
        s += tl.abs(y)
    for i in range(first, rest, UNROLL):
        for u in tl.static_range(UNROLL):
            x = load(tl.multiple_of(source.base + (i + u) * TILE, 16), None, 1, LANES, K, "")
            y = gradient_of(x, curve, softcap, HAS_H, CAREFUL)
            s += tl.abs(tl.where(_place(i + u, K, LANES) - source.lead == source.target, source.at_target, y))
    for i in range(rest, tl.cdiv(end, TILE)):
        y, _ = _row_tile(source, curve, i, source.at_target, softcap, K, LANES, HAS_H)
        s += tl.abs(y)
    return _total(s)


@triton.jit
def _tile(source, curve, i, softcap, K: tl.constexpr, LANES: tl.constexpr, HAS_H: tl.constexpr):
    """(dz, columns, which of them count) of tile i of a source: inf for the target, which so is never small."""
    if source.base.dtype.element_ty == tl.int64:
        k = _place(i, K, LANES)
        there = k < source.count
        both = tl.load(source.base + k, mask=there, other=0)
        return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32), there
    else:
        y, j = _row_tile(source, curve, i, INF, softcap, K, LANES, HAS_H)
        return y, j, (j >= 0) & (j < source.count)


@triton.jit
def _edge(bin):
    """The smallest magnitude of a bin."""
    return (bin << BITS).to(tl.float32, bitcast=True)


@triton.jit
def _bin(magnitude):
    return magnitude.to(tl.int32, bitcast=True) >> BITS


@triton.jit
def _sum_below(source, curve, edge, softcap, K: tl.constexpr, LANES: tl.constexpr, HAS_H: tl.constexpr):
    """The sum of the magnitudes below `edge`."""
    s = tl.zeros([1, LANES, K], tl.float32)
    for i in range(tl.cdiv(source.lead + source.count, LANES * K)):
        y, _, _ = _tile(source, curve, i, softcap, K, LANES, HAS_H)
        s += tl.where(tl.abs(y) < edge, tl.abs(y), 0.0)
    return _total(s)


@triton.jit
def _running(x):
    """(running sums of a tile of integers >= 0 in the order of its places, each with its own element; the last)."""
    of_lane = tl.sum(x, 2)
    through = tl.cumsum(of_lane, 1)
    return tl.cumsum(x, 2) + (through - of_lane)[:, :, None], tl.max(tl.max(through, 1), 0)


@triton.jit
def _candidates(source, curve, out, capacity, floor, large, softcap, most, K: tl.constexpr, LANES: tl.constexpr,
                HAS_H: tl.constexpr):  # fmt: skip
    """Write what is not below `floor`, in the order of the row and as far as there is room, for a `Source`.

    Returns (how many, the sum of what is below, how many are not below `large`); ends early where these are more than
    `most`.
    """
    s = tl.zeros([1, LANES, K], tl.float32)
    count = 0
    n_large = 0
    i = 0
    tiles = tl.cdiv(source.lead + source.count, LANES * K)
    while (i < tiles) & (n_large <= most):
        y, j, there = _tile(source, curve, i, softcap, K, LANES, HAS_H)
        size = tl.abs(y)
        taken = there & (size >= floor)
        s += tl.where(size < floor, size, 0.0)
        # both counts of a tile, of at most 2^13, in one number
        k, both = _running(taken.to(tl.int32) + ((there & (size >= large)).to(tl.int32) << 16))
        k = count + (k & 0xFFFF) - 1
        taken = taken & (k < capacity)
        bits = y.to(tl.uint32, bitcast=True).to(tl.int64)
        tl.store(out + k, (j.to(tl.int64) << 32) | bits, mask=taken)
        count += both & 0xFFFF
        n_large += both >> 16
        i += 1
    return count, _total(s), n_large


@triton.jit
def _choose(source, curve, ids, dz, room, bin, end, below, budget, softcap, K: tl.constexpr, LANES: tl.constexpr,
            HAS_H: tl.constexpr):  # fmt: skip
    """Write K, as far as there is room, and return its size, or another above `room`.

    Of the bins from `bin` on, below which all fits into the budget, and before `end`, the last is searched below which
    all still fits. It is itself dropped column by column as far as that goes. below: the sum that the source lacks.
    """
    fits = below
    if source.base.dtype.element_ty != tl.int64:
        fits = _sum_below(source, curve, _edge(bin), softcap, K, LANES, HAS_H)
    while end - bin > 1:
        middle = (bin + end) // 2
        s = below + _sum_below(source, curve, _edge(middle), softcap, K, LANES, HAS_H)
        if s <= budget:
            bin = middle
            fits = s
        else:
            end = middle
    low = _edge(bin)
    high = _edge(bin + 1)
    left = (tl.maximum(budget - fits, 0.0) / high * UNIT).to(tl.int64)
    n = 0
    i = 0
    tiles = tl.cdiv(source.lead + source.count, LANES * K)
    while (i < tiles) & (n <= room):
        y, j, there = _tile(source, curve, i, softcap, K, LANES, HAS_H)
        size = tl.abs(y)
        between = there & (size >= low) & (size < high)
        cost, all_of_them = _running(tl.where(between, (size / high * UNIT).to(tl.int32) + 1, 0))
        kept = there & (size >= low) & ~(between & (cost <= tl.minimum(left, 2147483647).to(tl.int32)))
        left = tl.maximum(left - all_of_them, -1)
        k, more = _running(kept.to(tl.int32))
        k += n - 1
        tl.store(ids + k, j, mask=kept & (k < room))
        tl.store(dz + k, tl.where(size == INF, source.at_target, y), mask=kept & (k < room))
        n += more
        i += 1
    return n


@_kernel
def choose_kernel(logits, of_rows, out, tolerance, softcap, V, T,
                  stride_b, stride_t, n_rows, room, K: tl.constexpr, LANES: tl.constexpr,
                  UNROLL: tl.constexpr, CANDIDATES: tl.constexpr):  # fmt: skip
    """Grid (any,), programs stride over the rows: the columns of each that carry its gradient.

    Reads V logits from memory, and again from the L2 cache, where the columns that may belong to K are written apart,
    for they are few; a row with more than CANDIDATES * room of them is read again and again instead. A row that
    certainly overflows ends earlier. Rows where g == 0 and h == 0 are not read.
    """
    rows, backward = of_rows
    HAS_H: tl.constexpr = backward.h is not None
    capacity = tl.minimum(V, CANDIDATES * room)
    candidates = out.candidates + capacity.to(tl.int64) * tl.program_id(0)
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        g = tl.load(backward.g + row)
        h = 0.0
        entropy = 0.0
        if HAS_H:
            h = tl.load(backward.h + row)
            entropy = tl.load(backward.entropy + row)
        ids = out.ids + room.to(tl.int64) * row
        dz = out.dz + room.to(tl.int64) * row
        n = 0
        if (g != 0.0) | (h != 0.0):
            at_row = Backward(g, h, tl.load(backward.logp + row), tl.load(backward.lse + row), entropy)
            n = _columns_of_row(row_pointer(logits, row, T, stride_b, stride_t), tl.load(rows.ids + row), at_row,
                                tl.load(rows.inv_temperature + row), tolerance, softcap, V, ids, dz, room,
                                candidates, capacity, K, LANES, UNROLL, HAS_H)  # fmt: skip
        tl.store(out.sizes + row, n)
        # The race: of a row that overflowed, places were written by other warps; those writes must come first. And the
        # candidates of the next row must come after this one's are read.
        tl.debug_barrier()
        for start in range(tl.where(n <= room, n, 0), room, LANES):
            k = start + tl.arange(0, LANES)
            tl.store(ids + k, tl.full([LANES], -1, tl.int32), mask=k < room)
            tl.store(dz + k, tl.zeros([LANES], tl.float32), mask=k < room)


@triton.jit
def _columns_of_row(row_ptr, id, at_row, inv_temperature, tolerance, softcap, V, ids, dz, room, candidates,
                    capacity, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
                    HAS_H: tl.constexpr):  # fmt: skip
    """Write a row's K, and return its size, or another above `room`."""
    curve, careful = curve_of(at_row, inv_temperature, HAS_H)
    logit = 0.0 if softcap is None else target_logit(row_ptr, id, V, softcap)
    at_target = gradient_at_target(logit, at_row, inv_temperature, softcap, HAS_H)
    known = (id >= 0) & (id < V)
    base = tl.multiple_of((row_ptr.to(tl.int64) & -16).to(row_ptr.dtype), 16)
    lead = (row_ptr.to(tl.int64) & 15).to(tl.int32) // (row_ptr.dtype.element_ty.primitive_bitwidth // 8)
    source = Source(base, lead, V, careful, tl.where(known, id, -1).to(tl.int32), at_target)
    if careful:
        total = _sum_of_row(source, curve, softcap, K, LANES, 1, HAS_H, True)
    else:
        total = _sum_of_row(source, curve, softcap, K, LANES, 2 * UNROLL, HAS_H, False)
    n = room + 1
    if total < INF:
        budget = tolerance * BELOW_ONE * total
        # At most V columns lie below budget / V, and fit. None above the budget does.
        bin = tl.maximum(_bin(budget / V), 1)
        end = tl.maximum(_bin(budget) + 2, bin + 1)
        # Of the columns of at least budget / room at most `room` can be dropped.
        edge = _edge(bin)
        found, below, n_large = _candidates(source, curve, candidates, capacity, edge, tl.maximum(budget / room, edge),
                                            softcap, 2 * room, K, LANES, HAS_H)  # fmt: skip
        # The race: what one warp has written apart, others read.
        tl.debug_barrier()
        if n_large <= 2 * room:
            if found <= capacity:
                few = Source(candidates, 0, found, careful, 0, at_target)
                n = _choose(few, curve, ids, dz, room, bin, end, below, budget, softcap, K, LANES, HAS_H)
            else:
                n = _choose(source, curve, ids, dz, room, bin, end, 0.0, budget, softcap, K, LANES, HAS_H)
    return n
