"""The objective alone, for frameworks that already have per-token logps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastgrpo.batch.batch import wide
from fastgrpo.batch.checks import FLOATS, check, check_dtype, check_tensor
from fastgrpo.batch.inputs import PolicyInputs, check_names, make_batch, takes
from fastgrpo.objective import Objective
from fastgrpo.objective.options import check_objective
from fastgrpo.objective.sampler import corrected
from fastgrpo.objective.terms import compute_terms, only_where, row_weights
from fastgrpo.output import GRPOOutput, make_output

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(PolicyInputs)
def policy_loss(
    per_token_logps: Tensor,
    advantages: Tensor | None = None,
    *,
    entropies: Tensor | None = None,
    objective: Objective = Objective(),  # noqa: B008 (frozen)
    return_stats: bool = True,
    **inputs: Unpack[PolicyInputs],
) -> GRPOOutput:
    """The GRPO loss from log-probabilities that your own forward pass made, in plain torch.

    It is the loss of `grpo_loss` from its logp on: by default

        loss = loss_scale · 1/D Σ mask · (-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta · KL)

    with r = exp(logp - old).

    Args:
        per_token_logps (B, T) or packed (N,) float: logps of the sampled tokens.
        entropies like per_token_logps: entropies of their distributions, in nats. An entropy bonus needs them, and is
            differentiable in them; top_entropy_quantile < 1 needs them, too; otherwise they are a statistic.
        The rest: as in `grpo_loss`.

    Returns:
        GRPOOutput; its loss is differentiable in per_token_logps and entropies.

    Raises:
        ValueError: names the argument, what was expected and what came.

    Equivalent to: TRL 1.16's `GRPOTrainer._compute_loss` after its logps.
    """
    check_names(inputs, PolicyInputs, "policy_loss")
    check(isinstance(per_token_logps, Tensor), "per_token_logps", "a tensor", per_token_logps)
    check_dtype("per_token_logps", per_token_logps, *FLOATS)
    check(per_token_logps.dim() in (1, 2), "per_token_logps", "shape (B, T) or (N,)", per_token_logps)
    check_objective(objective, inputs)
    dtype, shape = wide(per_token_logps.dtype), per_token_logps.shape
    ids = torch.zeros(shape, dtype=torch.int64, device=per_token_logps.device)
    batch = corrected(objective.corrections, make_batch(ids, advantages, inputs, dtype=dtype))
    if entropies is None:
        check(
            not objective.needs_entropy,
            "entropies",
            f"a tensor because the loss {objective.loss_name}, an entropy bonus or top_entropy_quantile < 1 reads it",
            None,
        )
    else:
        check_tensor("entropies", entropies, shape, per_token_logps.device, *FLOATS)
        entropies = entropies.to(dtype).reshape(-1)
    logps = per_token_logps.to(dtype).reshape(-1)
    weights = row_weights(objective, batch)
    terms = compute_terms(objective.in_pass(inputs), batch, logps, entropies, weights, batch.mask)
    if entropies is not None:
        entropies = only_where(batch.mask, entropies.detach())
    return make_output(objective, batch, only_where(batch.mask, logps.detach()), entropies, terms, return_stats)
