"""The kernels on a few columns of each row: products of a table of ids, and the choice of the columns of a gradient.

The products read rows of the weight or of the hidden states, the tables' places beside them; in `choose_kernel` a
program takes a row of logits after another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .gradient import Backward, _Curve, _gradient
from .memory import load, narrow, row_pointer
from .numeric import INF, LN2, LOG2E, LOG2E_LOW, RANGE, expm1
from .statistics import target_logit, totals

BITS = tl.constexpr(20)  # of a magnitude's 31 that its bin leaves out: 3 bits of the mantissa stay
BELOW_ONE = tl.constexpr(1.0 - 2.0**-16)  # of the tolerance: what rounding may take from a sum
UNIT = tl.constexpr(2.0**18)  # of integers whose sum over a tile is exact: 2^12 of them stay below 2^31

_kernel = triton.jit(do_not_specialize=["V", "T", "stride_b", "stride_t", "n_rows", "room", "capacity", "w", "P"])


# ---- products


@_kernel
def logits_kernel(hidden, weight, bias, ids, out, H, hidden_stride, weight_stride, w, COLUMNS: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Grid (n * ceil(w / COLUMNS),): the logits of COLUMNS places of a row. Reads a row of the weight for each id."""
    blocks = tl.cdiv(w, COLUMNS)
    row = tl.program_id(0) // blocks
    k = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    at = row.to(tl.int64) * w + k
    id = tl.load(ids + at, mask=k < w, other=-1)
    there = id >= 0
    rows = weight + id.to(tl.int64)[:, None] * weight_stride
    hidden += row.to(tl.int64) * hidden_stride
    sums = tl.zeros([COLUMNS, BLOCK], tl.float32)
    if tl.max(id, 0) >= 0:
        for start in range(0, H, BLOCK):
            d = start + tl.arange(0, BLOCK)
            x = tl.load(hidden + d, mask=d < H, other=0.0).to(tl.float32)
            y = tl.load(rows + d[None, :], mask=there[:, None] & (d < H)[None, :], other=0.0).to(tl.float32)
            sums = tl.fma(y, tl.broadcast_to(x[None, :], [COLUMNS, BLOCK]), sums)
    z = tl.sum(sums, 1)
    if bias is not None:
        z += tl.load(bias + id, mask=there, other=0.0)
    tl.store(out + at, tl.where(there, z, -INF), mask=k < w)


@_kernel
def d_hidden_kernel(dz, ids, weight, out, H, weight_stride, out_stride, w, BLOCK: tl.constexpr,
                    UNROLL: tl.constexpr):  # fmt: skip
    """Grid (n * ceil(H / BLOCK),): BLOCK elements of a row of `out`. Reads as many of the weight's row of each id."""
    blocks = tl.cdiv(H, BLOCK)
    row = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first = row.to(tl.int64) * w
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(0, w, UNROLL):
        for u in tl.static_range(UNROLL):
            id = tl.load(ids + first + k + u, mask=k + u < w, other=-1)
            a = tl.load(dz + first + k + u, mask=id >= 0, other=0.0)
            x = tl.load(weight + id.to(tl.int64) * weight_stride + d, mask=(d < H) & (id >= 0), other=0.0)
            total = tl.fma(x.to(tl.float32), tl.full([BLOCK], 1.0, tl.float32) * a, total)
    out += row.to(tl.int64) * out_stride
    tl.store(out + d, narrow(total, out.dtype.element_ty), mask=d < H)


@_kernel
def d_weight_kernel(dz, ids, rows, hidden, out, d_bias, H, hidden_stride, out_stride, P, BLOCK: tl.constexpr,
                    UNROLL: tl.constexpr):  # fmt: skip
    """Grid (P * ceil(H / BLOCK),): BLOCK elements of a row of `out`, by the first of the pairs that name it.

    The pairs are sorted by id, those of an id in their order. Reads BLOCK elements of each pair's hidden state.
    """
    blocks = tl.cdiv(H, BLOCK)
    pair = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    id = tl.load(ids + pair)
    before = tl.load(ids + pair - 1, mask=pair > 0, other=-1)
    if id != before:  # an id of -1 is as if it came before the first
        d = block * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        sum_dz = 0.0
        more = True
        while more:
            for u in tl.static_range(UNROLL):
                more = tl.load(ids + pair + u, mask=pair + u < P, other=-1) == id
                a = tl.load(dz + pair + u, mask=more, other=0.0)
                row = tl.load(rows + pair + u, mask=more, other=0).to(tl.int64)
                x = tl.load(hidden + row * hidden_stride + d, mask=(d < H) & more, other=0.0)
                total = tl.fma(x.to(tl.float32), tl.full([BLOCK], 1.0, tl.float32) * a, total)
                sum_dz += a
            pair += UNROLL
        out += id.to(tl.int64) * out_stride
        total += tl.load(out + d, mask=d < H, other=0.0).to(tl.float32)
        tl.store(out + d, narrow(total, out.dtype.element_ty), mask=d < H)
        if d_bias is not None:
            if block == 0:
                tl.store(d_bias + id, tl.load(d_bias + id) + sum_dz)


