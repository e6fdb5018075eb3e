"""The objective: every option of the loss, what each loss type is, and its mathematics in plain torch."""

from fastgrpo.objective import losses  # noqa: F401 (fills LOSSES)
from fastgrpo.objective.averages import AVERAGES, Average
from fastgrpo.objective.options import IMPORTANCE_SAMPLING_LEVELS, Objective
from fastgrpo.objective.own import DEFAULTS, register_loss
from fastgrpo.objective.presets import PRESETS
from fastgrpo.objective.record import LOSSES, Loss, Tokens
from fastgrpo.objective.sampler import Correction

LOSS_TYPES = tuple(LOSSES)
DEFAULTS.append(Objective())

__all__ = [
    "AVERAGES",
    "IMPORTANCE_SAMPLING_LEVELS",
    "LOSSES",
    "LOSS_TYPES",
    "PRESETS",
    "Average",
    "Correction",
    "Loss",
    "Objective",
    "Tokens",
    "register_loss",
]
