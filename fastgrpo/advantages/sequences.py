"""Advantages of whole completions: one reward and one advantage each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgrpo.advantages.groups import Groups, check_epsilon, check_scale_rewards, group_advantages, result_dtype
from fastgrpo.advantages.tokens import check_mask, whitened
from fastgrpo.batch.checks import FLOATS, INTEGERS, check, check_dtype, wrong


@torch.no_grad()
def rloo(rewards: Tensor, num_generations: int | None = None, *, group_ids: Tensor | None = None) -> Tensor:
    """REINFORCE leave-one-out (RLOO, arXiv:2402.14740): the baseline is the mean of the group's other rewards.

        A = r - mean of the others = K / (K - 1) · (r - mean of the group)

    with K the rewards of the group that are not NaN. A completion that is alone gets A = 0.

    Args:
        rewards, num_generations, group_ids: as in `group_advantages`; NaN: not judged, A = 0.

    Returns:
        (B,) advantages in the rewards' dtype (fp32 for integer and half-precision rewards).

    Raises:
        ValueError: names the argument, what was expected and what came.

    Equivalent to: "rloo" of verl and SkyRL for groups of two or more; verl leaves the reward of a single completion.
    """
    groups = Groups(rewards, num_generations, group_ids)
    factor = groups.count.double() / (groups.count - 1).clamp(min=1)
    return groups.result((groups.rewards - groups.mean[groups.index]) * factor[groups.index])


@torch.no_grad()
def opo(
    rewards: Tensor,
    num_generations: int | None = None,
    *,
    completion_mask: Tensor,
    group_ids: Tensor | None = None,
) -> Tensor:
    """On-policy optimisation with the optimal baseline (OPO, arXiv:2505.23585): rewards weighted by length.

        A = r - Σ_j |o_j| r_j / Σ_j |o_j|

    over the group, |o| being the number of loss tokens. Where no completion of a group has one, A = 0.

    Args:
        rewards, num_generations, group_ids: as in `group_advantages`; NaN: not judged, A = 0.
        completion_mask (B, T): nonzero for the loss tokens.

    Returns:
        (B,) advantages in the rewards' dtype (fp32 for integer and half-precision rewards).

    Raises:
        ValueError: names the argument, what was expected and what came.

    Equivalent to: "opo" of verl for groups of two or more.
    """
    groups = Groups(rewards, num_generations, group_ids)
    lengths = check_mask(completion_mask, rewards).sum(1).double()
    lengths = groups.in_columns(torch.where(groups.rewards.isnan(), 0.0, lengths))
    baseline = (lengths * groups.columns).nansum(0) / lengths.nansum(0)
    return groups.result(groups.rewards - baseline[groups.index])


@torch.no_grad()
def reinforce_plus_plus_baseline(
    rewards: Tensor,
    num_generations: int | None = None,
    *,
    completion_mask: Tensor,
    group_ids: Tensor | None = None,
) -> Tensor:
    """REINFORCE++ with a baseline (arXiv:2501.03262): less the group's mean, then normalised over all loss tokens.

        a = r - mean of the group,   A = (a - μ) / √(σ² + 1e-8)

    with μ and σ² (Bessel's correction) over the loss tokens of the batch, each with its completion's a. The batch must
    be whole in one call.

    Args:
        rewards, num_generations, group_ids: as in `group_advantages`; NaN: not judged, left out of μ and σ, A = 0.
        completion_mask (B, T): nonzero for the loss tokens. A completion without one gets A = 0.

    Returns:
        (B,) advantages in the rewards' dtype (fp32 for integer and half-precision rewards).

    Raises:
        ValueError: names the argument, what was expected and what came.

    Equivalent to: "reinforce_plus_plus_baseline" of verl for groups of two or more.
    """
    groups = Groups(rewards, num_generations, group_ids)
    lengths = check_mask(completion_mask, rewards).sum(1)
    centred = groups.result(groups.rewards - groups.mean[groups.index], torch.float64)
    return whitened(centred, torch.where(groups.rewards.isnan(), 0, lengths)).to(groups.dtype)


@torch.no_grad()
def gpg(
    rewards: Tensor,
    num_generations: int | None = None,
    *,
    valid: str = "nonzero",
    group_ids: Tensor | None = None,
) -> Tensor:
    """Group policy gradient (GPG, arXiv:2504.02546): no division by a std, but a factor for the whole batch.

        A = B / M · (r - mean of the group)

    where M counts valid completions, 1 at least. The batch must be whole in one call.

    Args:
        rewards, num_generations, group_ids: as in `group_advantages`; NaN: not judged, not in B or M, A = 0.
        valid: "nonzero": M counts rewards that are not 0, as verl does. "unequal": M counts the completions whose
            group has two different rewards, those with a gradient, as the paper does.

    Returns:
        (B,) advantages in the rewards' dtype (fp32 for integer and half-precision rewards).

    Raises:
        ValueError: names the argument, what was expected and what came.

    Equivalent to: "gpg" of verl for groups of two or more.
    """
    groups = Groups(rewards, num_generations, group_ids)
    if valid not in ("nonzero", "unequal"):
        raise wrong("valid", "one of nonzero, unequal", valid)
    counts = groups.rewards != 0 if valid == "nonzero" else (groups.highest != groups.lowest)[groups.index]
    counts = (counts & ~groups.rewards.isnan()).sum().clamp(min=1)
    return groups.result(groups.judged().double() / counts * (groups.rewards - groups.mean[groups.index]))


@torch.no_grad()
def maxrl(
    rewards: Tensor,
    num_generations: int | None = None,
    *,
    epsilon: float = 1e-6,
    group_ids: Tensor | None = None,
) -> Tensor:
    """Maximum likelihood reinforcement learning (MaxRL, arXiv:2602.02710): divided by the mean, for rewards >= 0.

        A = (r - mean of the group) / (mean of the group + epsilon)

    Args:
        rewards, num_generations, group_ids: as in `group_advantages`; NaN: not judged, A = 0.
        epsilon: added to the mean.

    Returns:
        (B,) advantages in the rewards' dtype (fp32 for integer and half-precision rewards).

    Raises:
        ValueError: names the argument, what was expected and what came.

    Equivalent to: "maxrl" of SkyRL for groups of two or more.
    """
    groups = Groups(rewards, num_generations, group_ids)
    check_epsilon(epsilon)
    mean = groups.mean[groups.index]
    return groups.result((groups.rewards - mean) / (mean + epsilon))


@torch.no_grad()
def best_of_group(
    rewards: Tensor,
    num_generations: int | None = None,
    *,
    scale_rewards: str = "group",
    epsilon: float = 1e-6,
    group_ids: Tensor | None = None,
) -> Tensor:
    """Only the best completion of a group learns, from its lead on the second best (arXiv:2503.19595):

        A = (r - r of the second best) / (std + epsilon) for the best,   A = 0 for the others

    It is what the best completion adds to the highest reward of the group. Two equal best ones add nothing: A = 0.

    Args:
        rewards, num_generations, group_ids: as in `group_advantages`; NaN: not judged, A = 0.
        scale_rewards: whose std it is (Bessel's correction), "group", "batch" or "none", as in `group_advantages`.
        epsilon: added to the std.

    Returns:
        (B,) advantages in the rewards' dtype (fp32 for integer and half-precision rewards).

    Raises:
        ValueError: names the argument, what was expected and what came.

    Equivalent to: "grpo_passk" of verl for groups of two or more.
    """
    groups = Groups(rewards, num_generations, group_ids)
    check_scale_rewards(scale_rewards)
    check_epsilon(epsilon)
    if groups.size == 1:
        return groups.result(torch.zeros_like(groups.rewards))
    second = groups.columns.nan_to_num(nan=-torch.inf).sort(0, descending=True).values[1]
    best = groups.rewards == groups.highest[groups.index]
    lead = torch.where(best, groups.rewards - second[groups.index], 0.0)
    return groups.result(groups.scaled(lead, scale_rewards, epsilon))


@torch.no_grad()
def pass_at_k(
    rewards: Tensor,
    num_generations: int | None = None,
    *,
    k: int,
    epsilon: float = 1e-6,
    group_ids: Tensor | None = None,
) -> Tensor:
    """Pass@k training (arXiv:2508.10751): the reward of k completions is that of the best of them.

        A_i = (mean of max(r of S) over the sets S with i in them - μ) / (σ + epsilon)

    with S all sets of k completions of the group, and μ, σ the mean and the std (no correction) of max(r of S) over
    all of them; in closed form, from the order of the rewards. For rewards of 0 and 1, where f of n completions have
    0, μ = 1 - C(f, k) / C(n, k), σ² = μ (1 - μ), and

        A = (1 - μ) / σ for a reward of 1,   (1 - μ - C(f - 1, k - 1) / C(n - 1, k - 1)) / σ for a reward of 0

    Where every S has the same best reward, A = 0 exactly. k = 1 is group normalisation with the uncorrected std.

    Args:
        rewards, num_generations, group_ids: as in `group_advantages`, of any values; NaN: not judged, A = 0.
        k: how many completions of the group are tried; below the size of a group.
        epsilon: added to σ.

    Returns:
        (B,) advantages in the rewards' dtype (fp32 for integer and half-precision rewards).

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    groups = Groups(rewards, num_generations, group_ids)
    check_epsilon(epsilon)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k < max(groups.size, 2):
        raise wrong("k", f"an integer >= 1, below the size of a group, {groups.size}", k)

    # j counts rewards from the lowest one, 1; NaN come last, beyond n. Centred: rounding is that of the spread.
    ordered, order = (groups.columns - groups.mean).sort(dim=0, stable=True)
    j = torch.arange(1, groups.size + 1, dtype=torch.float64, device=rewards.device)[:, None]
    n, x = groups.count.double(), ordered.nan_to_num(nan=0.0)
    of_all = torch.where(j <= n, _choose_ratio(j - 1, k - 1, n, k), 0.0)  # the share of all S with j as their best
    mean = (of_all * x).sum(0)
    std = (of_all * (x - mean) ** 2).sum(0).sqrt()
    is_best = _choose_ratio(j - 1, k - 1, n - 1, k - 1) * x  # of all S with i = j in them
    other_best = _choose_ratio(j - 2, k - 2, n - 1, k - 1) * x  # of those with an i < j
    above = torch.ones(groups.size, groups.size, dtype=x.dtype, device=x.device).triu(1)
    advantages = (is_best + above @ other_best - mean) / (std + epsilon)
    # the k-th lowest is the lowest that can be a best one
    learns = (j <= n) & (ordered[min(k, groups.size) - 1] < groups.highest - groups.mean)
    advantages = torch.where(learns, advantages, 0.0)
    return groups.result(groups.of_columns(advantages.gather(0, order.argsort(0))))


def _choose_ratio(a: Tensor, b: int, c: Tensor, d: int) -> Tensor:
    """C(a, b) / C(c, d); C is 0 for b < 0 and for a < b."""

    def log(n: Tensor, k: int) -> Tensor:
        if k < 0:
            return torch.full_like(n, -torch.inf)
        log = (n + 1).lgamma() - (n - k + 1).lgamma() - torch.full_like(n, k + 1).lgamma()
        return torch.where(n >= k, log, -torch.inf)

    return (log(a, b) - log(c, d)).exp()


@torch.no_grad()
def gdpo(
    rewards: Tensor,
    num_generations: int | None = None,
    *,
    weights: Tensor | Sequence[float] | None = None,
    completion_mask: Tensor | None = None,
    epsilon: float = 1e-4,
    group_ids: Tensor | None = None,
) -> Tensor:
    """Group reward-decoupled normalisation (GDPO, arXiv:2601.05242): each function's rewards are normalised alone.

        a = Σ_f w_f (r_f - mean of the group) / (std of the group + epsilon)
        A = (a - mean of the batch) / (std of the batch + epsilon)

    With `completion_mask`, the last step is over the loss tokens of the batch, each with its completion's a:
    A = (a - μ) / √(σ² + 1e-8). The stds have Bessel's correction; the batch must be whole in one call.

    Args:
        rewards (B, F) float: one reward per completion and function. NaN: the function has no say about it; where none
            has, A = 0.
        num_generations, group_ids: as in `group_advantages`.
        weights (F,): of the functions; None: 1 each.
        completion_mask (B, T): nonzero for the loss tokens.
        epsilon: added to the stds.

    Returns:
        (B,) advantages in the rewards' dtype (fp32 for integer and half-precision rewards).

    Raises:
        ValueError: names the argument, what was expected and what came.

    Equivalent to: multi_objective_aggregation="normalize_then_sum" of TRL; "gdpo" of verl with the mask and
    epsilon=1e-6.
    """
    check(isinstance(rewards, Tensor) and rewards.dim() == 2, "rewards", "a tensor of shape (B, F)", rewards)
    dtype, number = result_dtype(rewards), rewards.shape[1]
    check(number > 0, "rewards", "a tensor of shape (B, F) with F > 0", rewards)
    check_dtype("rewards", rewards, *FLOATS, *INTEGERS, torch.bool)
    weights = torch.as_tensor([1.0] * number if weights is None else weights, dtype=torch.float64)
    weights = weights.to(rewards.device)
    check(weights.shape == (number,), "weights", f"{number} numbers, one for each function", weights)
    # of a completion without a say: 0, the mean of the group
    each = [
        group_advantages(column.double(), num_generations, group_ids=group_ids, epsilon=epsilon)
        for column in rewards.unbind(1)
    ]
    unjudged = rewards.isnan().all(1)
    total = (torch.stack(each, dim=1) * weights).sum(1)
    if completion_mask is None:
        total = total.masked_fill(unjudged, torch.nan)
        whole = max(total.numel(), 1)
        return group_advantages(total, whole, scale_rewards="batch", epsilon=epsilon).to(dtype)
    lengths = check_mask(completion_mask, rewards).sum(1)
    return whitened(total, torch.where(unjudged, 0, lengths)).to(dtype)
