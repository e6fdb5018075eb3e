"""From vectors to the loss: `compute_terms`, in plain torch, differentiable in logps and entropies."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.batch.batch import Batch
from fastgrpo.batch.layout import Layout
from fastgrpo.objective.averages import Average
from fastgrpo.objective.kl import estimate
from fastgrpo.objective.losses import bounded_exp
from fastgrpo.objective.options import Objective
from fastgrpo.objective.own import check_gradient, check_loss
from fastgrpo.objective.record import Tokens
from fastgrpo.objective.sampler import correct

_QUANTILE_LIMIT = 16_000_000  # elements; before 2.14 torch takes 2^24 at most


class Weights(NamedTuple):
    """What a row's loss and entropy are multiplied by in the loss of the whole batch; (N,) each."""

    loss: Tensor  # mask, average and loss_scale in one number
    entropy: Tensor | None  # dL/dentropy; None: no entropy bonus
    kl: Tensor | None = None  # of the KL; None: those of the loss


class Terms(NamedTuple):
    """What the objective made of a batch; vectors are (N,), `loss` is 0-dim and differentiable."""

    loss: Tensor
    ratio: Tensor  # before the delta clamp; constant within a sequence at sequence level
    kl: Tensor | None = None
    logged: tuple[Tensor, ...] = ()  # weights, constant within a sequence, for the record's `logs`
    bonus: Tensor | None = None  # the entropy bonus as it stands in the loss; None without one

    def in_fp32(self) -> Terms:
        """The same, the loss in fp32."""
        return Terms(self.loss.to(torch.float32), *self[1:])

    def columns(self) -> list[Tensor]:
        """The vectors, as `term_columns` names them."""
        return [self.ratio, *([] if self.kl is None else [self.kl]), *self.logged]


def term_columns(o: Objective) -> list[str]:
    """The vectors that the terms of an objective have."""
    return ["ratio", *["kl"] * (o.beta != 0), *o.record.logs]


def row_weights(o: Objective, batch: Batch) -> Weights:
    """The weights of a batch's rows."""
    mask = batch.mask.to(batch.dtype)

    def weights(average: Average) -> Tensor:
        weight = average.weights(o, batch, mask)
        if batch.token_weights is not None:
            weight = weight * only_where(batch.mask, batch.token_weights)
        return weight * batch.loss_scale if isinstance(batch.loss_scale, Tensor) or batch.loss_scale != 1 else weight

    weight, kl, entropy = weights(o.averaging), None, None
    if o.kl_averaging is not None:
        kl = weights(o.kl_averaging)
    if o.entropy_coef != 0:
        entropy = mask * (-o.entropy_coef * batch.loss_scale) / mask.sum().clamp(min=1)
    return Weights(weight, entropy, kl)


