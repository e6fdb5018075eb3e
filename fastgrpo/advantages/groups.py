"""Rewards in groups, and the advantages that are relative to them: GRPO's, and without the division Dr. GRPO's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.batch.checks import FLOATS, INTEGERS, check, check_dtype

SCALE_REWARDS = ("group", "batch", "none")
_EPS = 1e-4  # as in TRL; it bounds the advantages of a group of nearly equal rewards


def result_dtype(rewards: Tensor) -> torch.dtype:
    """Of advantages: the rewards' own; fp32 for integer and half-precision rewards."""
    return rewards.dtype if rewards.dtype in (torch.float32, torch.float64) else torch.float32


def nan_std(x: Tensor, mean: Tensor, count: Tensor) -> Tensor:
    """Standard deviation over dim 0 without the NaNs, with Bessel's correction; NaN for fewer than two values."""
    var = torch.nansum((x - mean) ** 2, dim=0) / (count - 1)
    return torch.where(count > 1, var, torch.nan).sqrt()


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(highest, lowest) over dim 0 without the NaNs."""
    return x.nan_to_num(nan=-torch.inf).amax(0), x.nan_to_num(nan=torch.inf).amin(0)


class Groups:
    """Rewards (B,) in float64, in G groups of at most K; NaN rewards are left out of all that is said of a group.

    With contiguous groups nothing here waits for the device. With `group_ids` it is waited for: only the values of the
    ids say how many groups there are, and how large the largest is.

    Attributes:
        rewards (B,) float64: rounding of a mean does not show in a small spread.
        index (B,) int64: the group of each completion.
        columns (K, G): the rewards, a group in each column; NaN where a group is smaller.
        count, mean, highest, lowest (G,): of the rewards that are not NaN.
    """

    def __init__(self, rewards: Tensor, num_generations: int | None, group_ids: Tensor | None):
        check(isinstance(rewards, Tensor) and rewards.dim() == 1, "rewards", "a tensor of shape (B,)", rewards)
        check_dtype("rewards", rewards, *FLOATS, *INTEGERS, torch.bool)
        self.dtype = result_dtype(rewards)
        self.rewards = rewards.double()
        rows = torch.arange(rewards.numel(), device=rewards.device)
        if group_ids is None:
            self.size = check_groups(rewards, num_generations)
            self.index, self._place = rows // self.size, None
            self.number = rewards.numel() // self.size
        else:
            same_shape = isinstance(group_ids, Tensor) and group_ids.shape == rewards.shape
            check(same_shape, "group_ids", f"a tensor of shape {tuple(rewards.shape)}", group_ids)
            check_dtype("group_ids", group_ids, torch.bool, *INTEGERS)
            _, self.index, sizes = torch.unique(group_ids.long(), return_inverse=True, return_counts=True)
            self.number, self.size = sizes.numel(), int(sizes.max()) if sizes.numel() else 1
            by_group = self.index.argsort(stable=True)
            place = rows - (sizes.cumsum(0) - sizes)[self.index[by_group]]
            self._place = torch.empty_like(place).scatter_(0, by_group, place)
        self.columns = self.in_columns(self.rewards)
        self.count = (~self.columns.isnan()).sum(0)
        self.mean = self.columns.nanmean(0)
        self.highest, self.lowest = extremes(self.columns)

    def in_columns(self, x: Tensor) -> Tensor:
        """(K, G, ...) from floats (B, ...), a group in each column; NaN where a group is smaller than K."""
        if self._place is None:
            return x.reshape(self.number, self.size, *x.shape[1:]).transpose(0, 1)
        columns = x.new_full((self.size, self.number, *x.shape[1:]), torch.nan)
        columns[self._place, self.index] = x
        return columns

    def of_columns(self, columns: Tensor) -> Tensor:
        """(B, ...) from (K, G, ...): the inverse of `in_columns`."""
        if self._place is None:
            return columns.transpose(0, 1).reshape(-1, *columns.shape[2:])
        return columns[self._place, self.index]

    def judged(self) -> Tensor:
        """0-dim: how many rewards of the batch are not NaN."""
        return (~self.rewards.isnan()).sum()

    def scaled(self, x: Tensor, scale_rewards: str, epsilon: float) -> Tensor:
        """x (B,) / (std + epsilon), with the std of the group or the batch, or x itself."""
        if scale_rewards == "group":
            return x / (nan_std(self.columns, self.mean, self.count)[self.index] + epsilon)
        if scale_rewards == "batch":
            return x / (nan_std(self.rewards, self.rewards.nanmean(), self.judged()) + epsilon)
        return x

    def result(self, advantages: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The advantages (B,), in the dtype of results: exactly 0 where the reward is NaN and in groups of equal
        rewards, where rounding may have left something."""
        equal = (self.highest == self.lowest)[self.index]
        return torch.where(equal, 0.0, advantages).nan_to_num(nan=0.0).to(dtype or self.dtype)


def check_scale_rewards(scale_rewards: str) -> None:
    if scale_rewards not in SCALE_REWARDS:
        raise ValueError(f"scale_rewards: expected one of {', '.join(SCALE_REWARDS)}, got {scale_rewards!r}")


@torch.no_grad()
def group_advantages(
    rewards: Tensor,
    num_generations: int | None = None,
    *,
    scale_rewards: str = "group",
    group_ids: Tensor | None = None,
    epsilon: float = _EPS,
) -> Tensor:
    """The advantage of each completion, from the rewards of its group (GRPO, arXiv:2402.03300):

        A = (r - mean of the group) / (std + epsilon)

    with the std (Bessel's correction) of the group or of the batch, or without the division (Dr. GRPO,
    arXiv:2503.20783). NaN marks a completion that no reward function could judge: it is left out of every mean and std
    and gets A = 0. A group of equal rewards gets A = 0 exactly, so its tokens have no policy gradient.

    Args:
        rewards (B,) float: one reward per completion.
        num_generations: size of the contiguous groups; B must be a multiple. Not needed with `group_ids`.
        scale_rewards: "group", "batch" (std over all B) or "none".
        group_ids (B,) integer: the group of each completion, in any order and of any size.
        epsilon: added to the std: 1e-4 in TRL, 1e-6 in verl and SkyRL, 1e-9 in OpenRLHF.

    Returns:
        (B,) advantages in the rewards' dtype (fp32 for integer and half-precision rewards).

    Raises:
        ValueError: wrong rank, B not a multiple of num_generations, unknown scale_rewards, bad group_ids or epsilon.

    Equivalent to: the advantages of TRL's GRPOTrainer.
    """
    groups = Groups(rewards, num_generations, group_ids)
    check_scale_rewards(scale_rewards)
    check_epsilon(epsilon)
    return groups.result(groups.scaled(groups.rewards - groups.mean[groups.index], scale_rewards, epsilon))


def check_epsilon(epsilon: float) -> None:
    number = isinstance(epsilon, (int, float)) and not isinstance(epsilon, bool)
    check(number and 0 <= epsilon < float("inf"), "epsilon", "a finite number >= 0", epsilon)


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
