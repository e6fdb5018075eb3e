"""The statistics of a row: its logp, lse and entropy.

They are made of Σe and Σe·t with e = 2^t and t = (z - z_target)·log2(e), from one FMA. The target's own exponent is 0,
so no running maximum is needed: fp32 holds the sums unless some logit is 70 above the target's. Rows where that
happens, where |z| leaves RANGE, or where the target is ruled out (-inf), are swept again by `_careful_row`.

The sums are over the others: where they are small beside the target's e = 1, one that held it would lose their digits,
and with them those of 1 - p. The sweep does not know of the target; its class is added up again without it.

The bits of a row's statistics depend on its values alone. Logits LANES·K apart are a class. A class has one
accumulator, which takes its elements in the order of the row, wherever the row starts modulo 16 bytes (that only
renames the classes); and the classes are summed as integers, for which order is nothing. A row is cut into parts of
PART vectors, whose sums are added in order, so that one program per part, one per row, and one that holds PARTS parts
of a row side by side all give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import LANES_FIRST, load
from .numeric import INF, LN2, LOG2E, RANGE, capped, log1p

LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _lane(LANES: tl.constexpr, PARTS: tl.constexpr):
    """(lane within its part, part), [1, LANES, 1], where a program holds PARTS parts side by side."""
    lane = tl.arange(0, LANES)[None, :, None]
    if PARTS == 1:
        return lane, 0
    else:
        return lane % (LANES // PARTS), lane // (LANES // PARTS)


@triton.jit
def _base(part_ptr, K: tl.constexpr, LANES: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr):
    """The last 16-byte boundary of a part, to add a lane's offset to; with PARTS > 1 [LANES, 1], each lane its part's.

    Rounded down rather than subtracted from, so that no pointer of a lane can be computed ahead of the rows and kept.
    """
    if PARTS == 1:
        return tl.multiple_of((part_ptr.to(tl.int64) & -16).to(part_ptr.dtype), 16)
    else:
        lanes: tl.constexpr = LANES // PARTS
        hop = tl.arange(0, LANES)[:, None] // lanes * ((PART - lanes) * K)
        return tl.multiple_of(((part_ptr + hop).to(tl.int64) & -16).to(part_ptr.dtype), [16, 16])


@triton.jit
def _no_sums(LANES: tl.constexpr, K: tl.constexpr):
    zero = tl.zeros([1, LANES, K], tl.float32)
    return zero, zero


@triton.jit
def _max_of_pairs(a0, a1, b0, b1):
    return tl.maximum(a0, b0), tl.maximum(a1, b1)


@triton.jit
def _max_over_classes(x, y):
    """The maxima of a pair of tiles [1, LANES, K]; within a thread first, then once between them."""
    x, y = tl.reduce((x, y), 2, _max_of_pairs)
    x, y = tl.reduce((x, y), 1, _max_of_pairs)
    return tl.reduce((x, y), 0, _max_of_pairs)


@triton.jit
def _add(x, s, w, c, ref, ENTROPY: tl.constexpr):
    """Every class takes its element of a tile x [1, LANES, K] fp32, in the order of the row: s += e, w += e*t."""
    t = tl.fma(x, c, -ref)
    e = tl.exp2(t)
    s += e
    if ENTROPY:
        # Bounded, because e is 0 at a -inf logit and 0 * -inf would be NaN.
        w = tl.fma(e, tl.maximum(t, -1000.0), w)
    return s, w


@triton.jit
def _add_some(base, lane, lead, end, s, w, c, ref, softcap, K: tl.constexpr, LANES: tl.constexpr,
              ENTROPY: tl.constexpr):  # fmt: skip
    """`_add` for the elements [lead, end) of the tile at `base`; the others add 0 and are not read."""
    if base.type.is_block():
        base = base[None, :, :]
    base += tl.arange(0, LANES)[None, :, None] * K
    lane *= K
    k = tl.arange(0, K)[None, None, :]
    # bounds per lane beside a constant k: 2 registers, where an index per element would take K
    inside = (k >= lead - lane) & (k < end - lane)
    x = tl.load(base + k, mask=inside, other=-INF).to(tl.float32)
    if softcap is not None:
        x = tl.where(inside, capped(x, softcap), -INF)
    return _add(x, s, w, c, ref, ENTROPY)


@triton.jit
def _power_of_two(top):
    """(2^k, 2^-k) such that top * 2^k is just below 2^44, so that 2^13 classes sum to less than 2^57."""
    exponent = tl.maximum((top.to(tl.int32, bitcast=True) >> 23) & 255, 44)
    return ((297 - exponent) << 23).to(tl.float32, bitcast=True), ((exponent - 43) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _sum(x):
    """The sum of a tile; within a thread first."""
    return tl.sum(tl.sum(tl.sum(x, axis=2), axis=1), axis=0)


@triton.jit
def totals(s, w):
    """Sums over the classes [1, LANES, K], in 64-bit integers, for which order is nothing. inf where one is NaN."""
    s_top, w_top = _max_over_classes(tl.where(s == s, s, INF), tl.where(w == w, tl.abs(w), INF))
    s_up, s_down = _power_of_two(s_top)
    w_up, w_down = _power_of_two(w_top)
    # one after the other: together they would hold twice the registers
    s_sum = _sum((s * s_up).to(tl.int64))
    w_sum = _sum((w * w_up).to(tl.int64))
    s_sum = tl.where(s_top < INF, s_sum.to(tl.float32) * s_down, INF)
    return s_sum, tl.where(w_top < INF, w_sum.to(tl.float32) * w_down, INF)


@triton.jit
def _without(part_ptr, count, hole, lead, s, w, c, ref, softcap, K: tl.constexpr, LANES: tl.constexpr,
             PART: tl.constexpr, PARTS: tl.constexpr, ENTROPY: tl.constexpr):  # fmt: skip
    """The sums of `part_sums`, but the class of the element `hole` is added up again, without it."""
    TILE: tl.constexpr = LANES // PARTS * K
    part = hole // (PART * K)
    part_ptr += part * (PART * K)
    own = hole % (PART * K)
    j = own % TILE + tl.arange(0, PART * K // TILE) * TILE  # few, so that one warp adds them up, in one order
    inside = (j < count - part * (PART * K)) & (j != own)
    x = tl.load(part_ptr + j, mask=inside, other=-INF).to(tl.float32)
    x = tl.where(inside, capped(x, softcap), -INF)
    zero = tl.zeros([PART * K // TILE], tl.float32)
    s_class, w_class = _add(x, zero, zero, c, ref, ENTROPY)
    lane = (lead + own) % TILE // K + part * (LANES // PARTS)
    here = (tl.arange(0, LANES)[None, :, None] == lane) & (tl.arange(0, K)[None, None, :] == (lead + own) % K)
    s = tl.where(here, tl.sum(s_class, 0), s)
    if ENTROPY:
        w = tl.where(here, tl.sum(w_class, 0), w)
    return s, w


@triton.jit
def part_sums(part_ptr, count, hole, c, ref, softcap, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
               PART: tl.constexpr, PARTS: tl.constexpr, ENTROPY: tl.constexpr):  # fmt: skip
    """(Σe, Σe·t) of each class [1, LANES, K], over PARTS parts from part_ptr on; `count` logits of the row are left.

    hole: the element from part_ptr on that is left out, if there is one. The first loop is the hot one: no mask, no
    barrier, no running maximum.
    """
    TILE: tl.constexpr = LANES // PARTS * K
    lead = (part_ptr.to(tl.int64) & 15).to(tl.int32) // (16 // K)  # elements since the last 16-byte boundary
    base = _base(part_ptr, K, LANES, PART, PARTS)
    lane, part = _lane(LANES, PARTS)
    end = lead + tl.minimum(tl.maximum(count - part * (PART * K), 0), PART * K)
    full = end // TILE
    longest = full
    shortest = full
    if PARTS > 1:  # the first part is the longest and the last the shortest
        longest = (lead + tl.minimum(count, PART * K)) // TILE
        shortest = (lead + tl.minimum(tl.maximum(count - (PARTS - 1) * (PART * K), 0), PART * K)) // TILE
    s, w = _no_sums(LANES, K)
    first = 0
    if lead > 0:
        s, w = _add_some(base, lane, lead, end, s, w, c, ref, softcap, K, LANES, ENTROPY)
        first = 1
    rest = first + tl.maximum(shortest - first, 0) // (2 * UNROLL) * (2 * UNROLL)
    for i in range(first, rest, 2 * UNROLL):
        for u in tl.static_range(2 * UNROLL):
            x = load(base + (i + u) * TILE, None, 1, LANES, K, "")
            s, w = _add(capped(x, softcap), s, w, c, ref, ENTROPY)
    for i in range(rest, longest):
        if PARTS == 1:
            x = capped(load(base + i * TILE, None, 1, LANES, K, ""), softcap)
        else:
            inside = i < full
            left = tl.where(inside, LANES, 0)
            x = load(base + i * TILE, tl.permute(left, (1, 0, 2)) if LANES_FIRST else left, 1, LANES, K, "")
            x = tl.where(inside, capped(x, softcap), -INF)
        s, w = _add(x, s, w, c, ref, ENTROPY)
    if PARTS == 1:
        if (full * TILE < end) & (full >= first):
            s, w = _add_some(base + full * TILE, lane, 0, end - full * TILE, s, w, c, ref, softcap, K, LANES,
                             ENTROPY)  # fmt: skip
    else:
        end = tl.where(full >= first, end - full * TILE, 0)
        tail = base + tl.reshape(full, [LANES, 1]) * TILE
        s, w = _add_some(tail, lane, 0, end, s, w, c, ref, softcap, K, LANES, ENTROPY)
    if (hole >= 0) & (hole < tl.minimum(count, PARTS * PART * K)):
        s, w = _without(part_ptr, count, hole.to(tl.int32), lead, s, w, c, ref, softcap, K, LANES, PART, PARTS,
                        ENTROPY)  # fmt: skip
    return s, w


@triton.jit
def target_logit(row_ptr, id, V, softcap):
    """The logit of a row's target, capped; NaN, without a read, where the id is none of the vocabulary."""
    known = (id >= 0) & (id < V)
    target = tl.load(row_ptr + tl.where(known, id, 0), mask=known, other=float("nan")).to(tl.float32)
    return capped(target, softcap)


