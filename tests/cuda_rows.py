"""Rows of logits for the CUDA backend's tests, and the truth about them in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fastgrpo.backends import TokenRows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make(B, T, V, dtype=torch.float32, *, seed=0, offset=0, stride=None, device="cpu"):
    """(logits, ids, mask, inv_temperature); rows `stride` apart, the first one `offset` elements past an aligned
    address, NaN around them."""
    generator = torch.Generator().manual_seed(seed)
    stride = V if stride is None else stride
    store = torch.full((offset + B * T * stride + 16,), math.nan, dtype=dtype, device=device)
    logits = store.as_strided((B, T, V), (T * stride, stride, 1), offset)
    logits.copy_(torch.randn(B, T, V, generator=generator) * 3)
    ids = torch.randint(V, (B * T,), generator=generator).to(device)
    inv_temperature = (torch.rand(B * T, generator=generator) + 0.5).to(device)
    return logits, ids, torch.ones(B * T, dtype=torch.bool, device=device), inv_temperature


def exact(logits, ids, inv_temperature):
    """(logp, lse, entropy, p, log p) in float64."""
    z = logits.double().flatten(0, 1) * inv_temperature.double()[:, None]
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    entropy = -torch.where(p == 0, 0.0, p * log_p).sum(-1)
    return log_p.gather(1, ids[:, None])[:, 0], z.logsumexp(-1), entropy, p, log_p


def exact_grad(ids, g, h, inv_temperature, entropy, p, log_p):
    grad = g.double()[:, None] * (F.one_hot(ids, p.shape[1]).double() - p)
    if h is not None:
        grad -= h.double()[:, None] * torch.where(p == 0, 0.0, p * (log_p + entropy[:, None]))
    return grad * inv_temperature.double()[:, None]


def rows_of(n, device, **given):
    weight = torch.full((n,), 0.25, device=device)
    return TokenRows(**{**dict.fromkeys(TokenRows._fields), "weight": weight, **given})
