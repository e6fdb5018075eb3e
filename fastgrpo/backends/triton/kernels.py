"""The Triton kernels: which program takes which row, and what it does there.

Arguments that belong together travel in the contract's named tuples, as pointers: `Rows`, `Scores`, `TokenRows`,
`TokenLoss`, and `TokenSpec` as floats. A member that is None compiles its code away. Lengths and strides stand alone,
because Triton specialises upon every integer in a tuple (1, and multiples of 16) and would compile anew for another V.
So it does upon where a tensor in a tuple begins: `launch.aligned` sees to it that all of the inputs begin at 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gradient import Backward, all_have_the_target, row_gradient
from .memory import afresh, end_elements, ends, load, narrow, row_pointer, store, zero_row
from .numeric import LOG2E
from .objective import advantage_of, group_advantage, token_objective, write_token
from .statistics import merged_sums, part_sums, reference, row_scores, row_sums, target_logit, totals

_kernel = triton.jit(do_not_specialize=[
    "V", "T", "stride_b", "stride_t", "out_stride_b", "out_stride_t", "n_rows", "group_size", "span",
])  # fmt: skip


@triton.jit
def _wanted(row, mask, advantages, seq, skip_zero):
    """Whether a row is read: its mask is True and, with skip_zero, its advantage is not 0."""
    wanted = tl.load(mask + row) != 0
    if advantages is not None:
        wanted = wanted & ((skip_zero == 0.0) | (advantage_of(row, advantages, seq) != 0.0))
    return wanted


@_kernel
def stats_kernel(logits, partial, rows, out, softcap, V, T, stride_b, stride_t, K: tl.constexpr, LANES: tl.constexpr,
                 UNROLL: tl.constexpr, PART: tl.constexpr):  # fmt: skip
    """Grid (N,), one program per row. Reads V logits once, or with `partial` given its sums; writes 2 or 3 numbers.

    A row with mask False is not read; its outputs are 0.
    """
    ENTROPY: tl.constexpr = out.entropy is not None
    row = tl.program_id(0)
    logp = 0.0
    lse = 0.0
    entropy = 0.0
    if tl.load(rows.mask + row) != 0:
        row_ptr = row_pointer(logits, row, T, stride_b, stride_t)
        inv_t = tl.load(rows.inv_temperature + row)
        id = tl.load(rows.ids + row)
        target = target_logit(row_ptr, id, V, softcap)
        if partial is not None:
            total, weighted = merged_sums(partial, row, tl.cdiv(V, PART * K))
        else:
            total, weighted = row_sums(row_ptr, id, target, V, inv_t, softcap, K, LANES, UNROLL, PART, 1, ENTROPY)
        again = afresh(row, total)
        row_ptr = row_pointer(logits, again, T, stride_b, stride_t)
        inv_t = tl.load(rows.inv_temperature + again)
        id = tl.load(rows.ids + again)
        logp, lse, entropy = row_scores(row_ptr, id, target, V, total, weighted, inv_t, softcap, K, LANES, ENTROPY)
    tl.store(out.logp + row, logp)
    tl.store(out.lse + row, lse)
    if ENTROPY:
        tl.store(out.entropy + row, entropy)


@_kernel
def part_kernel(logits, rows, advantages, seq, skip_zero, partial, softcap, V, T, stride_b, stride_t, K: tl.constexpr,
                LANES: tl.constexpr, UNROLL: tl.constexpr, PART: tl.constexpr, ENTROPY: tl.constexpr):  # fmt: skip
    """Grid (N * parts,): the sums of one part of a row, to partial (N, parts, 2) fp32.

    Reads PART * 16 bytes. Rows that the kernel which adds them up does not look at are not read.
    """
    pid = tl.program_id(0)
    parts = tl.cdiv(V, PART * K)
    row = pid // parts
    start = (pid % parts) * (PART * K)
    if _wanted(row, rows.mask, advantages, seq, skip_zero):
        row_ptr = row_pointer(logits, row, T, stride_b, stride_t)
        c = tl.load(rows.inv_temperature + row) * LOG2E
        id = tl.load(rows.ids + row)
        ref = reference(target_logit(row_ptr, id, V, softcap), c)
        s, w = part_sums(row_ptr + start, V - start, id - start, c, ref, softcap, K, LANES, UNROLL, PART, 1, ENTROPY)
        s, w = totals(s, w)
        sums = partial + pid.to(tl.int64) * 2
        tl.store(sums, s)
        tl.store(sums + 1, w)


@_kernel
def grad_kernel(logits, out, rows, backward, softcap, V, T, stride_b, stride_t, out_stride_b, out_stride_t, span,
                K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, SAME_PHASE: tl.constexpr,
                INPLACE: tl.constexpr):  # fmt: skip
    """Grid (N * parts,): the gradient of `span` vectors of a row. Reads span * 16 bytes and writes as many, or half.

    INPLACE: `out` lies in the memory of `logits`. If it is narrower, too, then one program takes a row, because its
    stores land where others would still read. SAME_PHASE: the vectors of every row of `out` begin with the same
    elements as those of its logits, so that stores are as wide as a vector too: 128 bits, or 64.
    A row with mask False, or with g == 0 and h == 0, is zero-filled without being read.
    """
    HAS_H: tl.constexpr = backward.h is not None
    pid = tl.program_id(0)
    parts = tl.cdiv(V, span * K)
    row = pid // parts
    part = pid % parts
    out_row = row_pointer(out, row, T, out_stride_b, out_stride_t)
    g = tl.load(backward.g + row)
    h = 0.0
    entropy = 0.0
    if HAS_H:
        h = tl.load(backward.h + row)
        entropy = tl.load(backward.entropy + row)
    idle = (g == 0.0) & (h == 0.0)
    if rows.mask is not None:
        idle = idle | (tl.load(rows.mask + row) == 0)
    if idle:
        zero_row(out_row, V, part * span, span, part == 0, K, LANES, UNROLL)
    else:
        row_ptr = row_pointer(logits, row, T, stride_b, stride_t)
        id = tl.load(rows.ids + row)
        at_row = Backward(g, h, tl.load(backward.logp + row), tl.load(backward.lse + row), entropy)
        inv_t = tl.load(rows.inv_temperature + row)
        target = 0.0
        if softcap is not None:  # for its slope
            target = target_logit(row_ptr, id, V, softcap)
            all_have_the_target(INPLACE)
        if INPLACE and out.dtype != logits.dtype:
            row_gradient(row_ptr, out_row, id, target, V, at_row, inv_t, softcap, 0, None, True, K, LANES, UNROLL,
                         HAS_H, SAME_PHASE, True)  # fmt: skip
        else:
            row_gradient(row_ptr, out_row, id, target, V, at_row, inv_t, softcap, part * span, span, part == 0, K,
                         LANES, UNROLL, HAS_H, SAME_PHASE, INPLACE)  # fmt: skip


@_kernel
def token_kernel(logits, partial, inputs, outputs, softcap, V, T, stride_b, stride_t, out_stride_b, out_stride_t,
                 n_rows, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, PART: tl.constexpr,
                 PARTS: tl.constexpr, SAME_PHASE: tl.constexpr, INPLACE: tl.constexpr):  # fmt: skip
    """Grid (any,), programs stride over the rows: statistics, objective and, if it is wanted, the gradient.

    Reads V logits from memory, and again from the L2 cache when it writes V of gradient; how many rows are in flight
    is the grid's choice. A program holds PARTS parts of its row side by side. With `partial` given the statistics are
    merged from there. SAME_PHASE and INPLACE are those of `grad_kernel`.
    inputs: `Rows`, `TokenRows`, `TokenSpec`. outputs: `TokenLoss`, and the gradient or None.
    A row with mask False, or with skip_zero and no advantage, is not read; its outputs and gradient are 0.
    """
    rows, token, spec = inputs
    out, grad = outputs
    ENTROPY: tl.constexpr = out.entropy is not None
    HAS_H: tl.constexpr = token.h is not None
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        if _wanted(row, rows.mask, token.advantages, token.seq, spec.skip_zero):
            if partial is not None:
                total, weighted = merged_sums(partial, row, tl.cdiv(V, PART * K))
            else:
                row_ptr = row_pointer(logits, row, T, stride_b, stride_t)
                id = tl.load(rows.ids + row)
                target = target_logit(row_ptr, id, V, softcap)
                total, weighted = row_sums(row_ptr, id, target, V, tl.load(rows.inv_temperature + row), softcap, K,
                                           LANES, UNROLL, PART, PARTS, ENTROPY)  # fmt: skip
            # Read once more, after the sweep: what would wait for its end in registers is what spills.
            again = afresh(row, total)
            row_ptr = row_pointer(logits, again, T, stride_b, stride_t)
            inv_t = tl.load(rows.inv_temperature + again)
            id = tl.load(rows.ids + again)
            target = target_logit(row_ptr, id, V, softcap)
            advantage = advantage_of(again, token.advantages, token.seq)
            scores = row_scores(row_ptr, id, target, V, total, weighted, inv_t, softcap, K, LANES // PARTS, ENTROPY)
            g, h = token_objective(again, scores, advantage, token, spec, out)
            if grad is not None:
                if INPLACE and grad.dtype == logits.dtype:
                    grad_row = row_ptr
                else:
                    grad_row = row_pointer(grad, again, T, out_stride_b, out_stride_t)
                all_have_the_target(INPLACE)
                if (g == 0.0) & (h == 0.0):
                    zero_row(grad_row, V, 0, V, True, K, LANES, UNROLL)
                else:
                    at_row = Backward(g, h, scores[0], scores[1], scores[2])
                    row_gradient(row_ptr, grad_row, id, target, V, at_row, inv_t, softcap, 0, None, True, K, LANES,
                                 UNROLL, HAS_H, SAME_PHASE, INPLACE)  # fmt: skip
        else:
            write_token(row, out, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
            if grad is not None:
                zero_row(row_pointer(grad, row, T, out_stride_b, out_stride_t), V, 0, V, True, K, LANES, UNROLL)


@_kernel
def group_kernel(rewards, advantages, group_size, scale_by_std, GROUP: tl.constexpr):
    """Grid (S,): the advantage of each sequence within its group, whose rewards it reads."""
    seq = tl.program_id(0)
    tl.store(advantages + seq, group_advantage(rewards, seq, group_size, scale_by_std, GROUP))


@_kernel
def scale_kernel(x, factor, V, T, stride_b, stride_t, span, K: tl.constexpr, LANES: tl.constexpr,
                 UNROLL: tl.constexpr):  # fmt: skip
    """Grid (N * parts,): x *= factor over `span` vectors of a row; touches nothing when the factor is 1."""
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        pid = tl.program_id(0)
        parts = tl.cdiv(V, span * K)
        first = (pid % parts) * span
        row_ptr = row_pointer(x, pid // parts, T, stride_b, stride_t)
        head, n_vec = ends(row_ptr, V, K)
        n_here = tl.minimum(n_vec - first, span)
        for start in range(0, n_here, UNROLL * LANES):
            body = tl.multiple_of(row_ptr + head + (first + start) * K, 16)
            y = load(body, n_here - start, UNROLL, LANES, K, "evict_first") * scale
            store(body, y, n_here - start, UNROLL, LANES, K)
        if first == 0:
            j, inside = end_elements(V, head, n_vec, K, LANES)
            y = tl.load(row_ptr + j, mask=inside, other=0.0).to(tl.float32) * scale
            tl.store(row_ptr + j, narrow(y, x.dtype.element_ty), mask=inside)
