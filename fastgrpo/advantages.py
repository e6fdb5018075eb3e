"""Group-relative advantages (GRPO, arXiv:2402.03300; without the division, Dr. GRPO, arXiv:2503.20783)."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_REWARDS = ("group", "batch", "none")
_EPS = 1e-4  # TRL's; keeps a group of nearly equal rewards from being blown up


def _nan_std(x: Tensor, mean: Tensor, count: Tensor) -> Tensor:
    """Standard deviation over dim 0 of the non-NaN entries, Bessel's correction; NaN for fewer than two."""
    var = torch.nansum((x - mean) ** 2, dim=0) / (count - 1)
    return torch.where(count > 1, var, torch.nan).sqrt()


def group_advantages(
    rewards: Tensor,
    num_generations: int | None = None,
    *,
    scale_rewards: str = "group",
    group_ids: Tensor | None = None,
) -> Tensor:
    """A = (r - mean of the group) / (std + 1e-4), with the std of the group, of the batch, or none.

    NaN marks a completion that no reward function could judge: it is left out of every mean and std and gets A = 0. A
    group whose rewards are all equal gets A = 0 exactly, so its tokens carry no policy gradient.

    Args:
        rewards (B,) float: one reward per completion.
        num_generations: size of the contiguous groups; B must be a multiple. Not needed with `group_ids`.
        scale_rewards: "group", "batch" (std over all B) or "none".
        group_ids (B,) integer: the group of each completion, in any order and of any size.

    Returns:
        (B,) advantages in the rewards' dtype (fp32 for integer and half-precision rewards).

    Raises:
        ValueError: wrong rank, B not a multiple of num_generations, unknown scale_rewards, bad group_ids.

    Equivalent to: the advantages of TRL's GRPOTrainer.
    """
    if not isinstance(rewards, Tensor) or rewards.dim() != 1:
        raise ValueError(f"rewards: expected a tensor of shape (B,), got {_describe(rewards)}")
    if scale_rewards not in SCALE_REWARDS:
        raise ValueError(f"scale_rewards: expected one of {', '.join(SCALE_REWARDS)}, got {scale_rewards!r}")
    dtype = rewards.dtype if rewards.dtype in (torch.float32, torch.float64) else torch.float32
    rewards = rewards.double()  # B numbers: the rounding of a mean must not show in a small spread
    if group_ids is not None:
        same_shape = isinstance(group_ids, Tensor) and group_ids.shape == rewards.shape
        if not same_shape or group_ids.is_floating_point():
            shape = tuple(rewards.shape)
            raise ValueError(f"group_ids: expected integers of shape {shape}, got {_describe(group_ids)}")
        index, columns = _columns(rewards, group_ids)
    else:
        check_groups(rewards, num_generations)
        index = torch.arange(rewards.numel(), device=rewards.device) // num_generations
        columns = rewards.view(-1, num_generations).T
    if rewards.numel() == 0:
        return rewards.to(dtype)

    count = (~columns.isnan()).sum(0)
    mean = columns.nanmean(0)
    advantages = rewards - mean[index]
    if scale_rewards == "group":
        advantages = advantages / (_nan_std(columns, mean, count)[index] + _EPS)
    elif scale_rewards == "batch":
        advantages = advantages / (_nan_std(rewards, rewards.nanmean(), (~rewards.isnan()).sum()) + _EPS)
    # equal rewards: r - mean may be a rounding error away from 0
    highest, lowest = columns.nan_to_num(nan=-torch.inf).amax(0), columns.nan_to_num(nan=torch.inf).amin(0)
    return torch.where((highest == lowest)[index], 0.0, advantages).nan_to_num(nan=0.0).to(dtype)


def _columns(rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The group index of each reward, and the groups as NaN-padded columns (largest group, number of groups)."""
    _, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    columns = rewards.new_full((int(sizes.max()) if sizes.numel() else 0, sizes.numel()), torch.nan)
    by_group = index.argsort(stable=True)
    place = torch.arange(rewards.numel(), device=rewards.device) - (sizes.cumsum(0) - sizes)[index[by_group]]
    columns[place, index[by_group]] = rewards[by_group]
    return index, columns


def check_groups(rewards: Tensor, num_generations: int | None) -> None:
    """Raise a ValueError unless (B,) rewards fall into whole groups of `num_generations`."""
    if not isinstance(num_generations, int) or isinstance(num_generations, bool) or num_generations < 1:
        raise ValueError(f"num_generations: expected an integer >= 1, got {num_generations!r}")
    if rewards.numel() % num_generations:
        raise ValueError(
            f"rewards: expected whole groups, a multiple of num_generations={num_generations}, got {rewards.numel()} "
            "rewards (pass advantages where a micro-batch cuts through a group)"
        )


def _describe(x: object) -> str:
    return f"shape {tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else repr(x)
