"""Advantages of tokens: rewards to come, less a baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.advantages.gae import gae
from fastgrpo.advantages.groups import Groups, extremes, result_dtype
from fastgrpo.batch.checks import FLOATS, INTEGERS, check, check_dtype, check_tensor


def check_mask(completion_mask: Tensor, rewards: Tensor) -> Tensor:
    """(B, T) bool from a mask of bools or real numbers; a ValueError unless it fits the B completions."""
    fits = isinstance(completion_mask, Tensor) and completion_mask.dim() == 2
    count = len(rewards)
    check(
        fits and len(completion_mask) == count, "completion_mask", f"a tensor of shape ({count}, T)", completion_mask
    )
    shape = completion_mask.shape
    check_tensor("completion_mask", completion_mask, shape, rewards.device, torch.bool, *INTEGERS, *FLOATS)
    return completion_mask != 0


def at_last_token(rewards: Tensor, mask: Tensor) -> Tensor:
    """(B, T): the reward (B,) of each completion at the last token of its mask (B, T) bool, 0 elsewhere."""
    counted = mask.long().cumsum(1)
    return torch.where(mask & (counted == counted[:, -1:]), rewards[:, None], 0.0)


def whitened(x: Tensor, weight: Tensor) -> Tensor:
    """(x - mean) / √(var + 1e-8) with Bessel's correction, `weight` times each x; 0 where the weight is 0.

    Equal x give 0 exactly; where the weight is 0, x may be NaN.
    """
    if x.numel() == 0:
        return x
    counts, weight = weight > 0, weight.double()
    x, total = torch.where(counts, x, 0.0), weight.sum()
    mean = (weight * x).sum() / total.clamp(min=1)
    var = (weight * (x - mean) ** 2).sum() / (total - 1).clamp(min=1)
    highest, lowest = torch.where(counts, x, -torch.inf).max(), torch.where(counts, x, torch.inf).min()
    return torch.where(counts & (highest > lowest), (x - mean) / (var + 1e-8).sqrt(), 0.0)


def _returns(rewards: Tensor, completion_mask: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """((B, T) the discounted rewards to come, in float64; (B, T) bool, the loss tokens of judged completions)."""
    check(isinstance(rewards, Tensor) and rewards.dim() in (1, 2), "rewards", "shape (B,) or (B, T)", rewards)
    check_dtype("rewards", rewards, *FLOATS, *INTEGERS, torch.bool)
    mask = check_mask(completion_mask, rewards)
    if rewards.dim() == 1:
        judged = ~rewards.isnan()
        rewards = at_last_token(rewards.double(), mask)
    else:
        check(rewards.shape == mask.shape, "rewards", f"shape ({len(mask)},) or {tuple(mask.shape)}", rewards)
        judged = ~(rewards.isnan() & mask).any(1)
    mask = mask & judged[:, None]
    return _sum_to_come(rewards.double(), mask, gamma), mask


def _sum_to_come(x: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Σ_l γ^l x_{t+l} over the tokens of the mask: what `gae` gives where V is 0."""
    return gae(x, torch.zeros_like(x), mask, gamma, 1.0)[0]


@torch.no_grad()
def reinforce_plus_plus(rewards: Tensor, *, completion_mask: Tensor, gamma: float = 1.0) -> Tensor:
    """REINFORCE++ (arXiv:2501.03262): the rewards to come, normalised over all loss tokens of the batch.

        G_t = r_t + γ G_{t+1},   A_t = (G_t - μ) / √(σ² + 1e-8)

    with t + 1 the next loss token, and μ and σ² (Bessel's correction) over the loss tokens. No groups are needed; the
    batch must be whole in one call. With the KL in the reward: `kl_in_reward` makes the rewards of the tokens.

    Args:
        rewards (B,) or (B, T) float: of a completion, at its last loss token, or of each token. NaN: not judged, left
            out of μ and σ, A = 0; masked tokens may hold NaN.
        completion_mask (B, T): nonzero for the loss tokens.
        gamma: discount γ in [0, 1].

    Returns:
        (B, T) advantages in the rewards' dtype (fp32 for integer and half-precision rewards); 0 where masked.

    Raises:
        ValueError: names the argument, what was expected and what came.

    Equivalent to: "reinforce_plus_plus" of verl, "reinforce++" of SkyRL; "reinforce" of OpenRLHF has no Bessel's
    correction.
    """
    returns, mask = _returns(rewards, completion_mask, gamma)
    return whitened(returns, mask).to(result_dtype(rewards))


