"""The metrics of a micro-batch, over all processes."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from fastgrpo.objective import Objective
from fastgrpo.output import GRPOOutput


class Gathers(Protocol):
    """What can put the tensors of all processes one after the other, such as accelerate's `Accelerator`."""

    def gather(self, tensor: Tensor) -> Tensor: ...


def reduce_metrics(
    accelerator: Gathers, objective: Objective, output: GRPOOutput, mask: Tensor, accumulation: int
) -> dict[str, Tensor]:
    """TRL's metrics of a loss, averaged over processes: by tokens, or by sequences for one number a sequence.

    One collective, and no wait for the device.

    Args:
        mask (B, T): the loss tokens of this process's micro-batch.
        accumulation: micro-batches of a step, by which the loss was divided.

    Returns:
        {name: 0-dim fp32 tensor}, the same on every process.
    """
    values = {name: value.detach().float() for name, value in output.metrics.items()}
    if "policy_loss" in values and objective.loss_type not in ("dapo", "cispo", "vespo"):
        values["policy_loss"] = values["policy_loss"] * accumulation  # TRL logs those per micro-batch, others by share
    packed = torch.stack([*values.values(), mask.sum().float()])
    *columns, tokens = accelerator.gather(packed).view(-1, len(packed)).T
    per_sequence, reduced = objective.importance_sampling_level == "sequence", {}
    for name, column in zip(values, columns, strict=True):
        if name.endswith("_min"):
            reduced[name] = _finite(column.nan_to_num(nan=math.inf).min())
        elif name.endswith("_max"):
            reduced[name] = _finite(column.nan_to_num(nan=-math.inf).max())
        elif name.startswith(("vespo/", "policy_loss")) or (per_sequence and "clip_ratio" in name):
            reduced[name] = column.mean()
        else:
            reduced[name] = (column * tokens).sum() / tokens.sum().clamp(min=1)
    return reduced


def _finite(x: Tensor) -> Tensor:
    """NaN where no process had a number."""
    return torch.where(x.isinf(), math.nan, x)
