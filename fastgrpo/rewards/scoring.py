"""Reward functions: how they are called and combined, and how their scores become advantages."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.advantages import estimate, gdpo, takes

RewardFunc = Callable[..., Sequence[float | None]]


def as_reward_list(reward_funcs: RewardFunc | Sequence[RewardFunc]) -> tuple[list[RewardFunc], list[str]]:
    """The reward functions and the names that they are logged under; several of one name are numbered from 1."""
    funcs: list[Any] = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    if not funcs:
        raise ValueError("reward_funcs: expected at least one function, got an empty list")
    for func in funcs:
        inner = _innermost(func)
        inner = getattr(inner, "__call__", inner)  # noqa: B004 (an instance with an async __call__ counts)
        if not callable(func) or isinstance(func, nn.Module):
            raise TypeError(
                f"reward_funcs: expected functions, got {type(func).__name__}; wrap a reward model in a function that "
                "scores the completions"
            )
        if inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(inner):
            raise TypeError("reward_funcs: expected plain functions, got an async one; run its event loop inside")
    names = [reward_name(func) for func in funcs]
    counts = Counter(names)
    taken = {name for name in names if counts[name] == 1}
    for i, name in enumerate(names):
        if counts[name] > 1:
            numbered = (f"{name}_{number}" for number in itertools.count(1))
            names[i] = next(candidate for candidate in numbered if candidate not in taken)
            taken.add(names[i])
    return funcs, names


def reward_name(func: RewardFunc) -> str:
    """The name of a function, of the one that a `functools.partial` fills in, or of a callable object's class."""
    inner = _innermost(func)
    return getattr(inner, "__name__", None) or type(inner).__name__


def _innermost(func: RewardFunc) -> RewardFunc:
    while isinstance(func, functools.partial):
        func = func.func
    return func


ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")


def reward_arguments(
    rows: Sequence[Mapping[str, Any]], prompts: list, completion_ids: list, **of_trainer: Any
) -> dict:
    """What a reward function is called with beside its completions: the columns of the rows, and our own arguments.

    The columns prompt and completion are not among them. Nor is one that has the name of an argument: there is a
    warning, unless that is completion_ids, which TRL leaves out too.
    """
    arguments = {"prompts": prompts, "completion_ids": completion_ids, **of_trainer}
    left_out = [name for name in rows[0] if name in ARGUMENTS]
    if hidden := [name for name in left_out if name != "completion_ids"]:
        warnings.warn(
            f"reward functions do not get the dataset's {', '.join(hidden)}, since these are names of their arguments",
            stacklevel=3,
        )
    columns = [name for name in rows[0] if name not in ("prompt", "completion", *left_out)]
    return {**{name: [row[name] for row in rows] for name in columns}, **arguments}


def call_reward_func(func: RewardFunc, name: str, completions: list, /, **arguments: Any) -> list[float]:
    """One float per completion, NaN where the function returned None.

    The function may return any sequence of numbers: a list, a tensor, an array, a Series, a deque.

    Raises:
        ValueError: another number of rewards, no sequence, or an element that is no number; with the function's name.
    """
    scores = func(completions=completions, **arguments)
    kind, count = type(scores).__name__, len(completions)
    expected = f"reward function {name!r}: expected {count} rewards, one per completion"
    try:
        iterator = iter(scores.detach().cpu() if isinstance(scores, Tensor) else scores)
    except TypeError:
        iterator = None
    if iterator is None or isinstance(scores, (str, bytes, Mapping, Set)):
        raise ValueError(f"{expected}, got {kind}")
    scores = list(iterator)
    if len(scores) != count:
        raise ValueError(f"{expected}, got {len(scores)} in {kind}")
    return [
        _as_float(score, f"{expected}, each a number or None, got {kind} with", i) for i, score in enumerate(scores)
    ]


def _as_float(score: Any, message: str, index: int) -> float:
    if score is None:
        return math.nan
    try:
        if isinstance(score, (str, bytes)):
            raise TypeError
        return float(score.item() if hasattr(score, "item") else score)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise ValueError(f"{message} {type(score).__name__} {score!r:.100} as element {index}") from None


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
                ours = call_reward_func(func, reward_name(func), [completions[i] for i in rows], **own)
                for i, score in zip(rows, ours, strict=True):
                    scores[i] = None if math.isnan(score) else score
        return scores

    chosen.__name__ = "|".join(sorted({reward_name(func) for func in functions.values()}))
    return chosen


def combine_rewards(
    rewards_per_func: Tensor,
    weights: Tensor,
    num_generations: int,
    scale_rewards: str,
    aggregation: str,
    *,
    estimator: str = "group",
    completion_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of several functions to one reward and one advantage per completion.

    Args:
        rewards_per_func (B, F) fp32: NaN where a function has no say; whole groups, contiguous.
        weights (F,) fp32.
        aggregation: "sum_then_normalize" or "normalize_then_sum", which is `advantages.gdpo`.
        estimator: whose advantages the sum's are, a name of `advantages.ESTIMATORS`.
        completion_mask (B, T): nonzero for the loss tokens, for an estimator that takes it.
        options: of the estimator.

    Returns:
        (rewards (B,), NaN where no function has a say; advantages (B,), or (B, T) of an estimator of tokens, 0 there;
        zero_std (B,) bool: the std that the advantage is measured by is 0, so it carries no signal).
    """
    unscorable = rewards_per_func.isnan().all(dim=1)

    rewards = (rewards_per_func * weights).nansum(dim=1).masked_fill(unscorable, torch.nan)
    if aggregation == "normalize_then_sum":
        advantages = gdpo(rewards_per_func, num_generations, weights=weights)
        zero_std = _is_zero(nanstd(advantages.masked_fill(unscorable, torch.nan))).expand_as(rewards)
        return rewards, advantages, zero_std
    if takes(estimator, "scale_rewards"):
        options["scale_rewards"] = scale_rewards
    advantages = estimate(estimator, rewards, num_generations, completion_mask=completion_mask, **options)
    if scale_rewards == "batch" or not takes(estimator, "num_generations"):
        zero_std = _is_zero(nanstd(rewards)).expand_as(rewards)
    else:
        stds = nanstd(rewards.view(-1, num_generations), dim=1)
        zero_std = _is_zero(stds).repeat_interleave(num_generations)
    return rewards, advantages, zero_std


def nanstd(x: Tensor, dim: int | None = None) -> Tensor:
    """Standard deviation with Bessel's correction without the NaNs; NaN below two values, 0 for a single one."""
    if (x.numel() if dim is None else x.shape[dim]) < 2:
        return torch.zeros_like(x.sum() if dim is None else x.sum(dim))
    keep: dict[str, Any] = {} if dim is None else {"dim": dim, "keepdim": True}
    count = (~x.isnan()).sum(**keep)
    square = ((x - x.nanmean(**keep)) ** 2).nansum(**keep) / (count - 1)
    std = torch.where(count > 1, square, torch.nan).sqrt()
    return std if dim is None else std.squeeze(dim)


def _is_zero(std: Tensor) -> Tensor:
    return torch.isclose(std, torch.zeros_like(std))
