"""The losses: for each a record of its function of `Tokens`, its average, and its fused kind.

A row of logits reaches them through two numbers only, the target's logp and the row's entropy. So everything here
works on (N,) vectors, is differentiable, and is the truth that the fused kernels are tested against.
"""

from __future__ import annotations

import enum
import math
from typing import Any

import torch
from torch import Tensor

from fastgrpo.objective.options import Objective
from fastgrpo.objective.record import LOSSES, Loss, Tokens

# ---- the loss of a token


def clipped(t: Tokens) -> Tensor:
    """-min(r A, clip(r) A), r bounded by delta in the first."""
    o = t.objective
    bounded = t.advantages >= 0 if o.delta is None else t.advantages == t.advantages
    if t.off is not None:
        bounded = bounded | t.off
    ratio = bounded_exp(t.log_ratio, bounded, max(o.clip_high, o.delta or 0.0))
    unclipped = ratio if o.delta is None else ratio.clamp(max=o.delta)
    clip = ratio.clamp(1 - o.epsilon, o.clip_high)
    return -torch.minimum(unclipped * t.advantages, clip * t.advantages)


def cispo(t: Tokens) -> Tensor:
    """-min(r, epsilon_high) A logp, the first factor without a gradient."""
    return -t.log_ratio.exp().clamp(max=t.objective.clip_high).detach() * t.advantages * t.logp


def sapo(t: Tokens) -> Tensor:
    """-A sigmoid(τ (r - 1)) 4 / τ, with τ by the advantage's sign."""
    positive, negative = t.objective.sapo_temperature_pos, t.objective.sapo_temperature_neg
    tau = torch.where(t.advantages > 0, positive, negative).to(t.logp.dtype)
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
    k = torch.where(positive, o.vespo_k_pos, o.vespo_k_neg).to(log_w.dtype)
    lam = torch.where(positive, o.vespo_lambda_pos, o.vespo_lambda_neg).to(log_w.dtype).clamp(min=1e-4)
    return (lam + k * log_w - lam * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


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
    return {
        "clip_ratio/low_mean": (ratio < 1 - o.epsilon) & (advantages < 0),
        "clip_ratio/high_mean": (ratio > o.clip_high) & (advantages > 0),
    }


def cispo_shares(o: Objective, ratio: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    return {"cispo_clip_ratio": (ratio > o.clip_high) & (advantages > 0)}


# ---- the records


class Kind(enum.IntEnum):
    """The fused objectives, as csrc/objective.h and the Triton kernels number them, and what their numbers are."""

    CLIP = 0  # lowest and highest ratio, delta (inf: none)
    CISPO = 1  # highest ratio
    SAPO = 2  # τ where A > 0, τ elsewhere


def _clip_numbers(o: Objective) -> tuple[float, ...]:
    return 1 - o.epsilon, o.clip_high, math.inf if o.delta is None else o.delta


def _clipped(average: str, **more: Any) -> Loss:
    return Loss(clipped, average, kind=Kind.CLIP.value, numbers=_clip_numbers, shares=clipped_shares, **more)


LOSSES |= {
    "grpo": _clipped("grpo"),  # arXiv:2402.03300
    "bnpo": _clipped("bnpo"),
    "dr_grpo": _clipped("dr_grpo"),  # arXiv:2503.20783
    "dapo": _clipped("dapo"),  # arXiv:2503.14476
    "luspo": _clipped("luspo"),  # arXiv:2602.05261
    "cispo": Loss(  # arXiv:2506.13585
        cispo,
        "dapo",
        kind=Kind.CISPO.value,
        numbers=lambda o: (o.clip_high,),
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
}