@triton.jit
def reference(target, c):
    """What exponents are relative to: the target's own, or 0 where that is no fit number (`row_scores` then redoes
    the row)."""
    ref = target * c
    return tl.where(tl.abs(ref) < RANGE, ref, 0.0)


@triton.jit
def row_sums(row_ptr, id, target, V, inv_temperature, softcap, K: tl.constexpr, LANES: tl.constexpr,
             UNROLL: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, ENTROPY: tl.constexpr):  # fmt: skip
    """(Σe, Σe·t) of one whole row, without its target, by one program."""
    hole = tl.where((id >= 0) & (id < V), id, -1).to(tl.int32)
    c = inv_temperature * LOG2E
    ref = reference(target, c)
    total = 0.0
    weighted = 0.0
    for start in range(0, V, PARTS * PART * K):
        s, w = part_sums(row_ptr + start, V - start, hole - start, c, ref, softcap, K, LANES, UNROLL, PART, PARTS,
                         ENTROPY)  # fmt: skip
        if PARTS == 1:
            s, w = totals(s, w)
            total += s
            weighted += w
        else:
            _, part = _lane(LANES, PARTS)
            for i in range(PARTS):
                s_sum, w_sum = totals(tl.where(part == i, s, 0.0), tl.where(part == i, w, 0.0))
                total += s_sum
                weighted += w_sum
    return total, weighted


