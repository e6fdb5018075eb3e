"""Results in float64, a few rows at a time, and how far others are from them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastgrpo import grpo_loss_reference
from fastgrpo.bench.operation import Inputs, Results

TOLERANCE = {"bf16": 5e-2, "fp16": 2e-2, "fp32": 1e-4}  # of the worst result, relative by norm; beyond, no time


def exact_loss(inputs: Inputs, each: Callable[[slice], tuple[Tensor, Callable[[Tensor], None] | None]]) -> Tensor:
    """The loss of a case; every token is for itself in these objectives, so that a few can be taken at a time.

    Args:
        each: the logits (n, V) float64 of some tokens, before a softcap, and what takes their gradient; None: no
            gradient is wanted.
    """
    case, device = inputs.case, inputs.ids.device
    advantages = inputs.advantages[:, None].expand(case.B, case.T)
    ids, advantages, old, ref = (x.flatten()[:, None] for x in (inputs.ids, advantages, inputs.old, inputs.ref))
    total = torch.zeros((), dtype=torch.float64, device=device)
    # on a CPU, what the C library takes from the system afresh each time would cost more than the arithmetic
    few = max(1, (1 << (24 if device.type == "cpu" else 30)) // (8 * case.V))
    for first in range(0, len(ids), few):
        part = slice(first, first + few)
        leaf, take = each(part)
        leaf.requires_grad_(take is not None)
        logits = leaf if not case.softcap else torch.tanh(leaf / case.softcap) * case.softcap
        loss = grpo_loss_reference(
            logits[:, None], ids[part], advantages[part], old_per_token_logps=old[part], ref_per_token_logps=ref[part],
            objective=case.objective, num_items_in_batch=len(ids), return_stats=False,
        ).loss  # fmt: skip
        total += loss.detach()
        if take is not None:
            loss.backward()
            take(leaf.grad)
    return total


def error(results: Results, want: Results, advantages: Tensor | None = None) -> float:
    """The worst result's error, relative by norm; a loss's relative to the mean size of its terms, which cancel."""
    worst = 0.0
    for name, exact in want.items():
        if name not in results:
            continue
        got = results[name]
        if got.shape != exact.shape:
            return float("inf")
        difference, size = 0.0, 0.0
        for a, b in zip(_pieces(got), _pieces(exact), strict=True):
            difference += float(torch.linalg.vector_norm(a - b, dtype=torch.float64)) ** 2
            size += float(torch.linalg.vector_norm(b, dtype=torch.float64)) ** 2
        if name == "loss" and advantages is not None:
            size = max(size, float(advantages.abs().mean()) ** 2)
        relative = (difference / size) ** 0.5 if size else difference
        if math.isnan(relative):
            return relative
        worst = max(worst, relative)
    return worst


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    return x.detach().reshape(-1).split(1 << 26)
