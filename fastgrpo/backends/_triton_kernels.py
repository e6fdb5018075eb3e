"""The Triton kernels, and the fused objective of one token that stands between their sweeps (`_triton_rows`)."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_rows import (
    INF,
    LOG2E,
    _afresh,
    _end_elements,
    _ends,
    _expm1,
    _load,
    _merged_sums,
    _narrow,
    _part_sums,
    _reference,
    _row,
    _row_grad,
    _row_sums,
    _scores,
    _store,
    _target,
    _totals,
    _zero,
)

# ---- objective


@triton.jit
def _times(x, factor):
    """x * factor, where an infinite x stands for a number beyond fp32."""
    return tl.where((factor == 0.0) & (tl.abs(x) == INF), 0.0, x * factor)


@triton.jit
def _objective(logp, d, ref, advantage, kind, clip_low, clip_high, delta, beta, bias_correction, tau_pos, tau_neg):
    """(policy loss, its d/dlogp, kl, its d/dlogp, ratio) of one token; `TokenSpec` names the numbers, d = logp - old.

    Ties split the derivative in halves, as torch.min does.
    """
    # ratio = low * high, with high = 1 up to d = 80: v * low * high is finite wherever v * e^d is, and 0 with v = 0
    low = tl.exp2(tl.where(d > 80.0, 80.0, d) * LOG2E)
    high = tl.exp2(tl.minimum(tl.maximum(d - 80.0, 0.0), 80.0) * LOG2E)
    ratio = low * high
    if kind == 0:
        clipped = tl.minimum(tl.maximum(ratio, clip_low, propagate_nan=tl.PropagateNan.ALL), clip_high,
                             propagate_nan=tl.PropagateNan.ALL)  # fmt: skip
        slope = advantage * low * high
        loss1 = tl.where(ratio > delta, delta * advantage, slope)
        loss2 = clipped * advantage
        slope1 = tl.where(ratio <= delta, slope, 0.0)
        slope2 = tl.where((clip_low <= ratio) & (ratio <= clip_high), slope, 0.0)
        loss = -tl.minimum(loss1, loss2, propagate_nan=tl.PropagateNan.ALL)
        dloss = -tl.where(loss1 < loss2, slope1, tl.where(loss1 > loss2, slope2, 0.5 * (slope1 + slope2)))
    elif kind == 1:
        capped = tl.minimum(ratio, clip_high, propagate_nan=tl.PropagateNan.ALL)
        dloss = -capped * advantage
        loss = dloss * logp
    else:
        tau = tl.where(advantage > 0.0, tau_pos, tau_neg)
        gate = 1.0 / (1.0 + tl.exp2(-tau * (ratio - 1.0) * LOG2E))
        loss = -advantage * gate * 4.0 / tau
        dloss = -advantage * 4.0 * gate * (1.0 - gate) * low * high
    kl = 0.0
    dkl = 0.0
    if beta != 0.0:
        grown, kl = _expm1(ref - logp)
        dkl = -grown
        if bias_correction != 0.0:
            # Its derivative (kl - grown) * ratio, without the cancellation; and beyond q = 20, where e^q may overflow
            # beside a small ratio, e^d * (e^q - 1 - q) with the two exponents added.
            q = ref - logp
            dkl = -q * low * high
            far = tl.exp2((q + d) * LOG2E) * (1.0 - (1.0 + q) * tl.exp2(-q * LOG2E))
            kl = tl.where(q > 20.0, far, kl * low * high)
    return loss, dloss, kl, dkl, ratio


@triton.jit
def _group_advantage(rewards, seq, group_size, scale_by_std, GROUP: tl.constexpr):
    """The advantage of sequence `seq` within its group: (r - mean) / (std + 1e-4), NaN rewards left out."""
    k = tl.arange(0, GROUP)
    r = tl.load(rewards + (seq // group_size) * group_size + k, mask=k < group_size, other=float("nan"))
    own = tl.load(rewards + seq)
    valid = r == r
    n = tl.sum(valid.to(tl.float32), axis=0)
    # Counted from the group's best, so that the mean of large, nearly equal rewards keeps its digits.
    best = tl.max(tl.where(valid, r, -INF), axis=0)
    spread = best > tl.min(tl.where(valid, r, INF), axis=0)
    r = tl.where(valid, r - best, 0.0)
    mean = tl.sum(r, axis=0) / n
    apart = tl.where(valid, r - mean, 0.0)
    std = tl.sqrt(tl.sum(apart * apart, axis=0) / (n - 1.0))
    advantage = own - best - mean
    if scale_by_std != 0.0:
        advantage = advantage / (std + 1e-4)
    # A group without spread gives exactly 0, whatever the rounding of its mean.
    return tl.where(spread & (advantage == advantage), advantage, 0.0)


@triton.jit
def _token(row, logp, entropy, advantage, weight, old, ref, policy_scale, h, loss_out, logp_out, lse_out, lse,
           entropy_out, kl_out, ratio_out, g_out, kind, clip_low, clip_high, delta, beta, bias_correction, tau_pos,
           tau_neg, ENTROPY: tl.constexpr):  # fmt: skip
    """Write what one token gives, and return its (g, h)."""
    d = tl.where(logp == logp, 0.0, logp)  # 0, or NaN
    if old is not None:
        d = logp - tl.load(old + row)
    ref_logp = logp
    if ref is not None:
        ref_logp = tl.load(ref + row)
    loss, dloss, kl, dkl, ratio = _objective(logp, d, ref_logp, advantage, kind, clip_low, clip_high, delta, beta,
                                             bias_correction, tau_pos, tau_neg)  # fmt: skip
    if policy_scale is not None:
        scale = tl.load(policy_scale + row)
        loss = _times(loss, scale)
        dloss = _times(dloss, scale)
    factor = tl.load(weight + row)
    if beta != 0.0:
        loss += beta * kl
        dloss += beta * dkl
    loss = _times(loss, factor)
    g = _times(dloss, factor)
    dentropy = 0.0
    if h is not None:
        dentropy = tl.load(h + row)
        loss += tl.where(dentropy != 0.0, dentropy * entropy, 0.0)
    tl.store(loss_out + row, loss)
    tl.store(logp_out + row, logp)
    tl.store(lse_out + row, lse)
    if ENTROPY:
        tl.store(entropy_out + row, entropy)
    tl.store(kl_out + row, kl)
    tl.store(ratio_out + row, ratio)
    tl.store(g_out + row, g)
    return g, dentropy


# ---- kernels; lengths, strides and numbers are run-time values, never specialised upon


_kernel = triton.jit(do_not_specialize=[
    "V", "T", "stride_b", "stride_t", "out_stride_b", "out_stride_t", "parts", "n_rows", "group_size", "span",
])  # fmt: skip


@_kernel
def stats_kernel(logits, partial, ids, mask, inv_temperature, softcap, logp_out, lse_out, entropy_out, V, T, stride_b,
                 stride_t, parts, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, PART: tl.constexpr,
                 ENTROPY: tl.constexpr):  # fmt: skip
    """Grid (N,), one program per row. Reads V logits once, or with `partial` given its sums; writes 2 or 3 numbers.

    A row with mask False is not read; its outputs are 0.
    """
    row = tl.program_id(0)
    logp = 0.0
    lse = 0.0
    entropy = 0.0
    if tl.load(mask + row) != 0:
        row_ptr = _row(logits, row, T, stride_b, stride_t)
        inv_t = tl.load(inv_temperature + row)
        target = _target(row_ptr, tl.load(ids + row), V, softcap)
        if partial is not None:
            total, weighted = _merged_sums(partial, row, parts)
        else:
            total, weighted = _row_sums(row_ptr, target, V, inv_t, softcap, K, LANES, UNROLL, PART, 1, ENTROPY)
        again = _afresh(row, total)
        row_ptr = _row(logits, again, T, stride_b, stride_t)
        inv_t = tl.load(inv_temperature + again)
        logp, lse, entropy = _scores(row_ptr, target, V, total, weighted, inv_t, softcap, K, LANES, ENTROPY)
    tl.store(logp_out + row, logp)
    tl.store(lse_out + row, lse)
    if ENTROPY:
        tl.store(entropy_out + row, entropy)


@_kernel
def part_kernel(logits, ids, mask, inv_temperature, softcap, advantages, partial, V, T, stride_b, stride_t, parts,
                skip_zero, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, PART: tl.constexpr,
                ENTROPY: tl.constexpr):  # fmt: skip
    """Grid (N * parts,): the sums of one part of a row, to partial (N, parts, 2) fp32.

    Reads PART * 16 bytes. Rows that the kernel which adds them up does not look at are not read.
    """
    pid = tl.program_id(0)
    row = pid // parts
    start = (pid % parts) * (PART * K)
    wanted = tl.load(mask + row) != 0
    if advantages is not None:
        wanted = wanted & ((skip_zero == 0.0) | (tl.load(advantages + row) != 0.0))
    if wanted:
        row_ptr = _row(logits, row, T, stride_b, stride_t)
        c = tl.load(inv_temperature + row) * LOG2E
        ref = _reference(_target(row_ptr, tl.load(ids + row), V, softcap), c)
        s, w = _part_sums(row_ptr + start, V - start, c, ref, softcap, K, LANES, UNROLL, PART, 1, ENTROPY)
        s, w = _totals(s, w)
        sums = partial + pid.to(tl.int64) * 2
        tl.store(sums, s)
        tl.store(sums + 1, w)


@_kernel
def grad_kernel(logits, out, ids, mask, lse, entropy, g, h, inv_temperature, softcap, V, T, stride_b, stride_t,
                out_stride_b, out_stride_t, parts, span, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
                SAME_PHASE: tl.constexpr, INPLACE: tl.constexpr):  # fmt: skip
    """Grid (N * parts,): the gradient of `span` vectors of a row. Reads and writes span * 16 bytes.

    INPLACE: `out` is `logits`. SAME_PHASE: every row of `out` starts at the address of its logits modulo 16, so that
    stores are 128 bits wide too.
    A row with mask False, or with g == 0 and h == 0, is zero-filled without being read.
    """
    pid = tl.program_id(0)
    row = pid // parts
    part = pid % parts
    out_row = _row(out, row, T, out_stride_b, out_stride_t)
    g_row = tl.load(g + row)
    h_row = 0.0
    entropy_row = 0.0
    if h is not None:
        h_row = tl.load(h + row)
        entropy_row = tl.load(entropy + row)
    idle = (g_row == 0.0) & (h_row == 0.0)
    if mask is not None:
        idle = idle | (tl.load(mask + row) == 0)
    if idle:
        _zero(out_row, V, part * span, span, part == 0, K, LANES, UNROLL)
    else:
        row_ptr = _row(logits, row, T, stride_b, stride_t)
        id = tl.load(ids + row)
        _row_grad(row_ptr, out_row, id, _target(row_ptr, id, V, softcap), V, tl.load(lse + row), entropy_row, g_row,
                  h_row, tl.load(inv_temperature + row), softcap, part * span, span, part == 0, K, LANES, UNROLL,
                  h is not None, SAME_PHASE, INPLACE)  # fmt: skip


@_kernel
def token_kernel(logits, partial, ids, mask, inv_temperature, softcap, advantages, rewards, seq, weight, old, ref,
                 policy_scale, h, loss_out, logp_out, lse_out, entropy_out, kl_out, ratio_out, g_out, V, T, stride_b,
                 stride_t, parts, n_rows, kind, clip_low, clip_high, delta, beta, bias_correction, tau_pos, tau_neg,
                 group_size, scale_by_std, skip_zero, K: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr,
                 PART: tl.constexpr, PARTS: tl.constexpr, ENTROPY: tl.constexpr, INPLACE: tl.constexpr,
                 GROUP: tl.constexpr):  # fmt: skip
    """Grid (any,), programs stride over the rows: statistics, objective and, if INPLACE, the gradient over the row.

    Reads V logits from memory, and again from the L2 cache when it writes V of gradient; how many rows are in flight
    is the grid's choice. A program holds PARTS parts of its row side by side. With `partial` given the statistics are
    merged from there and no gradient is written.
    A row with mask False, or with skip_zero and no advantage, is not read; its outputs and gradient are 0.
    """
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        wanted = tl.load(mask + row) != 0
        if advantages is not None:
            advantage = tl.load(advantages + row)
        else:
            advantage = _group_advantage(rewards, tl.load(seq + row), group_size, scale_by_std, GROUP)
        wanted = wanted & ((skip_zero == 0.0) | (advantage != 0.0))
        if wanted:
            if partial is not None:
                total, weighted = _merged_sums(partial, row, parts)
            else:
                row_ptr = _row(logits, row, T, stride_b, stride_t)
                target = _target(row_ptr, tl.load(ids + row), V, softcap)
                total, weighted = _row_sums(row_ptr, target, V, tl.load(inv_temperature + row), softcap, K, LANES,
                                            UNROLL, PART, PARTS, ENTROPY)  # fmt: skip
            # Read once more, after the sweep: what would wait for its end in registers is what spills.
            again = _afresh(row, total)
            row_ptr = _row(logits, again, T, stride_b, stride_t)
            inv_t = tl.load(inv_temperature + again)
            id = tl.load(ids + again)
            target = _target(row_ptr, id, V, softcap)
            if advantages is not None:
                advantage = tl.load(advantages + again)
            logp, lse, entropy = _scores(row_ptr, target, V, total, weighted, inv_t, softcap, K, LANES // PARTS,
                                         ENTROPY)  # fmt: skip
            g, dentropy = _token(again, logp, entropy, advantage, weight, old, ref, policy_scale, h, loss_out,
                                 logp_out, lse_out, lse, entropy_out, kl_out, ratio_out, g_out, kind, clip_low,
                                 clip_high, delta, beta, bias_correction, tau_pos, tau_neg, ENTROPY)  # fmt: skip
            if INPLACE:
                if (g == 0.0) & (dentropy == 0.0):
                    _zero(row_ptr, V, 0, V, True, K, LANES, UNROLL)
                else:
                    _row_grad(row_ptr, row_ptr, id, target, V, lse, entropy, g, dentropy, inv_t, softcap, 0, None,
                              True, K, LANES, UNROLL, h is not None, True, True)  # fmt: skip
        else:
            tl.store(loss_out + row, 0.0)
            tl.store(logp_out + row, 0.0)
            tl.store(lse_out + row, 0.0)
            if ENTROPY:
                tl.store(entropy_out + row, 0.0)
            tl.store(kl_out + row, 0.0)
            tl.store(ratio_out + row, 0.0)
            tl.store(g_out + row, 0.0)
            if INPLACE:
                _zero(_row(logits, row, T, stride_b, stride_t), V, 0, V, True, K, LANES, UNROLL)


@_kernel
def scale_kernel(x, factor, V, T, stride_b, stride_t, parts, span, K: tl.constexpr, LANES: tl.constexpr,
                 UNROLL: tl.constexpr):  # fmt: skip
    """Grid (N * parts,): x *= factor over `span` vectors of a row; touches nothing when the factor is 1."""
    scale = tl.load(factor).to(tl.float32)
    if scale != 1.0:
        pid = tl.program_id(0)
        first = (pid % parts) * span
        row_ptr = _row(x, pid // parts, T, stride_b, stride_t)
        head, n_vec = _ends(row_ptr, V, K)
        n_here = tl.minimum(n_vec - first, span)
        for start in range(0, n_here, UNROLL * LANES):
            body = tl.multiple_of(row_ptr + head + (first + start) * K, 16)
            y = _load(body, n_here - start, UNROLL, LANES, K, "evict_first") * scale
            _store(body, y, n_here - start, UNROLL, LANES, K)
        if first == 0:
            j, inside = _end_elements(V, head, n_vec, K, LANES)
            y = tl.load(row_ptr + j, mask=inside, other=0.0).to(tl.float32) * scale
            tl.store(row_ptr + j, _narrow(y, x.dtype.element_ty), mask=inside)