@torch.no_grad()
def remax(rewards: Tensor, baseline_rewards: Tensor, *, completion_mask: Tensor) -> Tensor:
    """ReMax (arXiv:2310.10505): the baseline is the reward of the greedy completion of the same prompt.

        A_t = G_t - r of the greedy completion,   G_t = r_t + G_{t+1}

    Args:
        rewards (B,) or (B, T) float: of a completion, at its last loss token, or of each token. NaN: not judged,
            A = 0; masked tokens may hold NaN.
        baseline_rewards (B,) float: of the greedy completion, for each sampled one. NaN: A = 0.
        completion_mask (B, T): nonzero for the loss tokens.

    Returns:
        (B, T) advantages in the rewards' dtype (fp32 for integer and half-precision rewards); 0 where masked.

    Raises:
        ValueError: names the argument, what was expected and what came.

    Equivalent to: "remax" of verl.
    """
    returns, mask = _returns(rewards, completion_mask, 1.0)
    kinds = (*FLOATS, *INTEGERS, torch.bool)
    check_tensor("baseline_rewards", baseline_rewards, rewards.shape[:1], rewards.device, *kinds)
    baseline = baseline_rewards.double()[:, None]
    return torch.where(mask & ~baseline.isnan(), returns - baseline, 0.0).to(result_dtype(rewards))


@torch.no_grad()
def optimal_token_baseline(
    rewards: Tensor,
    num_generations: int | None = None,
    *,
    completion_mask: Tensor,
    per_token_logps: Tensor,
    sum_pi_squared: Tensor,
    importance_sampling_ratio: Tensor | None = None,
    group_ids: Tensor | None = None,
) -> Tensor:
    """The optimal token baseline (OTB, arXiv:2602.07078): a baseline of each position, weighted by gradient norms.

        A_t = G_t - b_t,   b_t = Σ_j G_jt W_jt / (Σ_j W_jt + 1e-8),   W_t = Σ_{s <= t} ρ_s² (1 - 2 π_s + Σ_v π_s(v)²)

    over the completions j of the group that have a t-th loss token, with G_t the rewards to come and π_s the
    probability of the sampled token. 1 - 2π + Σπ² is the squared norm of the gradient of its logp in the logits. Where
    fewer than two completions of the group have a t-th loss token, b_t = 0. Where all of them have the same G_t,
    A_t = 0 exactly.

    Args:
        rewards (B,) or (B, T) float: of a completion, at its last loss token, or of each token. NaN: not judged, left
            out of the baseline, A = 0; masked tokens may hold NaN, here and below.
        num_generations, group_ids: as in `group_advantages`.
        completion_mask (B, T): nonzero for the loss tokens. t counts these, so holes are as if they were cut out.
        per_token_logps (B, T) float: of the sampled tokens, under the policy that sampled.
        sum_pi_squared (B, T) float: Σ of the squared probabilities of the whole vocabulary, under the same policy.
        importance_sampling_ratio (B, T) float: ρ; None: 1.

    Returns:
        (B, T) advantages in the rewards' dtype (fp32 for integer and half-precision rewards); 0 where masked.

    Raises:
        ValueError: names the argument, what was expected and what came.

    Equivalent to: "tir_optimal_token_baseline" of verl, which without holes is its "optimal_token_baseline".
    """
    returns, mask = _returns(rewards, completion_mask, 1.0)
    of_tokens = {"per_token_logps": per_token_logps, "sum_pi_squared": sum_pi_squared}
    if importance_sampling_ratio is not None:
        of_tokens["importance_sampling_ratio"] = importance_sampling_ratio
    for name, x in of_tokens.items():
        check_tensor(name, x, mask.shape, mask.device, *FLOATS)
    groups = Groups(mask.new_zeros(len(mask)), num_generations, group_ids)

    norm = (1 - 2 * per_token_logps.double().exp() + sum_pi_squared.double()).clamp(min=0)  # rounding may go below
    if importance_sampling_ratio is not None:
        norm = norm * importance_sampling_ratio.double() ** 2
    # a running sum, but in one order of additions, which torch.cumsum on a GPU does not have
    weights = _sum_to_come(norm.flip(1), mask.flip(1), 1.0).flip(1)

    # the t-th loss token of each completion in column t
    order = (~mask).long().argsort(dim=1, stable=True)
    there, g, w = (x.gather(1, order) for x in (mask, returns, weights))
    total, weighted, count = (groups.in_columns(x.double()).nansum(0) for x in (w, g * w, there))
    highest, lowest = extremes(groups.in_columns(torch.where(there, g, torch.nan)))
    baseline = torch.where(count > 1, weighted / (total + 1e-8), 0.0)
    equal = (count > 1) & (highest == lowest)

    place = (mask.long().cumsum(1) - 1).clamp(min=0)
    baseline, equal = (x[groups.index].gather(1, place) for x in (baseline, equal))
    return torch.where(mask & ~equal, returns - baseline, 0.0).to(result_dtype(rewards))
