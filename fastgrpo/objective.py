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
    """Every option of the loss, with TRL 1.16's names and defaults; checked on construction.

    docs/objectives.md has each loss as a formula.

    Args:
        loss_type: the loss of a token, and how tokens are averaged. The loss is the clipped ratio for "grpo"
            (arXiv:2402.03300), "bnpo", "dr_grpo" (arXiv:2503.20783), "dapo" (arXiv:2503.14476) and "luspo"
            (arXiv:2602.05261), which differ in the average. "cispo" (arXiv:2506.13585), "sapo" (arXiv:2511.20347)
            and "vespo" (arXiv:2602.10693) have losses of their own.
        importance_sampling_level: what the ratio is of: "token"; "sequence" (GSPO, arXiv:2507.18071); or
            "sequence_token" (GSPO-token), which has the value of the sequence's ratio and the gradient of the token's.
        beta: coefficient of the KL to the reference policy, estimated by k3; 0: no reference is needed.
        epsilon: the ratio is clipped at 1 - epsilon from below.
        epsilon_high: the ratio is clipped at 1 + epsilon_high from above; None: as epsilon. For "cispo" it is the
            bound itself.
        delta: bound of the unclipped ratio from above (two-sided clipping, arXiv:2505.07291); None: none.
        use_bias_correction_kl: multiply the KL estimate by the ratio (DeepSeek-V3.2, arXiv:2512.02556).
        entropy_coef: coefficient of the mean entropy, which is subtracted from the loss.
        top_entropy_quantile: share of the tokens, those of highest entropy, that have a policy gradient
            (arXiv:2506.01939); 1: all.
        off_policy_mask_threshold: sequences of negative advantage have no policy gradient if their mean of
            sampler's logp - logp exceeds it (DeepSeek-V3.2); None: all have.
        max_completion_length: the constant that "dr_grpo" divides by, and needs.
        sapo_temperature_pos, sapo_temperature_neg: temperatures of SAPO's gate, by the advantage's sign.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: parameters of VESPO's weight, by the advantage's
            sign.

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
        """An objective with the settings of a paper.

        Args:
            name: "grpo-paper", "dapo", "dr_grpo", "bnpo", "gspo", "gspo-token", "luspo", "cispo", "sapo" or "vespo".
            **overrides: options that take other values than the paper's.

        Raises:
            ValueError: another name, or an option's bad value.
        """
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
    return weight if _is_one(batch.loss_scale) else weight * batch.loss_scale


def _is_one(factor: Tensor | float) -> bool:
    return not isinstance(factor, Tensor) and factor == 1


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

    def log_ratio_of(logps: Tensor) -> Tensor:
        if o.importance_sampling_level == "token":
            return logps - old
        mean = seq_mean(logps - old)
        return mean if o.importance_sampling_level == "sequence" else mean.detach() + (logps - logps.detach())

    log_ratio = log_ratio_of(logps)
    factors, entropy_mask = [], None  # of the policy term alone
    if o.off_policy_mask_threshold is not None:
        sampling = old if batch.sampling is None else batch.scored_only(batch.sampling)
        drift = seq_mean(torch.nan_to_num(sampling - logps.detach(), nan=0.0))
        factors.append((advantages >= 0) | (drift <= o.off_policy_mask_threshold))
    if o.top_entropy_quantile < 1:
        entropy_mask = high_entropy_mask(entropies, batch.mask, 1 - o.top_entropy_quantile)
        factors.append(entropy_mask)
    if is_ratio is not None and o.loss_type != "vespo":
        factors.append(is_ratio)

    phi, numbers = None, advantages == advantages  # a NaN advantage has a NaN gradient
    if o.loss_type == "cispo":
        loss = -log_ratio.exp().clamp(max=o.clip_high).detach() * advantages * logps
    elif o.loss_type == "sapo":
        tau = torch.where(advantages > 0, o.sapo_temperature_pos, o.sapo_temperature_neg).to(logps.dtype)
        saturated = 1e3 / min(o.sapo_temperature_pos, o.sapo_temperature_neg)
        loss = -advantages * torch.sigmoid(tau * (_exp(log_ratio, numbers, saturated) - 1)) * 4 / tau
    elif o.loss_type == "vespo":
        phi = _vespo_weight(o, (logps - old).detach(), is_ratio, batch)
        loss = -phi * advantages * logps
    else:
        bounded = advantages >= 0 if o.delta is None else numbers
        for factor in factors:
            bounded = bounded | (factor == 0)
        ratio = _exp(log_ratio, bounded, max(o.clip_high, o.delta or 0.0))
        unclipped = ratio if o.delta is None else ratio.clamp(max=o.delta)
        clipped = ratio.clamp(1 - o.epsilon, o.clip_high)
        loss = -torch.minimum(unclipped * advantages, clipped * advantages)

    for factor in factors:
        loss = loss * factor
    kl = None
    if o.beta != 0:
        ref = batch.scored_only(batch.ref)
        if o.use_bias_correction_kl:
            # in float64 up to the logps: its derivatives cancel, and are as large as exp(ref - logps) themselves
            wide = logps.double()
            kl = _kl_times_ratio(ref - wide, log_ratio_of(wide)).to(logps.dtype)
        else:
            diff = ref - logps
            kl = torch.expm1(diff) - diff  # exp(d) - 1 - d without its cancellation
        loss = loss + o.beta * kl

    total = (loss * weight).sum()
    h = entropy_weight(o, batch, entropy_mask)
    bonus = None
    if h is not None:
        bonus = (h * batch.scored_only(entropies)).sum()
        total, bonus = total + bonus, bonus.detach()
    ratio = log_ratio.detach().exp()
    return Terms(total, ratio, None if kl is None else kl.detach(), phi, bonus)


def _exp(log_ratio: Tensor, bounded: Tensor, largest: float) -> Tensor:
    """exp(log_ratio); where `bounded`, one finite number for all that is far beyond `largest`.

    There the objective does not depend on the ratio any more, but autograd would multiply its gradient, 0, by exp's
    own, which may be infinite.
    """
    top = max(math.log(torch.finfo(log_ratio.dtype).max) / 2, math.log(largest) + 1)
    return torch.where((log_ratio > top) & bounded, top, log_ratio).exp()


def _kl_times_ratio(d: Tensor, log_ratio: Tensor) -> Tensor:
    """exp(x) (exp(d) - 1 - d), which is exp(x + d) (1 - (1 + d) exp(-d)): a ratio near 0 beside a large exp(d)."""
    n = torch.where(d > 0, -d, d)
    share = torch.where(d > 0, n * n.exp() - torch.expm1(n), torch.expm1(n) - n)
    return share * _exp(log_ratio + torch.where(d > 0, d, 0.0), share == 0, 1.0)


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
    o, layout, sequences = objective, batch.layout, batch.layout.num_sequences
    per_sequence = o.importance_sampling_level == "sequence" and not batch.advantages_per_token
    vectors, shares = {}, {}  # of every token; the second are 0 or 1
    if kl is not None:
        vectors["kl"] = kl
    if entropies is not None:
        vectors["entropy"] = entropies
    if o.loss_type in CLIPPED_LOSS_TYPES:
        ratio = ratio if o.delta is None else ratio.clamp(max=o.delta)
        shares["clip_ratio/low_mean"] = (ratio < 1 - o.epsilon) & (batch.advantages < 0)
        shares["clip_ratio/high_mean"] = (ratio > o.clip_high) & (batch.advantages > 0)
    elif o.loss_type == "cispo":
        shares["cispo_clip_ratio"] = (ratio > o.clip_high) & (batch.advantages > 0)
    elif phi is not None and batch.advantages_per_token:
        vectors["vespo/phi_seq_mean"] = phi

    # all of them in one table: on a GPU each operation is a launch, whatever its size
    table = torch.stack([*vectors.values(), *shares.values(), batch.mask], dim=1).to(batch.dtype)
    sums = layout.seq_sum(torch.where(batch.mask[:, None], table, 0.0))  # (S, columns); the last: the lengths
    totals, lengths = sums.sum(0), sums[:, -1:]
    means = totals / totals[-1].clamp(min=1)
    metrics = {name: means[i] for i, name in enumerate((*vectors, *shares))}
    if per_sequence and shares:
        of_sequence = sums / lengths.clamp(min=1)
        means = of_sequence.sum(0) / max(sequences, 1)
        metrics |= {name: means[len(vectors) + i] for i, name in enumerate(shares)}
    if "clip_ratio/low_mean" in shares:
        metrics["clip_ratio/region_mean"] = metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"]
        if not per_sequence:
            of_sequence = sums / lengths  # NaN for a sequence without loss tokens, which has no say in the extremes
        if sequences == 0:
            extremes = sums.new_full((2,), torch.nan)
        else:
            low, high = of_sequence[:, len(vectors)], of_sequence[:, len(vectors) + 1]
            extremes = torch.stack([low.nan_to_num(nan=torch.inf).amin(), high.nan_to_num(nan=-torch.inf).amax()])
            extremes = extremes + (extremes - extremes)  # infinite where no sequence had a say: NaN
        metrics["clip_ratio/low_min"], metrics["clip_ratio/high_max"] = extremes.unbind()
    elif phi is not None and not batch.advantages_per_token:
        metrics["vespo/phi_seq_mean"] = layout.seq_mean(phi).sum() / max(sequences, 1)
    return metrics
