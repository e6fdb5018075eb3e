"""Advantages from rewards: an estimator is a function, of its own arguments.

    group_advantages             GRPO, Dr. GRPO          groups: what the estimators share of groups
    gae                          with a value function   gae
    rloo, opo, gpg, maxrl, …     of completions          sequences
    reinforce_plus_plus, …       of tokens               tokens
    ESTIMATORS, estimate         by name                 named

All of them are on the device of the rewards, in float64 inside (`gae` in the dtype of its inputs), without gradients;
their sums have one order. Nothing waits for the device but `group_ids` and the checks of a name.
"""

from fastgrpo.advantages.gae import gae
from fastgrpo.advantages.groups import SCALE_REWARDS, check_groups, group_advantages
from fastgrpo.advantages.named import ESTIMATORS, check_options, estimate, takes
from fastgrpo.advantages.sequences import (
    best_of_group,
    gdpo,
    gpg,
    maxrl,
    opo,
    pass_at_k,
    reinforce_plus_plus_baseline,
    rloo,
)
from fastgrpo.advantages.tokens import optimal_token_baseline, reinforce_plus_plus, remax

__all__ = [
    "ESTIMATORS",
    "SCALE_REWARDS",
    "best_of_group",
    "check_groups",
    "check_options",
    "estimate",
    "gae",
    "gdpo",
    "gpg",
    "group_advantages",
    "maxrl",
    "opo",
    "optimal_token_baseline",
    "pass_at_k",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
    "takes",
]
