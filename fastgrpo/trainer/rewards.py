"""Reward functions: how they are called, how their scores become advantages, and three built-in ones.

A reward function is TRL's: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, with one entry
per completion in every argument; None means that it has no say about that completion.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
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


# Built-in rewards: 1.0 or 0.0 against the column `answer`, None where the answer is missing.


def exact(completions: list, answer: list, **_: Any) -> list[float | None]:
    """1 when the completion is the answer, but for surrounding white space."""
    return _judge(completions, answer, lambda text, truth: text.strip() == truth.strip())


def contains(completions: list, answer: list, **_: Any) -> list[float | None]:
    """1 when the answer stands somewhere in the completion."""
    return _judge(completions, answer, lambda text, truth: truth.strip() in text)


def numeric(completions: list, answer: list, **_: Any) -> list[float | None]:
    """1 when the last number of the completion equals the last number of the answer (so GSM8K's `#### 42` works)."""
    return _judge(
        completions,
        answer,
        lambda text, truth: (value := last_number(truth)) is not None and last_number(text) == value,
    )


BUILT_IN: dict[str, RewardFunc] = {"exact": exact, "numeric": numeric, "contains": contains}


def resolve(name: str) -> RewardFunc:
    """The reward function called `name`: a built-in one, or `module:function`.

    Raises:
        ValueError: no such built-in, or nothing importable under that path.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"reward: expected one of {', '.join(BUILT_IN)} or 'module:function', got {name!r}")
    try:
        func = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward: {name!r} cannot be imported: {error}") from error
    if not callable(func):
        raise ValueError(f"reward: expected {name!r} to be a function, got {type(func).__name__}")
    return func


def last_number(text: str) -> float | None:
    """The last number in a text, with thousands' commas, a sign or decimals."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text)
    return float(found[-1].replace(",", "")) if found else None


def completion_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion, plain or a list of messages."""
    return completion if isinstance(completion, str) else "".join(str(m.get("content") or "") for m in completion)


def _judge(completions: list, answer: list, is_right: Callable[[str, str], bool]) -> list[float | None]:
    return [
        None if truth is None else float(is_right(completion_text(completion), str(truth)))
        for completion, truth in zip(completions, answer, strict=True)
    ]
