"""The losses: for each a record of its function of `Tokens`, its average, and its fused kind.

A row of logits reaches them through two numbers only, the target's logp and the row's entropy. So everything here
works on (N,) vectors, is differentiable, and is the truth that the fused kernels are tested against.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgrpo.objective.options import Objective
from fastgrpo.objective.record import LOSSES, Loss, TokenLoss, Tokens

# ---- the loss of a token


def clipped(t: Tokens) -> Tensor:
    """-min(r A, clip(r) A), r bounded by delta in the first; and where A < 0 at most -c A (dual clip)."""
    o, a = t.objective, t.advantages
    bounded = a >= 0 if o.delta is None and o.clip_ratio_c is None else a == a
    ratio = bounded_exp(t.log_ratio, _or_off(t, bounded), max(o.clip_high, o.delta or 0.0, o.clip_ratio_c or 0.0))
    unclipped = ratio if o.delta is None else ratio.clamp(max=o.delta)
    loss = -torch.minimum(unclipped * a, ratio.clamp(1 - o.epsilon, o.clip_high) * a)
    return loss if o.clip_ratio_c is None else torch.where(a < 0, torch.minimum(loss, -o.clip_ratio_c * a), loss)


def reinforce(t: Tokens) -> Tensor:
    """-A logp"""
    return -t.advantages * t.logp


def cispo(t: Tokens) -> Tensor:
    """-min(r, epsilon_high) A logp, the first factor without a gradient."""
    return -t.log_ratio.exp().clamp(max=t.objective.clip_high).detach() * t.advantages * t.logp


def cispo_clip(t: Tokens) -> Tensor:
    """-clip(r) A logp, the first factor without a gradient."""
    o = t.objective
    return -t.log_ratio.exp().clamp(1 - o.epsilon, o.clip_high).detach() * t.advantages * t.logp


def icepop(t: Tokens) -> Tensor:
    """-r A logp where r is within the clip range, else 0; r without a gradient."""
    o, ratio = t.objective, t.ratio.detach()
    dropped = (ratio <= 1 - o.epsilon) | (ratio >= o.clip_high)
    return _without(dropped, -(t.advantages * t.logp) * ratio)


def dppo_tv(t: Tokens) -> tuple[Tensor, Tensor]:
    """-min(r, c) A logp, the first factor without a gradient; 0 where the total variation has left its bounds."""
    return _weighted(t, _beyond_tv(t))


def dppo_kl(t: Tokens) -> tuple[Tensor, Tensor]:
    """-min(r, c) A logp, the first factor without a gradient; 0 where the binary KL has left its bounds."""
    o, p, old = t.objective, t.logp.detach().exp(), t.old_logp.exp()
    kl = old * (t.old_logp - t.logp.detach()) + (1 - old) * torch.log((1 - old + 1e-8) / (1 - p + 1e-8))
    up, down = (p > old) & (kl > o.clip_high), (p < old) & (kl > o.epsilon)
    return _weighted(t, torch.where(t.advantages > 0, up, down))


def dppo(t: Tokens) -> tuple[Tensor, Tensor]:
    """-r A, 0 where the total variation has left its bounds."""
    dropped = _beyond_tv(t)
    ratio = bounded_exp(t.log_ratio, _or_off(t, dropped | (t.advantages == 0)), 1.0)
    return _without(dropped, -ratio * t.advantages), dropped.to(t.mask.dtype)


def _beyond_tv(t: Tokens) -> Tensor:
    """(N,) bool: π - old has moved with the advantage, by more than the bound."""
    moved = t.logp.detach().exp() - t.old_logp.exp()
    return torch.where(t.advantages > 0, moved > t.objective.clip_high, moved < -t.objective.epsilon)


def _weighted(t: Tokens, dropped: Tensor) -> tuple[Tensor, Tensor]:
    weight = t.ratio.detach()
    weight = weight if t.objective.clip_ratio_c is None else weight.clamp(max=t.objective.clip_ratio_c)
    return _without(dropped, -(t.advantages * t.logp) * weight), dropped.to(t.mask.dtype)


def _without(dropped: Tensor, loss: Tensor) -> Tensor:
    """The loss, 0 where it is dropped; one that is no number stays."""
    return torch.where(dropped & ~loss.isnan(), 0.0, loss)


def gmpo(t: Tokens) -> Tensor:
    """-mean(A) exp(mean(log r)), each log r clipped to [-epsilon, epsilon_high] on the side that A favours."""
    o, d, sign = t.objective, t.log_ratio, t.advantages.sign()
    clip = sign * torch.minimum(sign * d, sign * d.clamp(-o.epsilon, o.clip_high))
    advantage = t.seq_mean(t.advantages)
    ratio = bounded_exp(t.seq_mean(clip), _or_off(t, advantage == 0), 1.0)
    if t.importance_ratio is not None:
        ratio = ratio * t.seq_mean((t.importance_ratio + 1e-10).log()).exp()
    return -advantage * ratio


@torch.no_grad()
def _covariance(t: Tokens) -> tuple[Tensor, Tensor]:
    """((N,) advantage times logp, each less its mean over the loss tokens; how many of them are to be chosen)."""
    n = t.mask.sum()
    apart = [x - (x * t.mask).sum() / n.clamp(min=1) for x in (t.advantages, t.logp)]
    return apart[0] * apart[1], (t.objective.cov_share * n.double()).floor().clamp(min=1)


@torch.no_grad()
def _first(keys: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """(N,) bool: those of the `count` largest keys `among` (N,) bool; without waiting for the device."""
    order = torch.where(among, keys, -torch.inf).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return among & (rank < count)


def clip_cov(t: Tokens) -> tuple[Tensor, Tensor]:
    """The clipped loss, 0 at some tokens, drawn from those of a covariance between cov_low and cov_high."""
    o, loss = t.objective, clipped(t)
    cov, count = _covariance(t)
    ratio = t.ratio.detach()
    inside = (ratio.clamp(1 - o.epsilon, o.clip_high) - ratio) * t.advantages >= 0  # not clipped
    chosen = _first(torch.rand_like(cov), (cov > o.cov_low) & (cov < o.cov_high) & inside & (t.mask > 0), count)
    return torch.where(chosen, 0.0, loss), chosen.to(t.mask.dtype)


def kl_cov(t: Tokens) -> tuple[Tensor, Tensor]:
    """-r A, plus cov_coef |log r| at the tokens of the largest covariance."""
    cov, count = _covariance(t)
    chosen = _first(cov, t.mask > 0, count)
    loss = -bounded_exp(t.log_ratio, _or_off(t, t.advantages == 0), 1.0) * t.advantages
    return torch.where(chosen, loss + t.objective.cov_coef * t.log_ratio.abs(), loss), chosen.to(t.mask.dtype)


def sapo(t: Tokens) -> Tensor:
    """-A sigmoid(τ (r - 1)) 4 / τ, with τ by the advantage's sign."""
    positive, negative = t.objective.sapo_temperature_pos, t.objective.sapo_temperature_neg
    tau = _by_sign(t.advantages > 0, positive, negative, t.logp)
    # a NaN advantage has a NaN gradient
    ratio = bounded_exp(t.log_ratio, t.advantages == t.advantages, 1e3 / min(positive, negative))
    return -t.advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau


def vespo(t: Tokens) -> tuple[Tensor, Tensor]:
    """-φ A logp, with φ of the whole sequence."""
    phi = _vespo_weight(t)
    return -phi * t.advantages * t.logp, phi


@torch.no_grad()
def _vespo_weight(t: Tokens) -> Tensor:
    """(N,) φ = exp(λ + k·log w - λ·w), w the sequence's ratio, in log space; k and λ by the advantage's sign."""
    o, layout, lowest = t.objective, t.batch.layout, math.log(1e-8)
    log_w = layout.seq_sum((t.logp - t.old_logp).clamp(-20, 20) * t.mask)
    if t.importance_ratio is not None:
        sum_is = layout.seq_sum(t.importance_ratio.log().clamp(lowest, 20))  # rows that are not scored hold log 1
        if t.batch.importance_ratio_per_sequence:  # one number, standing on each row of its sequence: count it once
            scored = torch.ones_like(t.mask) if t.scored is None else t.scored.to(t.mask.dtype)
            sum_is = sum_is / layout.seq_sum(scored).clamp(min=1)
        log_w = log_w + sum_is
    log_w = layout.to_rows(log_w.clamp(lowest, 20))
    positive = t.advantages >= 0
    k = _by_sign(positive, o.vespo_k_pos, o.vespo_k_neg, log_w)
    lam = _by_sign(positive, o.vespo_lambda_pos, o.vespo_lambda_neg, log_w).clamp(min=1e-4)
    return (lam + k * log_w - lam * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _by_sign(positive: Tensor, one: float, other: float, like: Tensor) -> Tensor:
    """One number where `positive`, else another, rounded to fp32 as in TRL and the kernels, in the dtype of `like`."""
    return torch.where(positive, torch.full_like(like, one, dtype=torch.float32), other).to(like.dtype)


def _or_off(t: Tokens, bounded: Tensor) -> Tensor:
    return bounded if t.off is None else bounded | t.off


def bounded_exp(log_ratio: Tensor, bounded: Tensor, largest: float) -> Tensor:
    """exp(log_ratio); where `bounded`, one finite number for all that is far beyond `largest`.

    There the objective does not depend on the ratio any more, but autograd would multiply its gradient, 0, by exp's
    own, which may be infinite.
    """
    top = max(math.log(torch.finfo(log_ratio.dtype).max) / 2, math.log(largest) + 1)
    return torch.where((log_ratio > top) & bounded, top, log_ratio).exp()


# ---- what is logged: the shares of tokens whose ratio is bounded


def clipped_shares(o: Objective, ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    ratio = ratio if o.delta is None else ratio.clamp(max=o.delta)
    shares = {
        "clip_ratio/low_mean": (ratio < 1 - o.epsilon) & (advantages < 0),
        "clip_ratio/high_mean": (ratio > o.clip_high) & (advantages > 0),
    }
    if o.clip_ratio_c is not None:
        shares["clip_ratio/dual_mean"] = (ratio > o.clip_ratio_c) & (advantages < 0)
    return shares


def gmpo_shares(o: Objective, ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    return {
        "clip_ratio/low_mean": (ratio < math.exp(-o.epsilon)) & (advantages < 0),
        "clip_ratio/high_mean": (ratio > math.exp(o.clip_high)) & (advantages > 0),
    }


def cispo_clip_shares(o: Objective, ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    return {"cispo_clip_ratio": (ratio < 1 - o.epsilon) | (ratio > o.clip_high)}


def icepop_shares(o: Objective, ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    return {"icepop/dropped_mean": (ratio <= 1 - o.epsilon) | (ratio >= o.clip_high)}


def cispo_shares(o: Objective, ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    return {"cispo_clip_ratio": (ratio > o.clip_high) & (advantages > 0)}


# ---- the records


class Kind(enum.IntEnum):
    """The fused objectives, as csrc/objective.h and the Triton kernels number them, and what their numbers are."""

    CLIP = 0  # lowest and highest ratio; delta and clip_ratio_c (inf: none)
    CISPO = 1  # lowest and highest factor of -A logp, which is the ratio between them
    SAPO = 2  # τ where A > 0, τ elsewhere


def _clip_numbers(o: Objective) -> tuple[float, ...]:
    return 1 - o.epsilon, o.clip_high, *(math.inf if x is None else x for x in (o.delta, o.clip_ratio_c))


def _clipped(average: str, **more: Any) -> Loss:
    return Loss(clipped, average, kind=Kind.CLIP.value, numbers=_clip_numbers, shares=clipped_shares, **more)


def _weighing(token: TokenLoss, numbers: Callable[[Objective], tuple[float, float]], **more: Any) -> Loss:
    return Loss(token, "dapo", kind=Kind.CISPO.value, numbers=numbers, **more)


def _dppo(token: TokenLoss) -> Loss:
    return Loss(token, "dapo", clip_high=lambda epsilon_high: epsilon_high, logs=("dppo/dropped_mean",))


def _by_covariance(token: TokenLoss, **more: Any) -> Loss:
    return Loss(token, "dapo", whole_batch=True, inert=False, logs=("cov/chosen_mean",), **more)


LOSSES |= {
    "grpo": _clipped("grpo"),  # arXiv:2402.03300
    "bnpo": _clipped("bnpo"),
    "dr_grpo": _clipped("dr_grpo"),  # arXiv:2503.20783
    "dapo": _clipped("dapo"),  # arXiv:2503.14476
    "luspo": _clipped("luspo"),  # arXiv:2602.05261
    "cispo": _weighing(  # arXiv:2506.13585
        cispo,
        lambda o: (-math.inf, o.clip_high),
        clip_high=lambda epsilon_high: epsilon_high,
        shares=cispo_shares,
    ),
    "sapo": Loss(  # arXiv:2511.20347
        sapo, "grpo", kind=Kind.SAPO.value, numbers=lambda o: (o.sapo_temperature_pos, o.sapo_temperature_neg)
    ),
    "vespo": Loss(  # arXiv:2602.10693
        vespo,
        "dapo",
        whole_sequences=True,
        takes_importance_ratio=True,
        logs=("vespo/phi_seq_mean",),
        logs_of_sequences=True,
    ),
    "reinforce": _weighing(  # RLOO arXiv:2402.14740, GPG arXiv:2504.02546
        reinforce, lambda o: (1.0, 1.0), reads_ratio=False
    ),
    "cispo_clip": _weighing(  # arXiv:2506.13585, its two-sided form
        cispo_clip, lambda o: (1 - o.epsilon, o.clip_high), shares=cispo_clip_shares
    ),
    "icepop": Loss(icepop, "dapo", shares=icepop_shares),  # arXiv:2510.18855
    "dppo_tv": _dppo(dppo_tv),  # arXiv:2602.04879
    "dppo_kl": _dppo(dppo_kl),
    "dppo": _dppo(dppo),
    "gmpo": Loss(  # arXiv:2507.20673
        gmpo,
        "grpo",
        whole_sequences=True,
        takes_importance_ratio=True,
        clip_high=lambda epsilon_high: epsilon_high,
        shares=gmpo_shares,
    ),
    "clip_cov": _by_covariance(clip_cov, shares=clipped_shares),  # arXiv:2505.22617
    "kl_cov": _by_covariance(kl_cov),
}
