"""Reward functions, for GRPOTrainer and for TRL's.

A reward function is TRL's: `f(prompts, completions, completion_ids, **columns) -> list[float | None]`, called with
keywords, with one entry per completion in every argument; None means that it has no say about that completion.
Completions are texts, or lists of messages.
"""

from __future__ import annotations

import importlib

from fastgrpo.rewards.accuracy import accuracy_reward
from fastgrpo.rewards.code import code_reward, code_reward_within
from fastgrpo.rewards.model import model_reward
from fastgrpo.rewards.quantities import last_number
from fastgrpo.rewards.rules import (
    contains,
    exact,
    format_reward,
    language_consistency_reward,
    numeric,
    prefilled,
    repetition_penalty_reward,
    soft_overlong_reward,
    tag_count_reward,
)
from fastgrpo.rewards.sandbox import Limits
from fastgrpo.rewards.scoring import (
    RewardFunc,
    as_reward_list,
    by_column,
    call_reward_func,
    combine,
    combine_rewards,
    nanstd,
    reward_arguments,
    reward_name,
)
from fastgrpo.rewards.text import completion_text

BUILT_IN: dict[str, RewardFunc] = {
    "exact": exact,
    "numeric": numeric,
    "contains": contains,
    "accuracy": accuracy_reward,
    "format": format_reward,
    "tag_count": tag_count_reward,
    "repetition_penalty": repetition_penalty_reward(),
    "code": code_reward,
}


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


__all__ = [
    "BUILT_IN",
    "Limits",
    "RewardFunc",
    "accuracy_reward",
    "as_reward_list",
    "by_column",
    "call_reward_func",
    "code_reward",
    "code_reward_within",
    "combine",
    "combine_rewards",
    "completion_text",
    "contains",
    "exact",
    "format_reward",
    "language_consistency_reward",
    "last_number",
    "model_reward",
    "nanstd",
    "numeric",
    "prefilled",
    "repetition_penalty_reward",
    "resolve",
    "reward_arguments",
    "reward_name",
    "soft_overlong_reward",
    "tag_count_reward",
]
