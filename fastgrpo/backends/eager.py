"""The backend "torch": the row sweeps in plain torch, for any device and float dtype; slower, no fused objective.

Works through the rows a few at a time, so that its fp32 copies stay small whatever N is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .contract import Call, Rows, Scores, TokenLoss, TokenRows, TokenSpec

_BYTES = 64 << 20  # of one temporary


def unavailable() -> str | None:
    return None


def refuses(call: Call) -> str | None:
    """None, or why this backend cannot take such a call."""
    if call.fused:
        return "it has no fused objective"
    if call.one_pass:
        return "it reads a row more than once"
    return None


def _chunks(*tensors: Tensor) -> Iterator[Any]:
    """(slice of rows, (n, V) views of the tensors (B, T, V) there), over all rows, few enough at a time."""
    batch, length, vocab = tensors[0].shape
    if all(batch == 1 or length == 1 or x.stride(0) == length * x.stride(1) for x in tensors):
        tensors = tuple(x.flatten(0, 1)[None] for x in tensors)  # rows evenly apart: batches need no step of their own
        batch, length = 1, batch * length
    step = max(1, _BYTES // (4 * vocab))
    for b in range(batch):
        for start in range(0, length, step):
            stop = min(start + step, length)
            yield slice(b * length + start, b * length + stop), *(x[b, start:stop] for x in tensors)


def _capped(x: Tensor, softcap: float | None) -> Tensor:
    return x if softcap is None else torch.tanh(x / softcap) * softcap


def row_stats(logits: Tensor, rows: Rows, *, want_entropy: bool, softcap: float | None = None) -> Scores:
    ids, mask, inv_temperature = rows
    assert mask is not None
    dtype, vocab = inv_temperature.dtype, logits.size(-1)
    logp, lse = (torch.zeros(ids.shape, dtype=dtype, device=logits.device) for _ in range(2))
    entropy = torch.zeros_like(logp) if want_entropy else None
    for part, x in _chunks(logits):
        scored = mask[part]
        # masked rows are overwritten, not multiplied by 0: they may hold NaN
        z = _capped(torch.where(scored[:, None], x.to(dtype), 0.0), softcap) * inv_temperature[part, None]
        highest = z.amax(-1)
        z = z - highest[:, None]  # what follows is exact also where |z| is large
        if len(z) == 1:
            z = z.repeat(2, 1)  # torch would split a lone sum over threads: other bits than among other rows
        p = z.exp()
        total = p.sum(-1)[: len(highest)]
        log_sum = total.log()
        lse[part] = torch.where(scored, highest + log_sum, 0.0)
        inside = (ids[part] >= 0) & (ids[part] < vocab)
        target = z[: len(highest)].gather(-1, ids[part].clamp(0, vocab - 1)[:, None])[:, 0]
        value = torch.where(inside, target - log_sum, torch.nan)
        logp[part] = torch.where(scored, value, 0.0)
        if entropy is not None:
            expected = torch.where(p == 0, 0.0, p * z).sum(-1)[: len(highest)] / total  # p = 0 at z = -inf
            entropy[part] = torch.where(scored, log_sum - expected, 0.0)
    return Scores(logp, lse, entropy)


def row_grad(
    logits: Tensor,
    rows: Rows,
    scores: Scores,
    g: Tensor,
    h: Tensor | None,
    out: Tensor,
    *,
    softcap: float | None = None,
) -> None:
    ids, _, inv_temperature = rows
    _, lse, entropy = scores
    dtype, vocab = inv_temperature.dtype, logits.size(-1)
    for part, x, gradient in _chunks(logits, out):
        active = g[part] != 0 if h is None else (g[part] != 0) | (h[part] != 0)
        capped = _capped(torch.where(active[:, None], x.to(dtype), 0.0), softcap)
        z = capped * inv_temperature[part, None]
        logp = z - lse[part, None]
        p = logp.exp()
        coefficient = -g[part, None]
        if h is not None:
            assert entropy is not None
            coefficient = coefficient - h[part, None] * torch.where(p == 0, 0.0, logp + entropy[part, None])
        grad = p * coefficient
        inside = (ids[part] >= 0) & (ids[part] < vocab)
        grad.scatter_add_(
            -1, ids[part].clamp(0, vocab - 1)[:, None], torch.where(inside, g[part], 0.0)[:, None].to(dtype)
        )
        if softcap is not None:
            grad *= 1 - (capped / softcap).square()
        gradient.copy_(torch.where(active[:, None], grad * inv_temperature[part, None], 0.0))


def token_loss(
    logits: Tensor,
    rows: Rows,
    token: TokenRows,
    spec: TokenSpec,
    out: Tensor | None,
    *,
    want_entropy: bool,
    softcap: float | None = None,
) -> TokenLoss:
    raise NotImplementedError("backend 'torch' has no fused objective")


def scale_(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor)