class _Watched(torch.autograd.Function):
    """x, whose gradient is NaN where x is: a loss such as -A·logp has a finite one in a logp that is no number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.where(x.isnan(), x, gradient)


class _OnPolicy(torch.autograd.Function):
    """x - sg(x): 0, with the gradient of x; also where x is -inf. NaN where x is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.where(x.isnan(), x, 0.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def only_where(scored: Tensor | None, x: Tensor, fill: float = 0.0) -> Tensor:
    """`x`, with `fill` in the rows that are not scored, whose values may be NaN; None: all rows are."""
    return x if scored is None else torch.where(scored, x, fill)


def compute_terms(
    o: Objective, batch: Batch, logps: Tensor, entropies: Tensor | None, weights: Weights, scored: Tensor | None
) -> Terms:
    """The objective of a batch from its logps and entropies (N,); differentiable in both.

    Rows that are not `scored` (N,) bool may hold anything in any input; they add exactly 0. None: all are scored.
    """
    t = _tokens(o, batch, logps, entropies, scored)
    factors, high = _factors(t)
    off = functools.reduce(torch.logical_or, [factor == 0 for factor in (weights.loss, *factors)])
    t = dataclasses.replace(t, off=off)
    made = o.record.token(t)
    loss, *logged = made if isinstance(made, tuple) else (made,)
    check_loss(loss, o.loss_name, t.logp)
    check_gradient(loss, o.loss_name, t.logp)
    loss = torch.where(off & loss.isinf(), 0.0, loss)
    for factor in factors:
        loss = loss * factor
    if o.log_ratio_penalty != 0:
        loss = loss + o.log_ratio_penalty * (t.logp - t.old_logp).square()
    kl = None if o.beta == 0 else _kl(t, weights.loss if weights.kl is None else weights.kl)
    if kl is not None and weights.kl is None:
        loss = loss + o.beta * kl

    total, h, bonus = _sum(loss, weights.loss), weights.entropy, None
    if kl is not None and weights.kl is not None:
        total = total + _sum(o.beta * kl, weights.kl)
    if h is not None:
        if high is not None:
            h = h * high * (t.mask.sum().clamp(min=1) / (t.mask * high).sum().clamp(min=1))
        assert t.entropies is not None  # as needs_entropy says
        bonus = (h * t.entropies).sum()
        total, bonus = total + bonus, bonus.detach()
    return Terms(total, t.log_ratio.detach().exp(), None if kl is None else kl.detach(), tuple(logged), bonus)


def _sum(x: Tensor, weights: Tensor) -> Tensor:
    """Σ weights · x, where a weight of 0 takes out an infinite x, too."""
    return (torch.where((weights == 0) & x.isinf(), 0.0, x) * weights).sum()


def _tokens(o: Objective, batch: Batch, logps: Tensor, entropies: Tensor | None, scored: Tensor | None) -> Tokens:
    """What the loss of a token may read, of a batch with harmless numbers in the rows that are not scored."""

    def given(x: Tensor | None, fill: float = 0.0) -> Tensor | None:
        return None if x is None else only_where(scored, x, fill)

    mask, logps = batch.mask.to(batch.dtype), _Watched.apply(only_where(scored, logps))
    old, sampling, ratio = given(batch.old), given(batch.sampling), batch.importance_ratio
    on_policy = old is None
    old = logps.detach() if old is None else old
    known = old if sampling is None else torch.where(sampling.isnan(), old, sampling)
    if o.ratio_anchor == "sampling" and sampling is not None:
        old, on_policy = known, False
    if o.corrections is not None:  # of the current policy; others were made before
        assert sampling is not None  # as check_objective says
        ratio = correct(o.corrections, batch.layout, batch.mask, logps.detach(), sampling).weight
    return Tokens(
        objective=o,
        batch=batch,
        logp=logps,
        old_logp=old,
        sampling_logp=known,
        log_ratio=_log_ratio(o, batch.layout, mask, logps, None if on_policy else old),
        advantages=only_where(scored, batch.row_advantages()),
        mask=mask,
        importance_ratio=given(ratio, fill=1.0),
        reference=given(batch.ref),
        entropies=given(entropies),
        on_policy=on_policy,
        scored=scored,
    )


def _factors(t: Tokens) -> tuple[list[Tensor], Tensor | None]:
    """(the factors (N,) of the policy term alone, of which one may be (N,) bool, the tokens of high entropy)."""
    o, factors, high = t.objective, [], None
    if o.off_policy_mask_threshold is not None:
        drift = torch.nan_to_num(t.sampling_logp - t.logp.detach(), nan=0.0)
        if t.batch.sampling is not None:
            drift = torch.where(t.batch.sampling.isnan(), 0.0, drift)  # as in TRL
        mean = _seq_mean(t.batch.layout, t.mask, drift)
        factors.append((t.advantages >= 0) | (mean <= o.off_policy_mask_threshold))
    if o.top_entropy_quantile < 1:
        assert t.entropies is not None  # as needs_entropy says
        high = high_entropy_mask(t.entropies, t.batch.mask, 1 - o.top_entropy_quantile)
        factors.append(high)
    if t.importance_ratio is not None and not o.record.takes_importance_ratio:
        factors.append(t.importance_ratio)
    return factors, high


def _seq_mean(layout: Layout, mask: Tensor, x: Tensor) -> Tensor:
    """The mean over the loss tokens of each sequence, on its rows."""
    return layout.to_rows(layout.seq_sum(x * mask) / layout.seq_sum(mask).clamp(min=1))


def _log_ratio(o: Objective, layout: Layout, mask: Tensor, logps: Tensor, old: Tensor | None) -> Tensor:
    """(N,) the logarithm of the ratio of the objective's level; without `old` to the current policy itself."""
    ratio, bound, lowest = _OnPolicy.apply(logps) if old is None else logps - old, o.log_ratio_clamp, None
    if o.importance_sampling_level == "token":
        lowest = None if bound is None else -bound
    else:
        mean = _seq_mean(layout, mask, ratio)
        ratio = mean if o.importance_sampling_level == "sequence" else mean.detach() + _OnPolicy.apply(logps)
    return ratio if bound is None else _Watched.apply(ratio).clamp(lowest, bound)


def _kl(t: Tokens, weights: Tensor) -> Tensor:
    """(N,) the estimate of the KL to the reference policy, or that times the ratio; no gradient with a weight of 0."""
    o, ref, off = t.objective, t.reference, weights == 0
    assert ref is not None  # as check_objective says

    def cut(x: Tensor) -> Tensor:
        return torch.where(off, x.detach(), x)  # autograd would multiply 0 by what may be infinite

    def log_ratio(logps: Tensor) -> Tensor:
        if o.kl_anchor == "current":
            return _OnPolicy.apply(logps)
        return _log_ratio(o, t.batch.layout, t.mask, logps, None if t.on_policy else t.old_logp)

    if not o.use_bias_correction_kl:
        return estimate(o.kl_estimator, ref - cut(t.logp), o.kl_log_ratio_clamp, o.kl_clamp)
    # in float64 up to the logps: its derivatives cancel, and are as large as exp(ref - logps) themselves
    wide = t.logp.double()
    d, log_r = ref - cut(wide), cut(log_ratio(wide))
    if o.kl_estimator == "k3" and o.kl_log_ratio_clamp is None:
        kl = _kl_times_ratio(d, log_r)
    else:
        kl = estimate(o.kl_estimator, d, o.kl_log_ratio_clamp)
        kl = kl * bounded_exp(log_r, kl == 0, 1.0)
    return (kl if o.kl_clamp is None else kl.clamp(-o.kl_clamp, o.kl_clamp)).to(t.logp.dtype)


def _kl_times_ratio(d: Tensor, log_ratio: Tensor) -> Tensor:
    """exp(x) (exp(d) - 1 - d), which is exp(x + d) (1 - (1 + d) exp(-d)): a ratio near 0 beside a large exp(d)."""
    n = torch.where(d > 0, -d, d)
    share = torch.where(d > 0, n * n.exp() - torch.expm1(n), torch.expm1(n) - n)
    return share * bounded_exp(log_ratio + torch.where(d > 0, d, 0.0), share == 0, 1.0)


def high_entropy_mask(entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
    """(N,) bool: the masked tokens whose entropy is at least the `threshold` quantile of the masked entropies.

    The quantile is torch's, whose rounding depends on its version; but for any number of tokens, and without a host
    sync.
    """
    if entropies.numel() == 0:
        return mask
    values = entropies.detach()
    if values.numel() <= _QUANTILE_LIMIT:
        quantile = torch.nanquantile(torch.where(mask, values, torch.nan), threshold)
    else:  # as torch from 2.14 on
        ordered = torch.where(mask, values, torch.inf).sort().values
        share = torch.full((), threshold, dtype=torch.float32, device=mask.device)
        rank = share.double() * (mask.sum() - 1).clamp(min=0)
        below = rank.floor()
        low, high = (ordered.gather(0, index.long().view(1)) for index in (below, rank.ceil()))
        quantile = torch.where(low == high, low, torch.lerp(low, high, (rank - below).to(ordered.dtype)))
    return (entropies >= quantile) & mask
