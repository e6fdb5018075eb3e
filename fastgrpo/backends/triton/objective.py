"""The fused objective of one token, and advantages from the rewards of a group.

A new kind of loss is a function beside `_clip`, and a branch in `_policy`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numeric import INF, LOG2E, expm1

CLIP = tl.constexpr(0)  # as in csrc/objective.h
CISPO = tl.constexpr(1)


@triton.jit
def _clamp(x, lowest, highest):
    """NaN stays NaN."""
    return tl.minimum(tl.maximum(x, lowest, propagate_nan=tl.PropagateNan.ALL), highest,
                      propagate_nan=tl.PropagateNan.ALL)  # fmt: skip


# ---- the policy loss of a token, by kind: (loss, dloss/dlogp)
# ratio = low * high, so that v * low * high is finite wherever v * ratio is, and 0 with v = 0; `numbers` are 4, unused
# ones last.


@triton.jit
def _clip(ratio, low, high, advantage, numbers):
    """Ties split the derivative in halves, as torch.min does."""
    lowest, highest, delta, dual = numbers
    slope = advantage * low * high
    loss1 = tl.where(ratio > delta, delta * advantage, slope)
    loss2 = _clamp(ratio, lowest, highest) * advantage
    slope1 = tl.where(ratio > delta, 0.0, slope)  # of a NaN ratio NaN
    slope2 = tl.where((ratio < lowest) | (ratio > highest), 0.0, slope)
    loss = -tl.minimum(loss1, loss2, propagate_nan=tl.PropagateNan.ALL)
    dloss = -tl.where(loss1 < loss2, slope1, tl.where(loss1 > loss2, slope2, 0.5 * (slope1 + slope2)))
    most = tl.where(advantage < 0.0, -dual * advantage, INF)
    dloss = tl.where(loss < most, dloss, tl.where(loss > most, 0.0, 0.5 * dloss))
    return tl.minimum(loss, most, propagate_nan=tl.PropagateNan.ALL), dloss


@triton.jit
def _cispo(ratio, logp, advantage, numbers):
    lowest, highest, _, _ = numbers
    dloss = -_clamp(ratio, lowest, highest) * advantage
    return dloss * logp, dloss


@triton.jit
def _sapo(ratio, low, high, advantage, numbers):
    tau_positive, tau_negative, _, _ = numbers
    tau = tl.where(advantage > 0.0, tau_positive, tau_negative)
    gate = 1.0 / (1.0 + tl.exp2(-tau * (ratio - 1.0) * LOG2E))
    return -advantage * gate * 4.0 / tau, -advantage * 4.0 * gate * (1.0 - gate) * low * high


@triton.jit
def _policy(kind, ratio, low, high, logp, advantage, numbers):
    if kind == CLIP:
        loss, dloss = _clip(ratio, low, high, advantage, numbers)
    elif kind == CISPO:
        loss, dloss = _cispo(ratio, logp, advantage, numbers)
    else:
        loss, dloss = _sapo(ratio, low, high, advantage, numbers)
    return loss, dloss


# ---- the whole of a token


@triton.jit
def _times(x, factor):
    """x * factor, where an infinite x stands for a number beyond fp32."""
    return tl.where((factor == 0.0) & (tl.abs(x) == INF), 0.0, x * factor)


@triton.jit
def _objective(logp, d, ref, advantage, spec):
    """(policy loss, its d/dlogp, kl, its d/dlogp, ratio) of one token; d = logp - old."""
    held = tl.abs(d) > spec.log_ratio_clamp  # then the ratio has no derivative
    d = _clamp(d, -spec.log_ratio_clamp, spec.log_ratio_clamp)
    low = tl.exp2(tl.where(d > 80.0, 80.0, d) * LOG2E)  # and high = 1 up to d = 80
    high = tl.exp2(tl.minimum(tl.maximum(d - 80.0, 0.0), 80.0) * LOG2E)
    ratio = low * high
    loss, dloss = _policy(spec.kind, ratio, low, high, logp, advantage, spec.numbers)
    dloss = tl.where(held & (spec.kind != CISPO), 0.0, dloss)
    kl = 0.0
    dkl = 0.0
    if spec.beta != 0.0:
        grown, kl = expm1(ref - logp)
        dkl = -grown
        if spec.bias_correction != 0.0:
            # Its derivative (kl - grown) * ratio, without the cancellation, or -grown * ratio beside a ratio without
            # one; and beyond q = 20, where e^q may overflow beside a small ratio, e^d * (e^q - 1 - q) with the two
            # exponents added.
            q = ref - logp
            far = tl.exp2((q + d) * LOG2E)
            dkl = tl.where(held, -tl.where(q > 20.0, far, grown * low * high), -q * low * high)
            kl = tl.where(q > 20.0, far * (1.0 - (1.0 + q) * tl.exp2(-q * LOG2E)), kl * low * high)
    return loss, dloss, kl, dkl, ratio


@triton.jit
def advantage_of(row, advantages, seq):
    """That of a row, or with `seq` that of its sequence."""
    if seq is not None:
        return tl.load(advantages + tl.load(seq + row))
    else:
        return tl.load(advantages + row)


@triton.jit
def token_objective(row, scores, advantage, token, spec, out):
    """Write to `out`, a `TokenLoss`, what one token gives, and return its (g, h).

    scores: (logp, lse, entropy) of the row. token, spec: `TokenRows` and `TokenSpec`, as the kernel has them.
    """
    logp, lse, entropy = scores
    d = tl.where(logp == logp, 0.0, logp)  # 0, or NaN
    if token.old is not None:
        d = logp - tl.load(token.old + row)
    ref = logp
    if token.ref is not None:
        ref = tl.load(token.ref + row)
    loss, dloss, kl, dkl, ratio = _objective(logp, d, ref, advantage, spec)
    factor = tl.load(token.weight + row)
    scale = 1.0
    if token.policy_scale is not None:
        scale = tl.load(token.policy_scale + row)
    scale = tl.where(factor == 0.0, 0.0, scale)  # so that no infinity meets that of the KL
    loss = _times(loss, scale)
    dloss = _times(dloss, scale)
    if spec.beta != 0.0:
        loss += spec.beta * kl
        dloss += spec.beta * dkl
    loss = _times(loss, factor)
    g = tl.where(logp == logp, _times(dloss, factor), logp)  # also of a policy term that is linear in logp
    dentropy = 0.0
    if token.h is not None:
        dentropy = tl.load(token.h + row)
        loss += tl.where(dentropy != 0.0, dentropy * entropy, 0.0)
    write_token(row, out, loss, logp, lse, entropy, kl, ratio, g)
    return g, dentropy


@triton.jit
def write_token(row, out, loss, logp, lse, entropy, kl, ratio, g):
    tl.store(out.loss + row, loss)
    tl.store(out.logp + row, logp)
    tl.store(out.lse + row, lse)
    if out.entropy is not None:
        tl.store(out.entropy + row, entropy)
    tl.store(out.kl + row, kl)
    tl.store(out.ratio + row, ratio)
    tl.store(out.g + row, g)


@triton.jit
def group_advantage(rewards, seq, group_size, scale_by_std, GROUP: tl.constexpr):
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
