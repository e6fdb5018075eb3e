"""Reward functions: how they are called and combined, and how their scores become advantages."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.advantages import group_advantages

RewardFunc = Callable[..., list[float | None]]


def as_reward_list(reward_funcs: RewardFunc | Sequence[RewardFunc]) -> tuple[list[RewardFunc], list[str]]:
    """The reward functions and the names that they are logged under."""
    funcs = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    if not funcs:
        raise ValueError("reward_funcs: expected at least one function, got an empty list")
    for func in funcs:
        inner = getattr(func, "__call__", func)  # noqa: B004 (an instance with an async __call__ counts)
        if not callable(func) or isinstance(func, nn.Module):
            raise TypeError(
                f"reward_funcs: expected functions, got {type(func).__name__}; wrap a reward model in a function that "
                "scores the completions"
            )
        if inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(inner):
            raise TypeError("reward_funcs: expected plain functions, got an async one; run its event loop inside")
    return funcs, [getattr(func, "__name__", None) or type(func).__name__ for func in funcs]


def call_reward_func(func: RewardFunc, name: str, completions: list, **arguments: Any) -> list[float]:
    """One float per completion, NaN where the function returned None."""
    scores = func(completions=completions, **arguments)
    if not isinstance(scores, (list, tuple, Tensor)) or len(scores) != len(completions):
        got = f"{len(scores)} rewards" if hasattr(scores, "__len__") else repr(scores)
        raise ValueError(
            f"reward function {name!r}: expected {len(completions)} rewards, one per completion, got {got}"
        )
    return [float("nan") if score is None else float(score) for score in scores]


def combine(*functions: RewardFunc, weights: Sequence[float] | None = None) -> RewardFunc:
    """One reward function from several: Σ_i w_i f_i, over those that have a say.

    Where none has, the sum is None. GRPOTrainer takes several functions and `reward_weights` itself, and logs each;
    this is for where one function is expected, such as `fastgrpo train --reward`.

    Args:
        functions: reward functions, called with the arguments that the sum is called with.
        weights: a finite number for each; default all 1.

    Raises:
        ValueError: no functions, or weights that are not one finite number for each.
    """
    funcs, names = as_reward_list(functions)
    weights = [1.0] * len(funcs) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(funcs) or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights: expected {len(funcs)} finite numbers, one per function, got {weights}")

    def combined(completions: list, **columns: Any) -> list[float | None]:
        calls = zip(funcs, names, strict=True)
        scores = [call_reward_func(func, name, completions, **columns) for func, name in calls]
        sums = []
        for votes in zip(*scores, strict=True):
            said = [weight * vote for weight, vote in zip(weights, votes, strict=True) if not math.isnan(vote)]
            sums.append(sum(said) if said else None)
        return sums

    combined.__name__ = "+".join(names)
    return combined


def by_column(column: str, functions: Mapping[Any, RewardFunc]) -> RewardFunc:
    """One reward function from several: the value in a column of the dataset says which one scores the row.

    Such as `by_column("language", {"en": language_consistency_reward("en"), …})`. A row with another value is not
    scored: None.

    Args:
        column: name of the column.
        functions: reward function by value; each gets its own rows of every argument.

    Raises:
        ValueError: no functions; when it is called, a dataset without the column.
    """
    as_reward_list(list(functions.values()))

    def chosen(completions: list, **columns: Any) -> list[float | None]:
        if column not in columns:
            raise ValueError(f"dataset: expected a column {column!r}, got {', '.join(sorted(columns)) or 'none'}")
        scores: list[float | None] = [None] * len(completions)
        for value, func in functions.items():
            rows = [i for i, key in enumerate(columns[column]) if key == value]
            if rows:
                # what is no list of one entry a completion, such as trainer_state, goes to all
                own = {k: [v[i] for i in rows] if isinstance(v, list) else v for k, v in columns.items()}
                name = getattr(func, "__name__", type(func).__name__)
                for i, score in zip(
                    rows, call_reward_func(func, name, [completions[i] for i in rows], **own), strict=True
                ):
                    scores[i] = None if math.isnan(score) else score
        return scores

    names = {getattr(func, "__name__", type(func).__name__) for func in functions.values()}
    chosen.__name__ = "|".join(sorted(names))
    return chosen


def combine_rewards(
    rewards_per_func: Tensor, weights: Tensor, num_generations: int, scale_rewards: str, aggregation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of several functions to one reward and one advantage per completion.

    Args:
        rewards_per_func (B, F) fp32: NaN where a function has no say; whole groups, contiguous.
        weights (F,) fp32.
        aggregation: "sum_then_normalize" or "normalize_then_sum".

    Returns:
        (rewards (B,), NaN where no function has a say; advantages (B,), 0 there; zero_std (B,) bool: the std that the
        advantage is measured by is 0, so it carries no signal).
    """
    unscorable = rewards_per_func.isnan().all(dim=1)

    def weighted(scores: Tensor) -> Tensor:
        return (scores * weights).nansum(dim=1).masked_fill(unscorable, torch.nan)

    rewards = weighted(rewards_per_func)
    if aggregation == "normalize_then_sum":
        normalised = [group_advantages(column, num_generations) for column in rewards_per_func.unbind(dim=1)]
        # the advantage of an unscored completion is 0, the group's mean: no vote, as NaN is in a nansum
        total = weighted(torch.stack(normalised, dim=1))
        advantages = group_advantages(total, total.numel(), scale_rewards="batch")
        zero_std = _is_zero(nanstd(total)).expand_as(total)
    else:
        advantages = group_advantages(rewards, num_generations, scale_rewards=scale_rewards)
        if scale_rewards == "batch":
            zero_std = _is_zero(nanstd(rewards)).expand_as(rewards)
        else:
            stds = nanstd(rewards.view(-1, num_generations), dim=1)
            zero_std = _is_zero(stds).repeat_interleave(num_generations)
    return rewards, advantages, zero_std


def nanstd(x: Tensor, dim: int | None = None) -> Tensor:
    """Standard deviation with Bessel's correction without the NaNs; NaN below two values, 0 for a single one."""
    if (x.numel() if dim is None else x.shape[dim]) < 2:
        return torch.zeros_like(x.sum() if dim is None else x.sum(dim))
    keep = {} if dim is None else {"dim": dim, "keepdim": True}
    count = (~x.isnan()).sum(**keep)
    square = ((x - x.nanmean(**keep)) ** 2).nansum(**keep) / (count - 1)
    std = torch.where(count > 1, square, torch.nan).sqrt()
    return std if dim is None else std.squeeze(dim)


def _is_zero(std: Tensor) -> Tensor:
    return torch.isclose(std, torch.zeros_like(std))
