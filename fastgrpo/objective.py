"""The GRPO objective: its options, and its mathematics in plain torch.

A row of logits reaches the objective through two numbers only, the target's logp and the row's entropy. So everything
here works on (N,) vectors, is differentiable, and is the truth that the fused kernels are tested against.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastgrpo.layout import Batch

CLIPPED_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED_LOSS_TYPES, "cispo", "sapo", "vespo")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "sequence_token")
_QUANTILE_LIMIT = 16_000_000  # elements; before 2.14 torch takes 2^24 at most

_PRESETS = {
    "grpo-paper": dict(loss_type="grpo", beta=0.04, use_bias_correction_kl=False),  # arXiv:2402.03300
    "dapo": dict(loss_type="dapo", epsilon_high=0.28),  # arXiv:2503.14476
    "dr_grpo": dict(loss_type="dr_grpo"),  # arXiv:2503.20783; needs max_completion_length
    "bnpo": dict(loss_type="bnpo"),
    # arXiv:2507.18071
    "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
    "gspo-token": dict(loss_type="grpo", importance_sampling_level="sequence_token", epsilon=3e-4, epsilon_high=4e-4),
    "luspo": dict(loss_type="luspo", importance_sampling_level="sequence", epsilon=2e-3, epsilon_high=2.5e-3),
    "cispo": dict(loss_type="cispo", epsilon_high=5.0),  # arXiv:2506.13585
    "sapo": dict(loss_type="sapo"),  # arXiv:2511.20347
    "vespo": dict(loss_type="vespo"),
}


@dataclass(frozen=True)
class Objective:
    """Every option of the objective, with TRL's names and defaults; checked on construction.

    Args:
        loss_type: how tokens are scored and averaged: "grpo", "bnpo", "dr_grpo", "dapo", "luspo" (clipped ratio,
            five averages), "cispo", "sapo", "vespo".
        importance_sampling_level: the ratio of "token", "sequence" (GSPO) or "sequence_token" (GSPO-token: value of
            the sequence's ratio, gradient of the token's).
        beta: coefficient of the k3 KL estimate to the reference policy; 0 needs no reference.
        epsilon: lower clip range, ratio >= 1 - epsilon.
        epsilon_high: upper clip range, ratio <= 1 + epsilon_high (None: epsilon). For "cispo" it is the cap itself.
        delta: second, upper clip of the unclipped ratio (two-sided clipping); None: none.
        use_bias_correction_kl: multiply the KL estimate by the ratio (DeepSeek-V3.2).
        entropy_coef: coefficient of the mean entropy that is subtracted from the loss.
        top_entropy_quantile: share of tokens, those of highest entropy, that get a policy gradient (1: all).
        off_policy_mask_threshold: drop sequences of negative advantage whose mean log ratio sampler/policy exceeds it.
        max_completion_length: the constant that "dr_grpo" divides by.
        sapo_temperature_pos, sapo_temperature_neg: SAPO's gate temperatures, by the advantage's sign.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: VESPO's gamma weights, by the advantage's sign.

    Raises:
        ValueError: names the option, what was expected and what came.
    """

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    use_bias_correction_kl: bool = True
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0
    off_policy_mask_threshold: float | None = None
    max_completion_length: int | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

        check("loss_type", self.loss_type in LOSS_TYPES, f"one of {', '.join(LOSS_TYPES)}")
        check(
            "importance_sampling_level",
            self.importance_sampling_level in IMPORTANCE_SAMPLING_LEVELS,
            f"one of {', '.join(IMPORTANCE_SAMPLING_LEVELS)}",
        )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("loss_type", "importance_sampling_level"):
                continue
            if isinstance(field.default, bool):
                check(field.name, isinstance(value, bool), "True or False")
                continue
            if value is None and field.default is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            check(field.name, number and math.isfinite(value), "a finite number")
        for name in ("beta", "epsilon"):
            check(name, getattr(self, name) >= 0, "a number >= 0")
        check("epsilon_high", self.epsilon_high is None or self.epsilon_high >= 0, "None or a number >= 0")
        check("delta", self.delta is None or self.delta > 0, "None or a number > 0")
        check("top_entropy_quantile", 0 <= self.top_entropy_quantile <= 1, "a share between 0 and 1")
        check("sapo_temperature_pos", self.sapo_temperature_pos > 0, "a number > 0")
        check("sapo_temperature_neg", self.sapo_temperature_neg > 0, "a number > 0")
        length = self.max_completion_length
        if self.loss_type == "dr_grpo":
            check("max_completion_length", length is not None and length > 0, "a number > 0 with loss_type 'dr_grpo'")
        else:
            check("max_completion_length", length is None or length > 0, "None or a number > 0")

    @classmethod
    def preset(cls, name: str, **overrides) -> Objective:
        """The options that a paper uses, "grpo-paper", "dapo", "dr_grpo", "gspo", "cispo", …, with `overrides`."""
        if name not in _PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(_PRESETS)}, got {name!r}")
        return cls(**{**_PRESETS[name], **overrides})

    @property
    def clip_high(self) -> float:
        """The upper bound of the ratio: 1 + epsilon_high, or for CISPO epsilon_high itself."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return high if self.loss_type == "cispo" else 1 + high

    @property
    def is_token_local(self) -> bool:
        """Whether a token's loss and gradient need nothing of other tokens' logits: then one pass over V is enough."""
        return (
            self.importance_sampling_level == "token"
            and self.loss_type != "vespo"
            and self.top_entropy_quantile == 1
            and self.off_policy_mask_threshold is None
        )

    @property
    def zero_advantage_is_inert(self) -> bool:
        """Whether a sequence of advantage 0 adds exactly nothing to loss and gradient."""
        return self.beta == 0 and self.entropy_coef == 0 and self.top_entropy_quantile == 1


