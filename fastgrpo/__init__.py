"""fastgrpo: the GRPO loss as fused kernels. Importing it compiles nothing and touches no GPU."""

from fastgrpo.advantages import gae, group_advantages
from fastgrpo.batch.kept import kept_sets
from fastgrpo.linear import LinearGRPOLoss, linear_grpo_loss
from fastgrpo.logps import LogpsOutput, linear_logps, selective_logps
from fastgrpo.loss import GRPOLoss, grpo_loss
from fastgrpo.objective import Correction, Objective, register_loss
from fastgrpo.objective.kl import kl_in_reward
from fastgrpo.output import GRPOOutput
from fastgrpo.policy import policy_loss
from fastgrpo.reference import grpo_loss_reference, linear_grpo_loss_reference

__version__ = "0.1.0"

__all__ = [
    "Correction",
    "GRPOLoss",
    "GRPOOutput",
    "LinearGRPOLoss",
    "LogpsOutput",
    "Objective",
    "gae",
    "group_advantages",
    "grpo_loss",
    "grpo_loss_reference",
    "kept_sets",
    "kl_in_reward",
    "linear_grpo_loss",
    "linear_grpo_loss_reference",
    "linear_logps",
    "policy_loss",
    "register_loss",
    "selective_logps",
]
