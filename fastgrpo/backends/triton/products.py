"""The products of a few columns of each row, given by a table of ids.

They read rows of the weight, or of the hidden states, and sum in the order of the table's places.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import narrow
from .numeric import INF

_kernel = triton.jit(do_not_specialize=["w", "P"])


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
