"""The loss as a textbook would write it, with a full softmax and autograd: what the kernels are tested against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgrpo.batch.inputs import Inputs, check_names, check_rows, make_batch, takes
from fastgrpo.batch.kept import KeptSets
from fastgrpo.objective import Objective
from fastgrpo.objective.options import check_objective
from fastgrpo.objective.sampler import corrected
from fastgrpo.objective.terms import compute_terms, only_where, row_weights
from fastgrpo.output import GRPOOutput, make_output

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(Inputs)
def grpo_loss_reference(
    logits: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | None = None,
    *,
    objective: Objective = Objective(),  # noqa: B008 (frozen)
    return_stats: bool = True,
    **inputs: Unpack[Inputs],
) -> GRPOOutput:
    """`grpo_loss` as a textbook would write it: log_softmax, gather, the objective, autograd.

    It computes in the logits' own dtype, so float64 gives the truth that kernels are tested against. It needs several
    copies of the logits, and can be differentiated any number of times.

    Args:
        logits, completion_ids, advantages, objective, return_stats and the rest: as in `grpo_loss`, which also has
            `inplace` and `backend`.

    Returns:
        GRPOOutput in the logits' dtype.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    check_names(inputs, Inputs, "grpo_loss_reference")
    check_rows(logits, completion_ids, "logits", "V")
    check_objective(objective, inputs)
    vocab = logits.size(-1)
    batch = make_batch(completion_ids, advantages, inputs, dtype=logits.dtype, vocab_size=vocab)
    batch = corrected(objective.corrections, batch)
    z = torch.where(batch.mask[:, None], logits.reshape(-1, vocab), 0.0) * batch.inv_temperature[:, None]
    if batch.kept is not None:
        z = torch.where(in_sets(batch.kept, vocab), z, -torch.inf)
    all_logps = z.log_softmax(-1)
    logps = all_logps.gather(-1, torch.where(batch.mask, batch.ids, 0)[:, None])[:, 0]
    p = all_logps.exp()
    entropies = -(p * torch.where(p == 0, 0.0, all_logps)).sum(-1)  # p log p is 0 at p = 0
    weights = row_weights(objective, batch)
    terms = compute_terms(objective.in_pass(inputs), batch, logps, entropies, weights, batch.mask)
    logps, entropies = (only_where(batch.mask, x.detach()) for x in (logps, entropies))
    return make_output(objective, batch, logps, entropies, terms, return_stats)


@takes(Inputs)
def linear_grpo_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    completion_ids: Tensor,
    advantages: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    objective: Objective = Objective(),  # noqa: B008 (frozen)
    return_stats: bool = True,
    **inputs: Unpack[Inputs],
) -> GRPOOutput:
    """`linear_grpo_loss` as a textbook would write it: all logits, then `grpo_loss_reference`.

    It computes in the dtype of hidden and weight.

    Args:
        hidden, weight, completion_ids, advantages, bias, logit_scale, softcap, vocab_size and the rest: as in
            `linear_grpo_loss`, which also has `chunk_size`, `backend`, `logits_dtype` and `column_tolerance`.

    Returns:
        GRPOOutput in that dtype.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    check_names(inputs, Inputs, "linear_grpo_loss_reference")
    check_rows(hidden, completion_ids, "hidden", "H")
    logits = project(hidden, weight[:vocab_size], None if bias is None else bias[:vocab_size], logit_scale, softcap)
    return grpo_loss_reference(
        logits, completion_ids, advantages, objective=objective, return_stats=return_stats, **inputs
    )


def in_sets(sets: KeptSets, vocab: int) -> Tensor:
    """(N, V) bool: what a row is over, which is everything without a set."""
    row = torch.repeat_interleave(torch.arange(len(sets.size), device=sets.ids.device), sets.size)
    begin = sets.start - (sets.size.cumsum(0) - sets.size)
    ids = sets.ids[begin[row] + torch.arange(len(row), device=row.device)].long()
    inside = (~sets.given)[:, None].repeat(1, vocab)
    inside[row, ids] = True
    return inside


def project(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """The logits, softcap(logit_scale · (hidden @ weightᵀ + bias)), (B, T, V) or (N, V)."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