class Terms(NamedTuple):
    """What the objective made of a batch; vectors are (N,), `loss` is 0-dim and differentiable."""

    loss: Tensor
    ratio: Tensor  # before the delta clamp; constant within a sequence at sequence level
    kl: Tensor | None
    phi: Tensor | None  # VESPO's weight, constant within a sequence
    bonus: Tensor | None  # the entropy bonus as it stands in the loss; None without one


def row_weight(objective: Objective, batch: Batch) -> Tensor:
    """(N,) factor of each row's loss: mask, aggregation and loss_scale in one number."""
    if batch.weight is not None:
        return batch.weight
    o, layout, mask = objective, batch.layout, batch.mask.to(batch.dtype)
    if o.loss_type in ("grpo", "sapo"):
        weight = mask / layout.to_rows(layout.seq_sum(mask).clamp(min=1)) / max(layout.num_sequences, 1)
    elif o.loss_type == "bnpo":
        weight = mask / mask.sum().clamp(min=1)
    elif o.loss_type == "dr_grpo":
        weight = mask / (max(layout.num_sequences, 1) * o.max_completion_length)
    elif o.loss_type == "luspo":
        weight = mask / max(layout.num_sequences, 1)
    else:  # dapo, cispo, vespo
        weight = mask / batch.num_items(mask)
    return weight * batch.loss_scale


def entropy_weight(objective: Objective, batch: Batch, entropy_mask: Tensor | None = None) -> Tensor | None:
    """(N,) dL/dentropy of each row, or None without a bonus."""
    if objective.entropy_coef == 0:
        return None
    mask = batch.mask.to(batch.dtype)
    tokens = mask.sum().clamp(min=1)
    h = mask * (-objective.entropy_coef * batch.loss_scale) / tokens if batch.h is None else batch.h
    if entropy_mask is not None:
        h = h * entropy_mask * (tokens / (mask * entropy_mask).sum().clamp(min=1))
    return h


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


def compute_objective(objective: Objective, logps: Tensor, entropies: Tensor | None, batch: Batch) -> Terms:
    """The objective of a batch from its logps and entropies (N,); differentiable in both.

    Rows that were not scored may hold anything in any input; they add exactly 0.
    """
    o, layout, advantages = objective, batch.layout, batch.scored_only(batch.advantages)
    weight = row_weight(o, batch)
    mask = batch.mask.to(batch.dtype)
    logps = batch.scored_only(logps)
    old = logps.detach() if batch.old is None else batch.scored_only(batch.old)
    is_ratio = None if batch.importance_ratio is None else batch.scored_only(batch.importance_ratio, fill=1.0)

    def seq_mean(x: Tensor) -> Tensor:  # over the loss tokens, back on the rows
        return layout.to_rows(layout.seq_sum(x * mask) / layout.seq_sum(mask).clamp(min=1))

    log_ratio = logps - old
    if o.importance_sampling_level == "token":
        ratio = log_ratio.exp()
    else:
        ratio = seq_mean(log_ratio).exp()
        if o.importance_sampling_level == "sequence_token":
            ratio = ratio.detach() * (logps - logps.detach()).exp()

    kl = phi = None
    if o.beta != 0:
        diff = batch.scored_only(batch.ref) - logps
        kl = torch.expm1(diff) - diff  # exp(d) - 1 - d without its cancellation
        if o.use_bias_correction_kl:
            kl = kl * ratio

    if o.loss_type == "cispo":
        loss = -ratio.clamp(max=o.clip_high).detach() * advantages * logps
    elif o.loss_type == "sapo":
        tau = torch.where(advantages > 0, o.sapo_temperature_pos, o.sapo_temperature_neg).to(logps.dtype)
        loss = -advantages * torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    elif o.loss_type == "vespo":
        phi = _vespo_weight(o, log_ratio.detach(), is_ratio, batch)
        loss = -phi * advantages * logps
    else:
        unclipped = ratio if o.delta is None else ratio.clamp(max=o.delta)
        clipped = ratio.clamp(1 - o.epsilon, o.clip_high)
        loss = -torch.minimum(unclipped * advantages, clipped * advantages)

    if o.off_policy_mask_threshold is not None:
        sampling = old if batch.sampling is None else batch.scored_only(batch.sampling)
        drift = seq_mean(torch.nan_to_num(sampling - logps.detach(), nan=0.0))
        loss = loss * ((advantages >= 0) | (drift <= o.off_policy_mask_threshold))
    entropy_mask = None
    if o.top_entropy_quantile < 1:
        entropy_mask = high_entropy_mask(entropies, batch.mask, 1 - o.top_entropy_quantile)
        loss = loss * entropy_mask
    if is_ratio is not None and o.loss_type != "vespo":
        loss = loss * is_ratio
    if kl is not None:
        loss = loss + o.beta * kl

    total = (loss * weight).sum()
    h = entropy_weight(o, batch, entropy_mask)
    bonus = None
    if h is not None:
        bonus = (h * batch.scored_only(entropies)).sum()
        total, bonus = total + bonus, bonus.detach()
    return Terms(total, ratio.detach(), None if kl is None else kl.detach(), phi, bonus)


