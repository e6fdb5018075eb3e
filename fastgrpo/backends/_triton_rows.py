"""How Triton programs walk a row of logits: statistics and gradient, without a word on the objective.

A row's first and last few elements, outside the 16-byte aligned vectors of K elements, are its "ends": one element
per lane, handled apart. The vectors between are its "body". A tile is [UNROLL, LANES, K] with one lane per thread, so
every access of the body is 128 bits wide whatever V and the base address are, and reductions over the axes UNROLL and
K stay inside a thread. The statistics are kept per lane as (m, s, w): the running maximum, negated to be an addend,
the sum of e = 2^t and the sum of e*t, with t = z*log2(e) + m. Lanes meet once, at the end of the row.

The fast sweep takes t from one FMA, fma(x, c, m), m scaled. The FMA keeps the rounding error of m, which is harmless
while |m| < RANGE; m starts at RANGE, so that logits below -RANGE vanish and m is never infinite. A row whose maximum
lies outside, or whose -inf logits made 0*inf in the entropy, is swept again by `_careful_row`.

A body is cut into parts of PART vectors, each reduced from a fresh state and merged lane by lane in order. So one
program per row, and one program per part with a merge after it, give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_LOW = tl.constexpr(1.9259629911266175e-08)  # log2(e) minus its fp32 value
LN2 = tl.constexpr(0.6931471805599453)
RANGE = tl.constexpr(131072.0)
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
def _tile(UNROLL: tl.constexpr, LANES: tl.constexpr):
    """Vector indices [UNROLL, LANES, 1] of a tile."""
    return tl.arange(0, UNROLL)[:, None, None] * LANES + tl.arange(0, LANES)[None, :, None]


@triton.jit
def _pointers(body, K: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr):
    """Pointers to a tile at `body`, [UNROLL, LANES, K] or, where that gives each thread one lane, [LANES, UNROLL, K].

    The lane is added first: the rest is then an immediate offset.
    """
    lane = body + (tl.arange(0, LANES)[:, None] * K + tl.arange(0, K)[None, :])
    if LANES_FIRST:
        return lane[:, None, :] + tl.arange(0, UNROLL)[None, :, None] * (LANES * K)
    else:
        return lane[None, :, :] + tl.arange(0, UNROLL)[:, None, None] * (LANES * K)


@triton.jit
def _mask(left, K: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr):
    """The mask for `_pointers` of the first `left` vectors."""
    if LANES_FIRST:
        vec = tl.arange(0, UNROLL)[None, :, None] * LANES + tl.arange(0, LANES)[:, None, None]
        return tl.broadcast_to(vec < left, [LANES, UNROLL, K])
    else:
        return tl.broadcast_to(_tile(UNROLL, LANES) < left, [UNROLL, LANES, K])


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


# ---- statistics


@triton.jit
def _fresh(LANES: tl.constexpr):
    """The state of no element."""
    zero = tl.zeros([LANES], tl.float32)
    return zero + RANGE, zero, zero


@triton.jit
def _fold(x, m, s, w, c, ENTROPY: tl.constexpr, CAREFUL: tl.constexpr):
    """Take a tile x [UNROLL, LANES, K] fp32 into the lanes' state. m is scaled by c, or raw where CAREFUL."""
    top = tl.max(tl.max(x, axis=2), axis=0)
    if CAREFUL:
        new = tl.minimum(m, -top)
        t = (x + new[None, :, None]) * c
        # Bounded, because 0 * (an overflowed difference) would be NaN below.
        d = tl.maximum((new - m) * c, -RANGE)
    else:
        new = tl.minimum(m, top * -c)
        t = tl.fma(x, c, new[None, :, None])
        d = new - m
    e = tl.exp2(t)
    scale = tl.exp2(d)
    if ENTROPY:
        et = e * t
        if CAREFUL:
            et = tl.where(e == 0.0, 0.0, et)
        w = tl.fma(tl.fma(s, d, w), scale, tl.sum(tl.sum(et, axis=2), axis=0))
    s = tl.fma(s, scale, tl.sum(tl.sum(e, axis=2), axis=0))
    return new, s, w


@triton.jit
def _merge(m, s, w, m1, s1, w1, ENTROPY: tl.constexpr):
    """The state of two disjoint pieces of a row, lane by lane, in this order."""
    new = tl.minimum(m, m1)
    d = new - m
    d1 = new - m1
    scale = tl.exp2(d)
    scale1 = tl.exp2(d1)
    if ENTROPY:
        w = tl.fma(tl.fma(s, d, w), scale, tl.fma(s1, d1, w1) * scale1)
    s = tl.fma(s, scale, s1 * scale1)
    return new, s, w


