"""A row of logits in memory: where it lies, and how tiles of it are read and written.

Accesses are 128 bits wide whatever V and the base address are: tiles start at multiples of 16 bytes, one vector of K
elements per lane, and what of a tile lies outside the row is masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of two equally contiguous axes Triton gives the first to the threads of a warp up to 3.6, and the last from 3.7 on.
LANES_FIRST = tl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 7))
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def row_pointer(base, row, T, stride_b, stride_t):
    """Pointer to row (row // T, row % T); the offset is 64-bit."""
    b = (row // T).to(tl.int64)
    t = (row % T).to(tl.int64)
    return base + b * stride_b + t * stride_t


@triton.jit
def afresh(row, total):
    """`row`, but no compiler knows it, for T >= 1: addresses from here on are computed anew after a sweep, where they
    would otherwise sit in registers, or spill, all through it."""
    return row + (total.to(tl.int32, bitcast=True) >> 31)


@triton.jit
def ends(row_ptr, V, K: tl.constexpr):
    """(head, n_vec): elements before the first 16-byte boundary, and vectors of K elements from there on."""
    size: tl.constexpr = 16 // K
    head = ((16 - (row_ptr.to(tl.int64) & 15)) & 15).to(tl.int32) // size
    head = tl.minimum(head, V)
    return head, (V - head) // K


@triton.jit
def end_elements(V, head, n_vec, K: tl.constexpr, LANES: tl.constexpr):
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
def load(body, left, UNROLL: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr, POLICY: tl.constexpr):
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
def narrow(y, dtype: tl.constexpr):
    """y in `dtype`, rounded to nearest even. The interpreter's own conversion to bf16 would truncate."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = y.to(tl.uint32, bitcast=True)
        bits = tl.where(y == y, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return y.to(dtype)


@triton.jit
def store(body, y, left, UNROLL: tl.constexpr, LANES: tl.constexpr, K: tl.constexpr):
    """Write the first `left` vectors (None: all) of a tile y [UNROLL, LANES, K], rounded to the type of `body`."""
    pointers = _pointers(body, K, UNROLL, LANES)
    y = narrow(y, body.dtype.element_ty)
    if LANES_FIRST:
        y = tl.permute(y, (1, 0, 2))
    if left is None:
        tl.store(pointers, y, eviction_policy="evict_first")
    else:
        tl.store(pointers, y, mask=_mask(left, K, UNROLL, LANES), eviction_policy="evict_first")


@triton.jit
def zero_row(out, V, first, n_max, with_ends, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """Zeros over as much of a row of `out` as the vectors [first, first + n_max) of its logits are, K elements each,
    and over its ends if asked.

    Of a narrower `out` 16 bytes hold twice as many elements. Then first is even, and n_max too or beyond the row.
    """
    WIDE: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
    head, n_vec = ends(out, V, WIDE)
    first = first // (WIDE // K)
    body = out + head + first * WIDE
    n_here = tl.minimum(n_vec - first, n_max // (WIDE // K))
    zero = tl.zeros([UNROLL, LANES, WIDE], tl.float32)
    for start in range(0, n_here, UNROLL * LANES):
        sink = tl.multiple_of(body + start * WIDE, 16)
        store(sink, zero, n_here - start, UNROLL, LANES, WIDE)
    if with_ends:
        j, inside = end_elements(V, head, n_vec, WIDE, LANES)
        tl.store(out + j, tl.zeros([LANES], out.dtype.element_ty), mask=inside)