@triton.jit
def merged_sums(partial, row, parts):
    """The bits of `row_sums`, from the partial sums that `part_kernel` left."""
    sums = partial + parts.to(tl.int64) * 2 * row
    total = 0.0
    weighted = 0.0
    for part in range(parts):
        total += tl.load(sums + 2 * part)
        weighted += tl.load(sums + 2 * part + 1)
    return total, weighted


@triton.jit
def _careful_row(row_ptr, id, V, c, softcap, K: tl.constexpr, LANES: tl.constexpr):
    """(top, Σe, Σe·t) with t = (x - top) * c, over all but the target: any finite magnitude, by a running maximum, for
    it is rare.

    Here too the sums are of integers: 0 <= e <= 1 and |e·t| < 1, so that 2^13 of them times 2^49 stay below 2^63.
    """
    UP: tl.constexpr = 2.0**49
    lane = tl.arange(0, LANES)[None, :, None] * K
    k = tl.arange(0, K)[None, None, :]
    top = LOWEST
    s = 0.0
    w = 0.0
    for start in range(0, V, LANES * K):
        inside = (k < V - start - lane) & (k != id - start - lane)
        x = tl.load((row_ptr + start + lane) + k, mask=inside, other=-INF).to(tl.float32)
        if softcap is not None:
            x = tl.where(inside, capped(x, softcap), -INF)
        new = tl.maximum(top, tl.max(tl.max(tl.max(tl.where(x == x, x, INF), axis=2), axis=1), axis=0))
        # Bounded, because 0 * (an overflowed difference) would be NaN.
        drop = tl.maximum((top - new) * c, -RANGE)
        t = (x - new) * c
        sound = (new - new) * c == 0.0  # neither of them NaN or infinite
        e = tl.where(sound, tl.exp2(t), 0.0)
        scale = tl.where(sound, tl.exp2(drop), float("nan"))
        et = tl.where(e == 0.0, 0.0, e * t)
        w = tl.fma(s, drop, w) * scale + _sum((et * UP).to(tl.int64)).to(tl.float32) / UP
        s = s * scale + _sum((e * UP).to(tl.int64)).to(tl.float32) / UP
        top = new
    return top, s, w


