"""The objective alone, for frameworks that already have per-token logps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo.checks import FLOATS, check, check_dtype
from fastgrpo.layout import make_batch
from fastgrpo.loss import GRPOOutput, make_output
from fastgrpo.objective import Objective, compute_objective


def policy_loss(
    per_token_logps: Tensor,
    advantages: Tensor | None = None,
    *,
    entropies: Tensor | None = None,
    completion_mask: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    rewards: Tensor | None = None,
    num_generations: int | None = None,
    scale_rewards: str = "group",
    importance_sampling_ratio: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    loss_scale: Tensor | float = 1.0,
    cu_seqlens: Tensor | None = None,
    objective: Objective = Objective(),  # noqa: B008 (frozen)
    return_stats: bool = True,
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
    check(isinstance(per_token_logps, Tensor), "per_token_logps", "a tensor", per_token_logps)
    check_dtype("per_token_logps", per_token_logps, *FLOATS)
    check(per_token_logps.dim() in (1, 2), "per_token_logps", "shape (B, T) or (N,)", per_token_logps)
    dtype = torch.float64 if per_token_logps.dtype == torch.float64 else torch.float32
    shape = per_token_logps.shape
    batch = make_batch(
        torch.zeros(shape, dtype=torch.int64, device=per_token_logps.device),
        advantages,
        objective=objective,
        dtype=dtype,
        completion_mask=completion_mask,
        old_per_token_logps=old_per_token_logps,
        ref_per_token_logps=ref_per_token_logps,
        rewards=rewards,
        num_generations=num_generations,
        scale_rewards=scale_rewards,
        importance_sampling_ratio=importance_sampling_ratio,
        sampling_per_token_logps=sampling_per_token_logps,
        num_items_in_batch=num_items_in_batch,
        loss_scale=loss_scale,
        cu_seqlens=cu_seqlens,
    )
    if entropies is None:
        needs = objective.entropy_coef != 0 or objective.top_entropy_quantile < 1
        check(not needs, "entropies", "a tensor with an entropy bonus or top_entropy_quantile < 1", None)
    else:
        ok = isinstance(entropies, Tensor) and entropies.shape == shape
        check(ok, "entropies", f"a tensor of shape {tuple(shape)}", entropies)
        check_dtype("entropies", entropies, *FLOATS)
        entropies = entropies.to(dtype).reshape(-1)
    logps = per_token_logps.to(dtype).reshape(-1)
    terms = compute_objective(objective, logps, entropies, batch)
    if not return_stats:
        return GRPOOutput(terms.loss)
    logps, entropies = (None if x is None else batch.scored_only(x.detach()) for x in (logps, entropies))
    return make_output(objective, batch, terms.loss, logps, entropies, *terms[1:])