@torch.no_grad()
def _vespo_weight(o: Objective, log_ratio: Tensor, is_ratio: Tensor | None, batch: Batch) -> Tensor:
    """(N,) φ = exp(λ + k·log w - λ·w), w the sequence's ratio, in log space; k and λ by the advantage's sign."""
    layout, mask, lowest = batch.layout, batch.mask.to(batch.dtype), math.log(1e-8)
    log_w = layout.seq_sum(log_ratio.clamp(-20, 20) * mask)
    if is_ratio is not None:
        log_is = is_ratio.log().clamp(lowest, 20)
        sum_is = layout.seq_sum(log_is)  # rows that are not scored hold log 1
        if batch.importance_ratio_per_sequence:  # one number, standing on each row of its sequence: count it once
            sum_is = sum_is / layout.seq_sum(batch.scored.to(batch.dtype)).clamp(min=1)
        log_w = log_w + sum_is
    log_w = layout.to_rows(log_w.clamp(lowest, 20))
    positive = batch.advantages >= 0
    k = torch.where(positive, o.vespo_k_pos, o.vespo_k_neg).to(log_w.dtype)
    lam = torch.where(positive, o.vespo_lambda_pos, o.vespo_lambda_neg).to(log_w.dtype).clamp(min=1e-4)
    return (lam + k * log_w - lam * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


@torch.no_grad()
def compute_metrics(
    objective: Objective,
    batch: Batch,
    ratio: Tensor,
    kl: Tensor | None,
    entropies: Tensor | None,
    phi: Tensor | None = None,
) -> dict[str, Tensor]:
    """TRL's metrics, 0-dim tensors: means over the loss tokens, or over sequences for one number a sequence."""
    o, layout, mask, metrics = objective, batch.layout, batch.mask.to(batch.dtype), {}
    tokens = mask.sum().clamp(min=1)
    per_sequence = o.importance_sampling_level == "sequence" and not batch.advantages_per_token

    def token_mean(x: Tensor) -> Tensor:
        return torch.where(batch.mask, x, 0.0).sum() / tokens

    if kl is not None:
        metrics["kl"] = token_mean(kl)
    if entropies is not None:
        metrics["entropy"] = token_mean(entropies)

    def sequence_mean(x: Tensor) -> Tensor:
        return layout.seq_mean(x).sum() / max(layout.num_sequences, 1)

    def mean(x: Tensor) -> Tensor:
        return sequence_mean(x) if per_sequence else token_mean(x)

    if o.loss_type in CLIPPED_LOSS_TYPES:
        ratio = ratio if o.delta is None else ratio.clamp(max=o.delta)
        low = ((ratio < 1 - o.epsilon) & (batch.advantages < 0)).to(batch.dtype)
        high = ((ratio > o.clip_high) & (batch.advantages > 0)).to(batch.dtype)
        metrics["clip_ratio/low_mean"] = mean(low)
        metrics["clip_ratio/high_mean"] = mean(high)
        metrics["clip_ratio/region_mean"] = mean(low + high)
        if per_sequence:
            low, high = layout.seq_mean(low), layout.seq_mean(high)
        else:  # 0/0 is NaN for a sequence without loss tokens, which has no say in the extremes
            lengths = layout.seq_sum(mask)
            low, high = layout.seq_sum(low * mask) / lengths, layout.seq_sum(high * mask) / lengths
        nan = torch.full((), torch.nan, dtype=batch.dtype, device=mask.device)
        if layout.num_sequences == 0:
            metrics["clip_ratio/low_min"] = metrics["clip_ratio/high_max"] = nan
        else:
            empty = low.isnan().all()
            metrics["clip_ratio/low_min"] = torch.where(empty, nan, low.nan_to_num(nan=torch.inf).min())
            metrics["clip_ratio/high_max"] = torch.where(empty, nan, high.nan_to_num(nan=-torch.inf).max())
    elif o.loss_type == "cispo":
        metrics["cispo_clip_ratio"] = mean(((ratio > o.clip_high) & (batch.advantages > 0)).to(batch.dtype))
    elif o.loss_type == "vespo":
        metrics["vespo/phi_seq_mean"] = token_mean(phi) if batch.advantages_per_token else sequence_mean(phi)
    return metrics
