"""The objective: every option of the loss, what each loss type is, and its mathematics in plain torch."""

from fastgrpo.objective import losses  # noqa: F401 (fills LOSSES)
from fastgrpo.objective.options import IMPORTANCE_SAMPLING_LEVELS, LOSSES, PRESETS, Loss, Objective

LOSS_TYPES = tuple(LOSSES)

__all__ = ["IMPORTANCE_SAMPLING_LEVELS", "LOSSES", "LOSS_TYPES", "PRESETS", "Loss", "Objective"]
