"""Estimators by their names, for trainers and command lines."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastgrpo.advantages.groups import group_advantages
from fastgrpo.advantages.sequences import (
    best_of_group,
    gpg,
    maxrl,
    opo,
    pass_at_k,
    reinforce_plus_plus_baseline,
    rloo,
)
from fastgrpo.advantages.tokens import reinforce_plus_plus

# those for which rewards, groups and loss tokens are enough
ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "group": group_advantages,
    "rloo": rloo,
    "opo": opo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "gpg": gpg,
    "maxrl": maxrl,
    "best_of_group": best_of_group,
    "pass_at_k": pass_at_k,
}
_GIVEN = ("rewards", "num_generations", "completion_mask", "group_ids")


def takes(name: str, argument: str) -> bool:
    """Whether the estimator of that name has that argument."""
    return argument in inspect.signature(ESTIMATORS[name]).parameters


def estimate(
    name: str,
    rewards: Tensor,
    num_generations: int | None = None,
    *,
    completion_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Advantages by the name of their estimator; it gets what it takes of groups and mask, and all of the options.

    Args:
        name: one of `ESTIMATORS`.
        rewards (B,) float: one reward per completion.
        num_generations: size of the contiguous groups.
        completion_mask (B, T): nonzero for the loss tokens; None: for an estimator that does not take it.
        options: keyword arguments of the estimator, such as `gamma` or `k`; also `group_ids`.

    Returns:
        (B,) advantages, or (B, T) from "reinforce_plus_plus".

    Raises:
        ValueError: an unknown name, an option that the estimator does not have, or lacks; and what the estimator says.
    """
    check_options(name, options)
    given = {"num_generations": num_generations, "completion_mask": completion_mask}
    return ESTIMATORS[name](rewards, **{k: x for k, x in given.items() if takes(name, k)}, **options)


def check_options(name: str, options: dict[str, Any]) -> None:
    """A ValueError unless there is an estimator of that name that takes these options, and needs no others."""
    if name not in ESTIMATORS:
        raise ValueError(f"advantage_estimator: expected one of {', '.join(ESTIMATORS)}, got {name!r}")
    parameters = inspect.signature(ESTIMATORS[name]).parameters
    own = [option for option in parameters if option not in _GIVEN]
    for option in options:
        if option not in own and not (option == "group_ids" and option in parameters):
            raise ValueError(f"{option}: expected one of {', '.join(own) or 'no options'} of {name!r}, got {option!r}")
    for option in own:
        if parameters[option].default is inspect.Parameter.empty and option not in options:
            raise ValueError(f"{option}: expected a value, which the advantages of {name!r} need, got none")
