"""Per-token logps and entropies, differentiable, for the policy of today, of yesterday and of reference."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo import backends, ops
from fastgrpo.layout import Padded, check_ids, check_rows, make_inv_temperature, make_mask
from fastgrpo.loss import as_rows


def selective_logps(
    logits: Tensor,
    completion_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """logp_t = z_t[id] - logsumexp(z_t) with z = logits / temperature, in one read of the logits; differentiable.

    A row's result depends on that row alone, bit for bit: the same completion scored alone or in another batch gives
    the same logps, and they equal those inside `grpo_loss`, so that a first update's ratio is exactly 1.

    Args:
        logits (B, T, V) or (N, V), fp32, bf16, fp16 (float64 in plain torch): row t predicts completion_ids[:, t].
        completion_ids (B, T) or (N,) integer.
        mask like completion_ids: rows to score (nonzero); others are not read and give 0.
        temperature: number > 0, or a tensor per sequence (B,) or per token (B, T) / (N,).
        return_entropy: also return the entropies, in nats (of the distribution at that temperature).
        backend: "auto", "cpu", "triton" or "torch".

    Returns:
        logps like completion_ids, fp32; or (logps, entropies).

    Raises:
        ValueError: names the argument, what was expected and what came.

    Equivalent to: trl.trainer.utils.selective_log_softmax, and entropy_from_logits for the entropy.
    """
    check_rows(logits, completion_ids, "logits", "V")
    shape, device = completion_ids.shape, completion_ids.device
    ids = completion_ids.reshape(-1).long().contiguous()
    scored = make_mask(mask, shape, device, "mask")
    check_ids(ids, scored, logits.size(-1), mask_name="mask")
    layout = Padded(*shape) if len(shape) == 2 else Padded(shape[0], 1)  # rows of their own: per token is per sequence
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    inv_temperature = make_inv_temperature(temperature, layout, shape, scored, dtype)
    backend = backends.select(logits, backend)
    logps, _, entropies = ops.row_stats(as_rows(logits), ids, scored, inv_temperature, return_entropy, backend)
    return (logps.view(shape), entropies.view(shape)) if return_entropy else logps.view(shape)
