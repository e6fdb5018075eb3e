"""What a loss returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastgrpo.batch.batch import Batch
from fastgrpo.objective.metrics import column_metrics, compute_metrics
from fastgrpo.objective.options import Objective
from fastgrpo.objective.terms import Terms


class GRPOOutput(NamedTuple):
    """What a loss returns: the loss, which alone is differentiable, and statistics.

    With `return_stats=False` only `loss` is filled. All are fp32; from float64 inputs the statistics are float64, and
    so is the loss of `policy_loss`.
    """

    loss: Tensor  # 0-dim
    per_token_logps: Tensor | None = None  # like completion_ids; 0 where masked
    entropies: Tensor | None = None  # like completion_ids, nats; 0 where masked
    kl: Tensor | None = None  # like completion_ids; None when beta is 0
    metrics: dict[str, Tensor] | None = None  # 0-dim tensors under TRL's names; reading one waits for the device


def make_output(
    objective: Objective,
    batch: Batch,
    logps: Tensor,
    entropies: Tensor | None,
    terms: Terms,
    return_stats: bool,
    counts: Tensor | None = None,
) -> GRPOOutput:
    """The public result from row vectors."""
    if not return_stats:
        return GRPOOutput(terms.loss)
    metrics = compute_metrics(objective, batch, logps, entropies, terms)
    if counts is not None:
        metrics |= column_metrics(counts)
    return GRPOOutput(
        loss=terms.loss,
        per_token_logps=logps.detach().view(batch.shape),
        entropies=None if entropies is None else entropies.detach().view(batch.shape),
        kl=None if terms.kl is None else terms.kl.detach().view(batch.shape),
        metrics=metrics,
    )