# ---- the columns that carry a row's gradient


class Source(NamedTuple):
    """Where the gradient of a row comes from: from its logits, or from candidates that were made of them."""

    base: Any  # of the logits, rounded down to 16 bytes; or of the candidates' dz
    ids: Any  # of the candidates
    lead: Any  # elements between the base and the row; 0
    count: Any  # V; how many candidates
    careful: Any
    target: Any  # its column, -1 where there is none
    at_target: Any  # dz there


@triton.jit
def _curve(at_row, inv_temperature, HAS_H: tl.constexpr):
    """(`_Curve`, low, careful) of a row, as `row_gradient` has them."""
    g, h, lse, entropy = at_row
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
    return _Curve(inv_temperature * LOG2E, shift, inv_temperature, lse, a, b), low, careful


@triton.jit
def _at_target(target, at_row, curve, low, careful, softcap, HAS_H: tl.constexpr):
    """dz of the target's element, as `row_gradient` has it."""
    g, h, lse, entropy = at_row
    logp = tl.where(careful, target * curve.inv_temperature - lse, (tl.fma(target, curve.c, -curve.shift) - low) * LN2)
    one_minus_p, _ = expm1(logp)
    dz = g * -one_minus_p
    if HAS_H:
        dz -= h * tl.exp2(logp * LOG2E) * (tl.maximum(logp, -1000.0) + entropy)
    dz *= curve.inv_temperature
    if softcap is not None:
        dz *= 1.0 - (target / softcap) * (target / softcap)
    return dz


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
        y = _gradient(x, curve, softcap, HAS_H, True)
    else:
        y = _gradient(x, curve, softcap, HAS_H, False)
    return tl.where(j == source.target, at, tl.where(inside, y, 0.0)), j


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
            y = _gradient(x, curve, softcap, HAS_H, CAREFUL)
            s += tl.abs(tl.where(_place(i + u, K, LANES) - source.lead == source.target, source.at_target, y))
    for i in range(rest, tl.cdiv(end, TILE)):
        y, _ = _row_tile(source, curve, i, source.at_target, softcap, K, LANES, HAS_H)
        s += tl.abs(y)
    s, _ = totals(s, s)
    return s


@triton.jit
def _tile(source, curve, i, softcap, K: tl.constexpr, LANES: tl.constexpr, HAS_H: tl.constexpr,
          WANT_IDS: tl.constexpr):  # fmt: skip
    """(dz, columns, which of them count) of tile i of a source: inf for the target, which so is never small."""
    if source.ids is None:
        y, j = _row_tile(source, curve, i, INF, softcap, K, LANES, HAS_H)
        there = (j >= 0) & (j < source.count)
    else:
        k = _place(i, K, LANES)
        there = k < source.count
        y = tl.load(source.base + k, mask=there, other=0.0)
        j = k
        if WANT_IDS:
            j = tl.load(source.ids + k, mask=there, other=0)
    return y, j, there


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
        y, _, _ = _tile(source, curve, i, softcap, K, LANES, HAS_H, False)
        s += tl.where(tl.abs(y) < edge, tl.abs(y), 0.0)
    s, _ = totals(s, s)
    return s


@triton.jit
def _running(x):
    """(running sums of a tile of integers >= 0 in the order of its places, each with its own element; the last)."""
    of_lane = tl.sum(x, 2)
    through = tl.cumsum(of_lane, 1)
    return tl.cumsum(x, 2) + (through - of_lane)[:, :, None], tl.max(tl.max(through, 1), 0)


@triton.jit
def _candidates(source, curve, ids, dz, capacity, floor, large, softcap, most, K: tl.constexpr, LANES: tl.constexpr,
                HAS_H: tl.constexpr):  # fmt: skip
    """Write what is not below `floor`, in the order of the row, as far as there is room.

    Returns (how many, the sum of what is below, how many are not below `large`); ends early where these are more than
    `most`.
    """
    s = tl.zeros([1, LANES, K], tl.float32)
    count = 0
    n_large = 0
    i = 0
    tiles = tl.cdiv(source.lead + source.count, LANES * K)
    while (i < tiles) & (n_large <= most):
        y, j, there = _tile(source, curve, i, softcap, K, LANES, HAS_H, True)
        size = tl.abs(y)
        taken = there & (size >= floor)
        s += tl.where(size < floor, size, 0.0)
        # both counts of a tile, of at most 2^13, in one number
        k, both = _running(taken.to(tl.int32) + ((size >= large).to(tl.int32) << 16))
        k = count + (k & 0xFFFF) - 1
        taken = taken & (k < capacity)
        tl.store(ids + k, j, mask=taken)
        tl.store(dz + k, y, mask=taken)
        count += both & 0xFFFF
        n_large += both >> 16
        i += 1
    s, _ = totals(s, s)
    return count, s, n_large


