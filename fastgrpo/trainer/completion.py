"""What is computed at the completion's positions of a batch of GRPOTrainer's: the loss, and log probabilities."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastgrpo.linear import linear_grpo_loss
from fastgrpo.logps import linear_logps
from fastgrpo.models.calls import frozen
from fastgrpo.models.head import Head, run_completion_head
from fastgrpo.objective import Objective
from fastgrpo.output import GRPOOutput
from fastgrpo.trainer.config import GRPOConfig
from fastgrpo.trainer.sampling import sets_of


def completion_loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    args: GRPOConfig,
    objective: Objective,
    *,
    num_items: Tensor | float | None,
    loss_scale: float,
) -> tuple[Tensor, GRPOOutput]:
    """(the fused loss, through which the gradient goes back into the model; all results of `linear_grpo_loss`)."""
    outputs: list[GRPOOutput] = []

    def at_head(hidden: Tensor, head: Head) -> Tensor:
        output = linear_grpo_loss(
            hidden,
            head.weight,
            batch["completion_ids"],
            batch["advantages"],
            completion_mask=batch["completion_mask"],
            old_per_token_logps=batch.get("old_per_token_logps"),
            ref_per_token_logps=batch.get("ref_per_token_logps"),
            num_items_in_batch=num_items,
            loss_scale=loss_scale,
            temperature=args.temperature,
            objective=objective,
            **sets_of(batch),
            **args.head_options,
            **head.options,
        )
        outputs.append(output)
        return output.loss

    return _over_completion(model, batch, at_head), outputs[0]


def frozen_logps(model: nn.Module, batch: dict[str, Tensor], args: GRPOConfig, size: int) -> Tensor:
    """Per-token log probabilities (B, T) without gradients, `size` completions at a time."""

    def logps(part: dict[str, Tensor]) -> Tensor:
        def at_head(hidden: Tensor, head: Head) -> Tensor:
            return linear_logps(
                hidden,
                head.weight,
                part["completion_ids"],
                mask=part["completion_mask"],
                temperature=args.temperature,
                **sets_of(part),
                **args.head_options,
                **head.options,
            )

        return _over_completion(model, part, at_head)

    starts = range(0, len(batch["completion_ids"]), size)
    parts = ({name: x[start : start + size] for name, x in batch.items() if x.dim()} for start in starts)
    with frozen(model):
        return torch.cat([logps(part) for part in parts])


def _over_completion(model: nn.Module, batch: dict[str, Tensor], fn: Callable[[Tensor, Head], Tensor]) -> Tensor:
    """fn(hidden (B, T, H), head) at the completion's positions of a batch."""
    return run_completion_head(
        model,
        torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        batch["completion_ids"].shape[1],
        fn,
    )