@triton.jit
def _part_state(body, n_vec, c, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
                ENTROPY: tl.constexpr):  # fmt: skip
    """State of n_vec vectors from the 16-byte aligned address `body`. Its loop is the hot one: no mask, no barrier."""
    TILE: tl.constexpr = UNROLL * LANES
    m, s, w = _fresh(LANES)
    full = n_vec // TILE
    # Two tiles an iteration, and so their loads side by side; a tile of twice the size would take more registers.
    for i in tl.range(full, loop_unroll_factor=2):
        x = _load(tl.multiple_of(body + i * (TILE * K), 16), None, UNROLL, LANES, K, "")
        m, s, w = _fold(x, m, s, w, c, ENTROPY, False)
    if full * TILE < n_vec:
        left = n_vec - full * TILE
        x = _load(tl.multiple_of(body + full * (TILE * K), 16), left, UNROLL, LANES, K, "")
        # Lowest rather than -inf: what is not there must not look like a -inf logit to the entropy.
        x = tl.where(_tile(UNROLL, LANES) < left, x, LOWEST / tl.maximum(c, 1.0))
        m, s, w = _fold(x, m, s, w, c, ENTROPY, False)
    return m, s, w


@triton.jit
def _end_state(row_ptr, V, head, n_vec, c, K: tl.constexpr, LANES: tl.constexpr):
    """State of the ends of a row."""
    j, inside = _end_elements(V, head, n_vec, K, LANES)
    x = tl.load(row_ptr + j, mask=inside, other=0.0).to(tl.float32)
    m = tl.minimum(tl.where(inside, x * -c, RANGE), RANGE)
    t = tl.fma(x, c, m)
    e = tl.where(inside, tl.exp2(t), 0.0)
    return m, e, tl.where(e == 0.0, 0.0, e * t)


