"""How Triton programs walk a row of logits: statistics and gradient, without a word on the objective.

Accesses are 128 bits wide whatever V and the base address are: tiles start at multiples of 16 bytes, one vector of K
elements per lane, and what of a tile lies outside the row is masked. The statistics are Σe and Σe·t with e = 2^t and
t = (z - z_target)·log2(e), from one FMA. The target's own exponent is 0, so no running maximum is needed: fp32 holds
the sums unless some logit is 70 above the target's. Rows where that happens, where |z| leaves RANGE, or where the
target is ruled out (-inf), are swept again by `_careful_row`.

The bits of a row's statistics depend on its values alone. Logits LANES·K apart are a class. A class has one
accumulator, which takes its elements in the order of the row, wherever the row starts modulo 16 bytes (that only
renames the classes); and the classes are summed as integers, for which order is nothing. A row is cut into parts of
PART vectors, whose sums are added in order, so that one program per part, one per row, and one that holds PARTS parts
of a row side by side all give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.9259629911266175e-08)  # log2(e) minus its fp32 value
LN2 = tl.constexpr(0.6931471805599453)
RANGE = tl.constexpr(4096.0)
LOWEST = tl.constexpr(-3.0e38)
INF = tl.constexpr(float("inf"))
# Of two equally contiguous axes Triton gives the first to the threads of a warp up to 3.6, and the last from 3.7 on.
LANES_FIRST = tl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 7))
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


# ---- geometry of a row


@triton.jit
def _row(base, row, T, stride_b, stride_t):
    """Pointer to row (row // T, row % T); the offset is 64-bit."""
    b = (row // T).to(tl.int64)
    t = (row % T).to(tl.int64)
    return base + b * stride_b + t * stride_t


@triton.jit
def _afresh(row, total):
    """`row`, but no compiler knows it, for T >= 1: addresses from here on are computed anew after a sweep, where they
    would otherwise sit in registers, or spill, all through it."""
    return row + (total.to(tl.int32, bitcast=True) >> 31)


@triton.jit
def _ends(row_ptr, V, K: tl.constexpr):
    """(head, n_vec): elements before the first 16-byte boundary, and vectors of K elements from there on."""
    size: tl.constexpr = 16 // K
    head = ((16 - (row_ptr.to(tl.int64) & 15)) & 15).to(tl.int32) // size
    head = tl.minimum(head, V)
    return head, (V - head) // K


@triton.jit
def _end_elements(V, head, n_vec, K: tl.constexpr, LANES: tl.constexpr):
    """Element index per lane: the head in lanes [0, K), the tail in [K, 2K); and which lanes hold one."""
    lane = tl.arange(0, LANES)
    j = tl.where(lane < K, lane, head + n_vec * K + lane - K)
    return j, tl.where(lane < K, lane < head, (lane < 2 * K) & (j < V))


@triton.jit
def _pointers(body, K: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr):
    """Pointers to a tile at `body`, [UNROLL, LANES, K] or, where that gives each thread one lane, [LANES, UNROLL, K].

    The lane is added first: the rest is then an immediate offset. `body` may differ between lanes: [LANES, 1].
    """
    lane = body + (tl.arange(0, LANES)[:, None] * K + tl.arange(0, K)[None, :])
    if LANES_FIRST:
        return lane[:, None, :] + tl.arange(0, UNROLL)[None, :, None] * (LANES * K)
    else:
        return lane[None, :, :] + tl.arange(0, UNROLL)[:, None, None] * (LANES * K)


@triton.jit
def _mask(left, K: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr):
    """The mask for `_pointers` of the first `left` vectors.

    The bound moves, not the index: an index per vector would sit in a register of its own from the first row on.
    """
    lane = tl.arange(0, LANES)
    if LANES_FIRST:
        return tl.broadcast_to(lane[:, None, None] < left - tl.arange(0, UNROLL)[None, :, None] * LANES,
                               [LANES, UNROLL, K])  # fmt: skip
    else:
        return tl.broadcast_to(lane[None, :, None] < left - tl.arange(0, UNROLL)[:, None, None] * LANES,
                               [UNROLL, LANES, K])  # fmt: skip


@triton.jit
def _load(body, left, UNROLL: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, POLICY: tl.constexpr):
    """A tile [UNROLL, LANES, K] in fp32 from the 16-byte aligned `body`; 0 beyond the `left` vectors (None: all)."""
    if body.dtype.element_ty == tl.bfloat16:
        # Two at a time: each half of a word becomes fp32 in one instruction, where a bf16 conversion takes up to two.
        words = _pointers(body.to(tl.pointer_type(tl.uint32), bitcast=True), K // 2, UNROLL, LANES)
        if left is None:
            pair = tl.load(words, eviction_policy=POLICY)
        else:
            inside = _mask(left, K // 2, UNROLL, LANES)
            pair = tl.load(words, mask=inside, other=0, eviction_policy=POLICY)
        low = (pair << 16).to(tl.float32, bitcast=True)
        high = (pair & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.reshape(tl.join(low, high), [pair.shape[0], pair.shape[1], K])
    else:
        pointers = _pointers(body, K, UNROLL, LANES)
        if left is None:
            x = tl.load(pointers, eviction_policy=POLICY).to(tl.float32)
        else:
            inside = _mask(left, K, UNROLL, LANES)
            x = tl.load(pointers, mask=inside, other=0.0, eviction_policy=POLICY).to(tl.float32)
    if LANES_FIRST:
        x = tl.permute(x, (1, 0, 2))
    return x


@triton.jit
def _narrow(y, dtype: tl.constexpr):
    """y in `dtype`, rounded to nearest even. The interpreter's own conversion to bf16 would truncate."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = y.to(tl.uint32, bitcast=True)
        bits = tl.where(y == y, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return y.to(dtype)


@triton.jit
def _store(body, y, left, UNROLL: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr):
    """Write the first `left` vectors (None: all) of a tile y [UNROLL, LANES, K], rounded to the type of `body`."""
    pointers = _pointers(body, K, UNROLL, LANES)
    y = _narrow(y, body.dtype.element_ty)
    if LANES_FIRST:
        y = tl.permute(y, (1, 0, 2))
    if left is None:
        tl.store(pointers, y, eviction_policy="evict_first")
    else:
        tl.store(pointers, y, mask=_mask(left, K, UNROLL, LANES), eviction_policy="evict_first")


# ---- softcap


@triton.jit
def _tanh(x, softcap):
    """tanh(x / softcap), to 1e-7 of 1: a capped logit is good to 1e-7 of the cap. -1 and 1 at the infinities."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E / softcap)))


@triton.jit
def _capped(x, softcap):
    """Logits as the statistics take them: softcap * tanh(x / softcap), or x itself without a softcap (None)."""
    if softcap is not None:
        x = softcap * _tanh(x, softcap)
    return x


# ---- statistics


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
        x = tl.where(inside, _capped(x, softcap), -INF)
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
def _totals(s, w):
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
def _part_sums(part_ptr, count, c, ref, softcap, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
               PART: tl.constexpr, PARTS: tl.constexpr, ENTROPY: tl.constexpr):  # fmt: skip
    """(Σe, Σe·t) of each class [1, LANES, K], over PARTS parts from part_ptr on; `count` logits of the row are left.

    The first loop is the hot one: no mask, no barrier, no running maximum.
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
            x = _load(base + (i + u) * TILE, None, 1, LANES, K, "")
            s, w = _add(_capped(x, softcap), s, w, c, ref, ENTROPY)
    for i in range(rest, longest):
        if PARTS == 1:
            x = _capped(_load(base + i * TILE, None, 1, LANES, K, ""), softcap)
        else:
            inside = i < full
            left = tl.where(inside, LANES, 0)
            x = _load(base + i * TILE, tl.permute(left, (1, 0, 2)) if LANES_FIRST else left, 1, LANES, K, "")
            x = tl.where(inside, _capped(x, softcap), -INF)
        s, w = _add(x, s, w, c, ref, ENTROPY)
    if PARTS == 1:
        if (full * TILE < end) & (full >= first):
            s, w = _add_some(base + full * TILE, lane, 0, end - full * TILE, s, w, c, ref, softcap, K, LANES,
                             ENTROPY)  # fmt: skip
    else:
        end = tl.where(full >= first, end - full * TILE, 0)
        tail = base + tl.reshape(full, [LANES, 1]) * TILE
        s, w = _add_some(tail, lane, 0, end, s, w, c, ref, softcap, K, LANES, ENTROPY)
    return s, w


@triton.jit
def _reference(target, c):
    """What exponents are taken relative to: the target's own, or 0 where that is no fit number (`_scores` then redoes
    the row)."""
    ref = target * c
    return tl.where(tl.abs(ref) < RANGE, ref, 0.0)


@triton.jit
def _careful_row(row_ptr, V, c, softcap, K: tl.constexpr, LANES: tl.constexpr):
    """(top, log2 Σe, Σe·t / Σe) with t = (x - top) * c: any finite magnitude, by a running maximum, for it is rare.

    Here too the sums are of integers: 0 <= e <= 1 and |e·t| < 1, so that 2^13 of them times 2^49 stay below 2^63.
    """
    UP: tl.constexpr = 2.0**49
    lane = tl.arange(0, LANES)[None, :, None] * K
    k = tl.arange(0, K)[None, None, :]
    top = LOWEST
    s = 0.0
    w = 0.0
    for start in range(0, V, LANES * K):
        inside = k < V - start - lane
        x = tl.load((row_ptr + start + lane) + k, mask=inside, other=-INF).to(tl.float32)
        if softcap is not None:
            x = tl.where(inside, _capped(x, softcap), -INF)
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
    return top, tl.log2(s), w / s


@triton.jit
def _target(row_ptr, id, V, softcap):
    """The logit of a row's target, capped; NaN, without a read, where the id is none of the vocabulary."""
    known = (id >= 0) & (id < V)
    target = tl.load(row_ptr + tl.where(known, id, 0), mask=known, other=float("nan")).to(tl.float32)
    return _capped(target, softcap)


@triton.jit
def _scores(row_ptr, target, V, total, weighted, inv_temperature, softcap, K: tl.constexpr, LANES: tl.constexpr,
            ENTROPY: tl.constexpr):  # fmt: skip
    """(logp, lse, entropy) of a row from its Σe and Σe·t."""
    c = inv_temperature * LOG2E
    ref = target * c
    log_total = tl.log2(total)
    logp = (tl.fma(target, c, -ref) - log_total) * LN2
    lse = tl.fma(log_total, LN2, ref * LN2)
    entropy = 0.0
    usable = (tl.abs(ref) < RANGE) & (total < INF)
    again = ~usable
    if ENTROPY:
        entropy = (log_total - weighted / total) * LN2
        again = again | ~(tl.abs(weighted) < INF)
    if again:
        top, log_sum, mean = _careful_row(row_ptr, V, c, softcap, K, LANES)
        entropy = (log_sum - mean) * LN2
        # A row swept again for its entropy alone keeps the logp that it has without one.
        logp = tl.where(usable, logp, (target - top) * inv_temperature - log_sum * LN2)
        lse = tl.where(usable, lse, tl.fma(log_sum, LN2, top * inv_temperature))
    return logp, lse, entropy


@triton.jit
def _row_sums(row_ptr, target, V, inv_temperature, softcap, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
              PART: tl.constexpr, PARTS: tl.constexpr, ENTROPY: tl.constexpr):  # fmt: skip
    """(Σe, Σe·t) of one whole row by one program."""
    c = inv_temperature * LOG2E
    ref = _reference(target, c)
    total = 0.0
    weighted = 0.0
    for start in range(0, V, PARTS * PART * K):
        s, w = _part_sums(row_ptr + start, V - start, c, ref, softcap, K, LANES, UNROLL, PART, PARTS, ENTROPY)
        if PARTS == 1:
            s, w = _totals(s, w)
            total += s
            weighted += w
        else:
            _, part = _lane(LANES, PARTS)
            for i in range(PARTS):
                s_sum, w_sum = _totals(tl.where(part == i, s, 0.0), tl.where(part == i, w, 0.0))
                total += s_sum
                weighted += w_sum
    return total, weighted


@triton.jit
def _merged_sums(partial, row, parts):
    """The bits of `_row_sums`, from the partial sums that `part_kernel` left."""
    sums = partial + parts.to(tl.int64) * 2 * row
    total = 0.0
    weighted = 0.0
    for part in range(parts):
        total += tl.load(sums + 2 * part)
        weighted += tl.load(sums + 2 * part + 1)
    return total, weighted


# ---- gradient


@triton.jit
def _expm1(q):
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
def _grad(x, c, shift, inv_temperature, lse, a, b, softcap, HAS_H: tl.constexpr, CAREFUL: tl.constexpr):
    """p * (a + b*log2(p)) with p = 2^(x*c - shift); with a softcap x is capped first, and led through its slope."""
    if softcap is not None:
        tanh = _tanh(x, softcap)
        a *= 1.0 - tanh * tanh
        b *= 1.0 - tanh * tanh
        x = softcap * tanh
    if CAREFUL:
        t = (x * inv_temperature - lse) * LOG2E
    else:
        t = tl.fma(x, c, -shift)
    p = tl.exp2(t)
    if HAS_H:
        # Bounded, so that p == 0 gives exactly 0; a NaN goes on in p.
        return p * tl.fma(tl.maximum(t, -1000.0), b, a)
    return p * a


@triton.jit
def _grad_body(body, out, n_vec, c, shift, inv_temperature, lse, a, b, softcap, K: tl.constexpr, LANES: tl.constexpr,
               UNROLL: tl.constexpr, HAS_H: tl.constexpr, CAREFUL: tl.constexpr,
               SAME_PHASE: tl.constexpr):  # fmt: skip
    """Gradient of n_vec vectors, from the last to the first: the end of a row is what a cache still holds of it."""
    TILE: tl.constexpr = UNROLL * LANES
    full = n_vec // TILE
    if full * TILE < n_vec:
        left = n_vec - full * TILE
        x = _load(tl.multiple_of(body + full * (TILE * K), 16), left, UNROLL, LANES, K, "evict_first")
        y = _grad(x, c, shift, inv_temperature, lse, a, b, softcap, HAS_H, CAREFUL)
        sink = out + full * (TILE * K)
        if SAME_PHASE:
            sink = tl.multiple_of(sink, 16)
        _store(sink, y, left, UNROLL, LANES, K)
    for i in range(full):
        start = (full - 1 - i) * (TILE * K)
        x = _load(tl.multiple_of(body + start, 16), None, UNROLL, LANES, K, "evict_first")
        y = _grad(x, c, shift, inv_temperature, lse, a, b, softcap, HAS_H, CAREFUL)
        sink = out + start
        if SAME_PHASE:
            sink = tl.multiple_of(sink, 16)
        _store(sink, y, None, UNROLL, LANES, K)


@triton.jit
def _zero(out, V, first, n_max, with_ends, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """Zeros over the vectors [first, first + n_max) of a row of `out`, and over its ends if asked."""
    head, n_vec = _ends(out, V, K)
    body = out + head + first * K
    n_here = tl.minimum(n_vec - first, n_max)
    zero = tl.zeros([UNROLL, LANES, K], tl.float32)
    for start in range(0, n_here, UNROLL * LANES):
        sink = tl.multiple_of(body + start * K, 16)
        _store(sink, zero, n_here - start, UNROLL, LANES, K)
    if with_ends:
        j, inside = _end_elements(V, head, n_vec, K, LANES)
        tl.store(out + j, tl.zeros([LANES], out.dtype.element_ty), mask=inside)


@triton.jit
def _row_grad(row_ptr, out, id, target, V, lse, entropy, g, h, inv_temperature, softcap, first, n_max, with_ends,
              K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, HAS_H: tl.constexpr,
              SAME_PHASE: tl.constexpr, INPLACE: tl.constexpr):  # fmt: skip
    """Gradient of the vectors [first, first + n_max) of a row, and of its ends if asked, with `_target`'s target.

    All of the row: first 0, n_max None, with_ends True. INPLACE: out is row_ptr.

    out_j = inv_temperature * (g * (1[j == id] - p_j) - h * p_j * (log p_j + entropy)); off the target that is
    p_j * (a + b * log2 p_j).
    """
    if INPLACE:
        # The race: every warp reads the target's logit, and the warp that owns it writes a gradient there; all must
        # have read before one writes.
        tl.debug_barrier()
    c = inv_temperature * LOG2E
    shift = lse * LOG2E
    # What rounding took from the shift goes into the factor: p = 2^(x*c - shift) * 2^-low.
    low = tl.fma(lse, LOG2E, -shift) + lse * LOG2E_LOW
    careful = ~(tl.abs(shift) < RANGE)
    low = tl.where(careful, 0.0, low)
    factor = tl.exp2(-low) * inv_temperature
    a = -g * factor
    b = 0.0
    if HAS_H:
        a = -(g + h * (entropy - low * LN2)) * factor
        b = -h * LN2 * factor
    head, n_vec = _ends(row_ptr, V, K)
    known = (id >= 0) & (id < V)
    at = tl.where(known, id, 0).to(tl.int32)

    # Gradient of the target element, from log p and expm1, so that nothing cancels when p is near 1.
    logp = tl.where(careful, target * inv_temperature - lse, (tl.fma(target, c, -shift) - low) * LN2)
    one_minus_p, _ = _expm1(logp)
    one_minus_p = -one_minus_p
    at_target = g * one_minus_p
    if HAS_H:
        p = tl.exp2(logp * LOG2E)
        at_target -= h * p * (tl.maximum(logp, -1000.0) + entropy)
    at_target *= inv_temperature
    if softcap is not None:
        at_target *= 1.0 - (target / softcap) * (target / softcap)

    if with_ends:
        j, inside = _end_elements(V, head, n_vec, K, LANES)
        x = tl.load(row_ptr + j, mask=inside, other=0.0).to(tl.float32)
        if careful:
            y = _grad(x, c, shift, inv_temperature, lse, a, b, softcap, HAS_H, True)
        else:
            y = _grad(x, c, shift, inv_temperature, lse, a, b, softcap, HAS_H, False)
        tl.store(out + j, _narrow(y, out.dtype.element_ty), mask=inside)
    body = row_ptr + head + first * K
    sink = out + head + first * K
    n_here = n_vec - first if n_max is None else tl.minimum(n_vec - first, n_max)
    if careful:
        _grad_body(
            body, sink, n_here, c, shift, inv_temperature, lse, a, b, softcap, K, LANES, 1, HAS_H, True, SAME_PHASE
        )
    else:
        _grad_body(body, sink, n_here, c, shift, inv_temperature, lse, a, b, softcap, K, LANES, 2 * UNROLL, HAS_H,
                   False, SAME_PHASE)  # fmt: skip
    if n_max is not None:
        at_end = (at < head) | (at >= head + n_vec * K)
        here = (at >= head + first * K) & (at < head + (first + n_here) * K)
        known = known & (here | (at_end & with_ends))
    # The race: the sweep's thread that owns the target's vector also writes this element, with the value of a
    # non-target; that store must come first.
    tl.debug_barrier()
    tl.store(out + at, _narrow(at_target, out.dtype.element_ty), mask=known)
