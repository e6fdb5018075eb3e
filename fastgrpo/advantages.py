"""Advantages: group-relative ones (GRPO, arXiv:2402.03300; without the division, Dr. GRPO, arXiv:2503.20783) and
generalised advantage estimation with a value function (arXiv:1506.02438).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgrpo.batch.checks import FLOATS, INTEGERS, check, check_dtype

SCALE_REWARDS = ("group", "batch", "none")
_EPS = 1e-4  # as in TRL; it bounds the advantages of a group of nearly equal rewards


def _nan_std(x: Tensor, mean: Tensor, count: Tensor) -> Tensor:
    """Standard deviation over dim 0 without the NaNs, with Bessel's correction; NaN for fewer than two values."""
    var = torch.nansum((x - mean) ** 2, dim=0) / (count - 1)
    return torch.where(count > 1, var, torch.nan).sqrt()


def group_advantages(
    rewards: Tensor,
    num_generations: int | None = None,
    *,
    scale_rewards: str = "group",
    group_ids: Tensor | None = None,
) -> Tensor:
    """The advantage of each completion, from the rewards of its group (GRPO, arXiv:2402.03300):

        A = (r - mean of the group) / (std + 1e-4)

    with the std (Bessel's correction) of the group or of the batch, or without the division (Dr. GRPO,
    arXiv:2503.20783). NaN marks a completion that no reward function could judge: it is left out of every mean and std
    and gets A = 0. A group of equal rewards gets A = 0 exactly, so its tokens have no policy gradient.

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
    check(isinstance(rewards, Tensor) and rewards.dim() == 1, "rewards", "a tensor of shape (B,)", rewards)
    check_dtype("rewards", rewards, *FLOATS, *INTEGERS, torch.bool)
    if scale_rewards not in SCALE_REWARDS:
        raise ValueError(f"scale_rewards: expected one of {', '.join(SCALE_REWARDS)}, got {scale_rewards!r}")
    dtype = rewards.dtype if rewards.dtype in (torch.float32, torch.float64) else torch.float32
    rewards = rewards.double()  # so that the rounding of a mean does not show in a small spread
    if group_ids is not None:
        same_shape = isinstance(group_ids, Tensor) and group_ids.shape == rewards.shape
        check(same_shape, "group_ids", f"a tensor of shape {tuple(rewards.shape)}", group_ids)
        check_dtype("group_ids", group_ids, torch.bool, *INTEGERS)
        index, columns = _columns(rewards, group_ids.long())
    else:
        size = check_groups(rewards, num_generations)
        index = torch.arange(rewards.numel(), device=rewards.device) // size
        columns = rewards.view(-1, size).T
    if rewards.numel() == 0:
        return rewards.to(dtype)

    count = (~columns.isnan()).sum(0)
    mean = columns.nanmean(0)
    advantages = rewards - mean[index]
    if scale_rewards == "group":
        advantages = advantages / (_nan_std(columns, mean, count)[index] + _EPS)
    elif scale_rewards == "batch":
        advantages = advantages / (_nan_std(rewards, rewards.nanmean(), (~rewards.isnan()).sum()) + _EPS)
    # of equal rewards, r - mean may be a rounding error away from 0
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


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438), for PPO with a value function.

    With t+1 the next token that is not masked, and V = A = 0 after the last one:

        δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γλ A_{t+1},   return_t = A_t + V_t

    Masked tokens, padding as well as holes such as a tool's output, are skipped as if the sequence did not contain
    them: they cost no discount, and may hold NaN. Put a reward on a token that counts. The results carry no gradient.

    Args:
        rewards (B, T) float or integer: the reward of each token; often 0 except for the last one.
        values (B, T) float: V of the state before each token.
        mask (B, T) bool or integer: nonzero where a token counts.
        gamma: discount γ in [0, 1].
        lam: λ in [0, 1]; 0 gives the one-step error δ, 1 the discounted return minus the value.

    Returns:
        (advantages (B, T), returns (B, T)): fp32, or float64 if an input is; 0 where masked.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, gamma or lam outside [0, 1].
    """
    _check_gae(rewards, values, mask, gamma, lam)
    dtype = torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32
    mask = mask != 0
    rewards, values = (torch.where(mask, x.to(dtype), 0.0) for x in (rewards, values))

    # V of the next token that counts; its position is a running minimum, from the right, of such tokens' positions
    length = mask.shape[1]
    here = torch.where(mask, torch.arange(length, device=mask.device), length)
    after = nn.functional.pad(here.flip(1).cummin(1).values.flip(1)[:, 1:], (0, 1), value=length) if length else here
    next_values = nn.functional.pad(values, (0, 1)).gather(1, after)

    # A_t = a_t A_{t+1} + b_t; a masked token is the identity (1, 0). Composing the maps of 1, 2, 4, … tokens takes
    # log2(T) steps. Every a is in [0, 1] and nothing is divided, so no digits are lost; a cumulative sum divided by
    # powers of γλ would lose them all.
    a = torch.where(mask, torch.full_like(values, gamma * lam), 1.0)
    b = torch.where(mask, rewards + gamma * next_values - values, 0.0)
    step = 1
    while step < length:
        b = b + a * nn.functional.pad(b[:, step:], (0, step))
        a = a * nn.functional.pad(a[:, step:], (0, step))
        step *= 2
    advantages = torch.where(mask, b, 0.0)
    return advantages, advantages + values


def _check_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> None:
    check(isinstance(values, Tensor) and values.dim() == 2, "values", "a tensor of shape (B, T)", values)
    check_dtype("values", values, *FLOATS)
    for name, x in (("rewards", rewards), ("mask", mask)):
        fits = isinstance(x, Tensor) and x.shape == values.shape
        check(fits, name, f"a tensor of values' shape {tuple(values.shape)}", x)
        check(x.device == values.device, name, f"values' device {values.device}", x)
        check_dtype(name, x, torch.bool, *INTEGERS, *(FLOATS if name == "rewards" else ()))
    for name, number in (("gamma", gamma), ("lam", lam)):
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {number!r}")


def check_groups(rewards: Tensor, num_generations: int | None) -> int:
    """`num_generations`; a ValueError unless (B,) rewards make whole groups of it."""
    if not isinstance(num_generations, int) or isinstance(num_generations, bool) or num_generations < 1:
        raise ValueError(f"num_generations: expected an integer >= 1, got {num_generations!r}")
    if rewards.numel() % num_generations:
        raise ValueError(
            f"rewards: expected whole groups, a multiple of num_generations={num_generations}, got {rewards.numel()} "
            "rewards (pass advantages where a micro-batch cuts through a group)"
        )
    return num_generations