@triton.jit
def _careful_row(row_ptr, V, c, K: tl.constexpr, LANES: tl.constexpr):
    """State of a whole row for any finite magnitude, m raw; element by element, for it is rare."""
    BLOCK: tl.constexpr = LANES * K
    offset = tl.reshape(tl.arange(0, BLOCK), [1, LANES, K])
    m = tl.full([LANES], -LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    w = tl.zeros([LANES], tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(row_ptr + start + offset, mask=offset < V - start, other=-INF).to(tl.float32)
        m, s, w = _fold(x, m, s, w, c, True, True)
    return m, s, w


@triton.jit
def _target(row_ptr, id, V):
    """The logit of a row's target; NaN, without a read, where the id is none of the vocabulary."""
    known = (id >= 0) & (id < V)
    return tl.load(row_ptr + tl.where(known, id, 0), mask=known, other=float("nan")).to(tl.float32)


@triton.jit
def _scores(row_ptr, target, V, m, s, w, c, inv_temperature, K: tl.constexpr, LANES: tl.constexpr,
            ENTROPY: tl.constexpr):  # fmt: skip
    """(logp, lse, entropy) of a row from its lanes' state: the only meeting of the lanes."""
    top = -tl.min(m, axis=0)
    d = -top - m
    scale = tl.exp2(d)
    total = tl.sum(s * scale, axis=0)
    log_total = tl.log2(total)
    logp = (tl.fma(target, c, -top) - log_total) * LN2
    lse = tl.fma(log_total, LN2, top * LN2)
    entropy = 0.0
    usable = tl.abs(top) < RANGE
    again = ~usable
    if ENTROPY:
        spread = tl.sum(tl.fma(s, d, w) * scale, axis=0)
        entropy = (log_total - spread / total) * LN2
        again = again | (spread != spread)
    if again:
        m, s, w = _careful_row(row_ptr, V, c, K, LANES)
        top = -tl.min(m, axis=0)
        d = tl.maximum((-top - m) * c, -RANGE)
        scale = tl.exp2(d)
        total = tl.sum(s * scale, axis=0)
        log_total = tl.log2(total)
        if ENTROPY:
            entropy = (log_total - tl.sum(tl.fma(s, d, w) * scale, axis=0) / total) * LN2
        # A row swept again for its entropy alone keeps the logp that it has without one.
        logp = tl.where(usable, logp, (target - top) * inv_temperature - log_total * LN2)
        lse = tl.where(usable, lse, tl.fma(log_total, LN2, top * inv_temperature))
    return logp, lse, entropy


@triton.jit
def _row_scores(row_ptr, id, V, inv_temperature, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
                PART: tl.constexpr, ENTROPY: tl.constexpr):  # fmt: skip
    """(logp, lse, entropy) of one whole row by one program."""
    c = inv_temperature * LOG2E
    target = _target(row_ptr, id, V)
    head, n_vec = _ends(row_ptr, V, K)
    body = tl.multiple_of(row_ptr + head, 16)
    m, s, w = _end_state(row_ptr, V, head, n_vec, c, K, LANES)
    for first in range(0, n_vec, PART):
        part = tl.multiple_of(body + first * K, 16)
        m1, s1, w1 = _part_state(part, tl.minimum(n_vec - first, PART), c, K, LANES, UNROLL, ENTROPY)
        m, s, w = _merge(m, s, w, m1, s1, w1, ENTROPY)
    return _scores(row_ptr, target, V, m, s, w, c, inv_temperature, K, LANES, ENTROPY)


@triton.jit
def _merged_scores(partial, row_ptr, row, parts, id, V, inv_temperature, K: tl.constexpr, LANES: tl.constexpr,
                   PART: tl.constexpr, ENTROPY: tl.constexpr):  # fmt: skip
    """(logp, lse, entropy) of one row from the partial states that `part_kernel` left; the bits of `_row_scores`."""
    c = inv_temperature * LOG2E
    target = _target(row_ptr, id, V)
    head, n_vec = _ends(row_ptr, V, K)
    m, s, w = _end_state(row_ptr, V, head, n_vec, c, K, LANES)
    states = partial + parts.to(tl.int64) * (3 * LANES) * row + tl.arange(0, LANES)
    for part in range(tl.cdiv(n_vec, PART)):
        state = states + part * (3 * LANES)
        w1 = tl.zeros([LANES], tl.float32)
        if ENTROPY:
            w1 = tl.load(state + 2 * LANES)
        m, s, w = _merge(m, s, w, tl.load(state), tl.load(state + LANES), w1, ENTROPY)
    return _scores(row_ptr, target, V, m, s, w, c, inv_temperature, K, LANES, ENTROPY)


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
def _grad(x, c, shift, inv_temperature, lse, a, b, HAS_H: tl.constexpr, CAREFUL: tl.constexpr):
    """p * (a + b*log2(p)) with p = 2^(x*c - shift)."""
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
def _grad_body(body, out, n_vec, c, shift, inv_temperature, lse, a, b, K: tl.constexpr, LANES: tl.constexpr,
               UNROLL: tl.constexpr, HAS_H: tl.constexpr, CAREFUL: tl.constexpr,
               SAME_PHASE: tl.constexpr):  # fmt: skip
    """Gradient of n_vec vectors, from the last to the first: the end of a row is what a cache still holds of it."""
    TILE: tl.constexpr = UNROLL * LANES
    full = n_vec // TILE
    if full * TILE < n_vec:
        left = n_vec - full * TILE
        x = _load(tl.multiple_of(body + full * (TILE * K), 16), left, UNROLL, LANES, K, "evict_first")
        y = _grad(x, c, shift, inv_temperature, lse, a, b, HAS_H, CAREFUL)
        sink = out + full * (TILE * K)
        if SAME_PHASE:
            sink = tl.multiple_of(sink, 16)
        _store(sink, y, left, UNROLL, LANES, K)
    for i in range(full):
        start = (full - 1 - i) * (TILE * K)
        x = _load(tl.multiple_of(body + start, 16), None, UNROLL, LANES, K, "evict_first")
        y = _grad(x, c, shift, inv_temperature, lse, a, b, HAS_H, CAREFUL)
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
def _row_grad(row_ptr, out, id, V, lse, entropy, g, h, inv_temperature, first, n_max, with_ends, K: tl.constexpr,
              LANES: tl.constexpr, UNROLL: tl.constexpr, HAS_H: tl.constexpr, SAME_PHASE: tl.constexpr):  # fmt: skip
    """Gradient of the vectors [first, first + n_max) of a row, and of its ends if asked.

    out_j = inv_temperature * (g * (1[j == id] - p_j) - h * p_j * (log p_j + entropy)); off the target that is
    p_j * (a + b * log2 p_j).
    """
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
    target = _target(row_ptr, id, V)

    # Gradient of the target element, from log p and expm1, so that nothing cancels when p is near 1.
    logp = tl.where(careful, target * inv_temperature - lse, (tl.fma(target, c, -shift) - low) * LN2)
    one_minus_p, _ = _expm1(logp)
    one_minus_p = -one_minus_p
    at_target = g * one_minus_p
    if HAS_H:
        p = tl.exp2(logp * LOG2E)
        at_target -= h * p * (tl.maximum(logp, -1000.0) + entropy)
    at_target *= inv_temperature

    if with_ends:
        j, inside = _end_elements(V, head, n_vec, K, LANES)
        x = tl.load(row_ptr + j, mask=inside, other=0.0).to(tl.float32)
        if careful:
            y = _grad(x, c, shift, inv_temperature, lse, a, b, HAS_H, True)
        else:
            y = _grad(x, c, shift, inv_temperature, lse, a, b, HAS_H, False)
        tl.store(out + j, _narrow(y, out.dtype.element_ty), mask=inside)
    body = row_ptr + head + first * K
    sink = out + head + first * K
    n_here = tl.minimum(n_vec - first, n_max)
    if careful:
        _grad_body(body, sink, n_here, c, shift, inv_temperature, lse, a, b, K, LANES, 1, HAS_H, True, SAME_PHASE)
    else:
        _grad_body(body, sink, n_here, c, shift, inv_temperature, lse, a, b, K, LANES, 2 * UNROLL, HAS_H,
                   False, SAME_PHASE)  # fmt: skip
    at_end = (at < head) | (at >= head + n_vec * K)
    here = (at >= head + first * K) & (at < head + (first + n_here) * K)
    # The race: the sweep's thread that owns the target's vector also writes this element, with the value of a
    # non-target; that store must come first.
    tl.debug_barrier()
    tl.store(out + at, _narrow(at_target, out.dtype.element_ty), mask=known & (here | (at_end & with_ends)))