@triton.jit
def _choose(source, curve, ids, dz, room, bin, end, below, budget, softcap, K: tl.constexpr, LANES: tl.constexpr,
            HAS_H: tl.constexpr):  # fmt: skip
    """Write K, as far as there is room, and return its size, or another above `room`.

    The bin from `bin` (below which the sum fits into the budget) up to `end` is searched whose lower ones fit, but not
    it beside them; it is dropped column by column as far as it does.

    below: the sum of what the source leaves out.
    """
    fits = below
    if source.ids is None:
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
        y, j, there = _tile(source, curve, i, softcap, K, LANES, HAS_H, True)
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
def choose_kernel(logits, rows, backward, ids, dz, count, candidate_ids, candidate_dz, tolerance, softcap, V, T,
                  stride_b, stride_t, n_rows, room, capacity, K: tl.constexpr, LANES: tl.constexpr,
                  UNROLL: tl.constexpr):  # fmt: skip
    """Grid (any,), programs stride over the rows: the columns of each that carry its gradient.

    Reads V logits from memory, and again from the L2 cache, where the columns that may belong to K are written apart,
    for they are few; a row with more than `capacity` of them is read again and again instead. A row that certainly
    overflows ends earlier. Rows where g == 0 and h == 0 are not read.
    """
    HAS_H: tl.constexpr = backward.h is not None
    candidate_ids += tl.program_id(0).to(tl.int64) * capacity
    candidate_dz += tl.program_id(0).to(tl.int64) * capacity
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        g = tl.load(backward.g + row)
        h = 0.0
        entropy = 0.0
        if HAS_H:
            h = tl.load(backward.h + row)
            entropy = tl.load(backward.entropy + row)
        out_ids = ids + room.to(tl.int64) * row
        out_dz = dz + room.to(tl.int64) * row
        n = 0
        if (g != 0.0) | (h != 0.0):
            n = _columns_of_row(row_pointer(logits, row, T, stride_b, stride_t), tl.load(rows.ids + row),
                                Backward(g, h, tl.load(backward.lse + row), entropy),
                                tl.load(rows.inv_temperature + row), tolerance, softcap, V, out_ids, out_dz, room,
                                candidate_ids, candidate_dz, capacity, K, LANES, UNROLL, HAS_H)  # fmt: skip
        tl.store(count + row, n)
        # The race: of a row that overflowed, places were written by other warps; those writes must come first. And the
        # candidates of the next row must come after this one's are read.
        tl.debug_barrier()
        for start in range(tl.where(n <= room, n, 0), room, LANES):
            k = start + tl.arange(0, LANES)
            tl.store(out_ids + k, tl.full([LANES], -1, tl.int32), mask=k < room)
            tl.store(out_dz + k, tl.zeros([LANES], tl.float32), mask=k < room)


@triton.jit
def _columns_of_row(row_ptr, id, at_row, inv_temperature, tolerance, softcap, V, ids, dz, room, candidate_ids,
                    candidate_dz, capacity, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
                    HAS_H: tl.constexpr):  # fmt: skip
    """Write a row's K, and return its size, or another above `room`."""
    curve, low, careful = _curve(at_row, inv_temperature, HAS_H)
    at_target = _at_target(target_logit(row_ptr, id, V, softcap), at_row, curve, low, careful, softcap, HAS_H)
    known = (id >= 0) & (id < V)
    base = tl.multiple_of((row_ptr.to(tl.int64) & -16).to(row_ptr.dtype), 16)
    lead = (row_ptr.to(tl.int64) & 15).to(tl.int32) // (16 // K)
    source = Source(base, None, lead, V, careful, tl.where(known, id, -1).to(tl.int32), at_target)
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
        found, below, n_large = _candidates(source, curve, candidate_ids, candidate_dz, capacity, _edge(bin),
                                            budget / room, softcap, 2 * room, K, LANES, HAS_H)  # fmt: skip
        # The race: what one warp has written apart, others read.
        tl.debug_barrier()
        if n_large <= 2 * room:
            if found <= capacity:
                few = Source(candidate_dz, candidate_ids, 0, found, careful, 0, at_target)
                n = _choose(few, curve, ids, dz, room, bin, end, below, budget, softcap, K, LANES, HAS_H)
            else:
                n = _choose(source, curve, ids, dz, room, bin, end, 0.0, budget, softcap, K, LANES, HAS_H)
    return n