@triton.jit
def _with_target(s, w, t):
    """(logp, log2 of the sum over all, entropy) from Σe and Σe·t of the others, and t of the target."""
    e = tl.exp2(t)
    log_total = tl.log2(s + e)
    # With the target's share drawn out of both terms, no digits are lost when its p is near 1.
    leads = s <= e
    logp = tl.where(leads, -log1p(s / e), (t - log_total) * LN2)
    near_one = tl.fma((t * s - w) / (s + e), LN2, -logp)
    usual = (log_total - (w + tl.where(e == 0.0, 0.0, e * t)) / (s + e)) * LN2
    return logp, log_total, tl.where(leads, near_one, usual)


@triton.jit
def row_scores(row_ptr, id, target, V, s, w, inv_temperature, softcap, K: tl.constexpr, LANES: tl.constexpr,
            ENTROPY: tl.constexpr):  # fmt: skip
    """(logp, lse, entropy) of a row from its Σe and Σe·t."""
    c = inv_temperature * LOG2E
    ref = target * c
    logp, log_total, entropy = _with_target(s, w, tl.fma(target, c, -ref))
    lse = tl.fma(log_total, LN2, ref * LN2)
    usable = (tl.abs(ref) < RANGE) & (s < INF)
    again = ~usable
    if ENTROPY:
        again = again | ~(tl.abs(w) < INF)
    if again:
        top, s, w = _careful_row(row_ptr, id, V, c, softcap, K, LANES)
        known = (id >= 0) & (id < V)
        highest = tl.where(known, tl.maximum(top, target), top)
        drop = tl.maximum((top - highest) * c, -RANGE)  # bounded as there
        t = tl.where(known, (target - highest) * c, -INF)
        careful, log_total, entropy = _with_target(s * tl.exp2(drop), tl.fma(s, drop, w) * tl.exp2(drop), t)
        # A row swept again for its entropy alone keeps the logp that it has without one.
        logp = tl.where(usable, logp, tl.where(known, careful, float("nan")))
        lse = tl.where(usable, lse, tl.fma(log_total, LN2, highest * inv_temperature))
    return logp, lse, entropy
