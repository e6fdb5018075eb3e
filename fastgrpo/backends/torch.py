"""The row sweeps in plain torch: any device, any float dtype, slower; no fused objective (`token_loss`).

Works through the rows a few at a time, so that its fp32 copies stay small whatever N is.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BYTES = 64 << 20  # of one temporary


def unavailable() -> str | None:
    return None


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    return None


def _chunks(*tensors: Tensor):
    """(slice of rows, (n, V) views of the tensors (B, T, V) there), over all rows, few enough at a time."""
    batch, length, vocab = tensors[0].shape
    if all(batch == 1 or length == 1 or x.stride(0) == length * x.stride(1) for x in tensors):
        tensors = [x.flatten(0, 1)[None] for x in tensors]  # rows evenly apart: batches need no step of their own
        batch, length = 1, batch * length
    step = max(1, _BYTES // (4 * vocab))
    for b in range(batch):
        for start in range(0, length, step):
            stop = min(start + step, length)
            yield slice(b * length + start, b * length + stop), *(x[b, start:stop] for x in tensors)


def _capped(x: Tensor, softcap: float) -> Tensor:
    return torch.tanh(x / softcap) * softcap if softcap else x


def row_stats(
    logits: Tensor, ids: Tensor, mask: Tensor, inv_temperature: Tensor, want_entropy: bool, softcap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, vocab = inv_temperature.dtype, logits.size(-1)
    logp, lse = (torch.zeros(ids.shape, dtype=dtype, device=logits.device) for _ in range(2))
    entropy = torch.zeros_like(logp) if want_entropy else logp.new_empty(0)
    for rows, x in _chunks(logits):
        scored = mask[rows]
        # masked rows are overwritten, not multiplied by 0: they may hold NaN
        z = _capped(torch.where(scored[:, None], x.to(dtype), 0.0), softcap) * inv_temperature[rows, None]
        highest = z.amax(-1)
        z = z - highest[:, None]  # what follows is exact also where |z| is large
        if len(z) == 1:
            z = z.repeat(2, 1)  # torch would split a lone sum over threads: other bits than among other rows
        p = z.exp()
        total = p.sum(-1)[: len(highest)]
        log_sum = total.log()
        lse[rows] = torch.where(scored, highest + log_sum, 0.0)
        inside = (ids[rows] >= 0) & (ids[rows] < vocab)
        target = z[: len(highest)].gather(-1, ids[rows].clamp(0, vocab - 1)[:, None])[:, 0]
        value = torch.where(inside, target - log_sum, torch.nan)
        logp[rows] = torch.where(scored, value, 0.0)
        if want_entropy:
            expected = torch.where(p == 0, 0.0, p * z).sum(-1)[: len(highest)] / total  # p = 0 at z = -inf
            entropy[rows] = torch.where(scored, log_sum - expected, 0.0)
    return logp, lse, entropy


def row_grad(
    logits: Tensor,
    ids: Tensor,
    lse: Tensor,
    entropy: Tensor,
    g: Tensor,
    h: Tensor | None,
    inv_temperature: Tensor,
    out: Tensor,
    softcap: float = 0.0,
) -> None:
    dtype, vocab = inv_temperature.dtype, logits.size(-1)
    for rows, x, gradient in _chunks(logits, out):
        active = g[rows] != 0 if h is None else (g[rows] != 0) | (h[rows] != 0)
        capped = _capped(torch.where(active[:, None], x.to(dtype), 0.0), softcap)
        z = capped * inv_temperature[rows, None]
        logp = z - lse[rows, None]
        p = logp.exp()
        coefficient = -g[rows, None]
        if h is not None:
            coefficient = coefficient - h[rows, None] * torch.where(p == 0, 0.0, logp + entropy[rows, None])
        grad = p * coefficient
        inside = (ids[rows] >= 0) & (ids[rows] < vocab)
        grad.scatter_add_(
            -1, ids[rows].clamp(0, vocab - 1)[:, None], torch.where(inside, g[rows], 0.0)[:, None].to(dtype)
        )
        if softcap:
            grad *= 1 - (capped / softcap).square()
        gradient.copy_(torch.where(active[:, None], grad * inv_temperature[rows, None], 0.0))


def scale_(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor)
