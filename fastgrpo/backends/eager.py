"""The backend "torch": rows and a few columns of them in plain torch, for any device and float dtype; slower, no fused
objective.

Works through the rows a few at a time, so that its fp32 copies stay small whatever N is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .contract import Call, Columns, Rows, Scores, TokenLoss, TokenRows, TokenSpec

_BYTES = 64 << 20  # of one temporary
_BIN_BITS = 20  # of the 31 of a magnitude in fp32 that its bin leaves out: 3 of the mantissa stay


def unavailable() -> str | None:
    return None


def refuses(call: Call) -> str | None:
    """None, or why this backend cannot take such a call."""
    if call.fused:
        return "it has no fused objective"
    if call.one_pass:
        return "it reads a row more than once"
    return None


def pieces(*tensors: Tensor) -> Iterator[Any]:
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


def cap(x: Tensor, softcap: float | None) -> Tensor:
    return x if softcap is None else torch.tanh(x / softcap) * softcap


def row_stats(logits: Tensor, rows: Rows, *, want_entropy: bool, softcap: float | None = None) -> Scores:
    ids, mask, inv_temperature = rows
    assert mask is not None
    dtype, vocab = inv_temperature.dtype, logits.size(-1)
    logp, lse = (torch.zeros(ids.shape, dtype=dtype, device=logits.device) for _ in range(2))
    entropy = torch.zeros_like(logp) if want_entropy else None
    for part, x in pieces(logits):
        scored = mask[part]
        # masked rows are overwritten, not multiplied by 0: they may hold NaN
        z = cap(torch.where(scored[:, None], x.to(dtype), 0.0), softcap) * inv_temperature[part, None]
        highest = z.amax(-1)
        z = z - highest[:, None]  # what follows is exact also where |z| is large
        # The target stands apart: of a sum near 1 that holds it, 1 - p would have few digits.
        at, inside = _targets(ids[part], vocab)
        t = z.gather(-1, at)
        z.scatter_(-1, at, torch.where(inside, -torch.inf, t))
        t, inside = t[:, 0], inside[:, 0]
        if len(z) == 1:
            z = z.repeat(2, 1)  # torch would split a lone sum over threads: other bits than among other rows
        p = z.exp()
        others, e = p.sum(-1)[: len(t)], torch.where(inside, t.exp(), 0.0)
        total, leads = others + e, others <= e
        log_sum = total.log()
        lse[part] = torch.where(scored, highest + log_sum, 0.0)
        value = torch.where(inside, torch.where(leads, -torch.log1p(others / e), t - log_sum), torch.nan)
        logp[part] = torch.where(scored, value, 0.0)
        if entropy is not None:
            weighted = torch.where(p == 0, 0.0, p * z).sum(-1)[: len(t)]  # p = 0 at z = -inf
            near_one = (t * others - weighted) / total - value
            usual = log_sum - (weighted + torch.where(e == 0, 0.0, e * t)) / total
            entropy[part] = torch.where(scored, torch.where(leads, near_one, usual), 0.0)
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
    for part, x, gradient in pieces(logits, out):
        gradient.copy_(_gradient(x, *_of(part, rows, scores, g, h), softcap))


def _of(part: slice, rows: Rows, scores: Scores, g: Tensor, h: Tensor | None) -> tuple[Rows, Scores, Tensor, Any]:
    """What row_grad reads of a few rows."""
    entropy = None if h is None or scores.entropy is None else scores.entropy[part]
    few = Rows(rows.ids[part], None, rows.inv_temperature[part])
    return few, Scores(scores.logp[part], scores.lse[part], entropy), g[part], None if h is None else h[part]


def _gradient(x: Tensor, rows: Rows, scores: Scores, g: Tensor, h: Tensor | None, softcap: float | None) -> Tensor:
    """dL/dlogits (n, V) of a few rows x (n, V), in the dtype of their temperature."""
    ids, _, inv_temperature = rows
    logp, lse, entropy = scores
    dtype, vocab = inv_temperature.dtype, x.size(-1)
    active = g != 0 if h is None else (g != 0) | (h != 0)
    capped = cap(torch.where(active[:, None], x.to(dtype), 0.0), softcap)
    log_p = capped * inv_temperature[:, None] - lse[:, None]
    p = log_p.exp()
    coefficient = -g[:, None]
    if h is not None:
        assert entropy is not None
        coefficient = coefficient - h[:, None] * torch.where(p == 0, 0.0, log_p + entropy[:, None])
    grad = p * coefficient
    at, inside = _targets(ids, vocab)
    grad.scatter_(-1, at, torch.where(inside, _at_target(logp, entropy, g, h)[:, None], grad.gather(-1, at)))
    if softcap is not None:
        grad *= 1 - (capped / softcap).square()
    return torch.where(active[:, None], grad * inv_temperature[:, None], 0.0)


def _at_target(logp: Tensor, entropy: Tensor | None, g: Tensor, h: Tensor | None) -> Tensor:
    """(n,) dL/d(logits over the temperature) at the targets."""
    dz = g * -torch.expm1(logp)
    if h is not None:
        assert entropy is not None
        p = logp.exp()
        dz = dz - h * torch.where(p == 0, 0.0, p * (logp + entropy))
    return dz


def _targets(ids: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """((n, 1) where to find the targets, (n, 1) bool: whether there is one)."""
    return ids.clamp(0, vocab - 1)[:, None], ((ids >= 0) & (ids < vocab))[:, None]


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


# ---- a few columns of each row


def _few(length: int, elements: int) -> Iterator[slice]:
    """Slices of [0, length), each of so few steps of so many elements that an fp32 copy is small."""
    step = max(1, _BYTES // (4 * max(1, elements)))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _sums_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def column_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    (n, w), H, dtype = ids.shape, hidden.shape[1], _sums_in(hidden)
    z = hidden.new_empty(n, w, dtype=dtype)
    for part in _few(n, w * H):
        at = ids[part].clamp(min=0).long()
        products = (weight[at].to(dtype) * hidden[part, None].to(dtype)).view(-1, H)
        if len(products) == 1:
            products = products.repeat(2, 1)  # torch would split a lone sum over threads
        z[part] = products.sum(-1)[: at.numel()].view(at.shape)
        if bias is not None:
            z[part] += bias[at]
    return z.masked_fill_(ids < 0, -torch.inf)


def column_d_hidden(dz: Tensor, ids: Tensor, weight: Tensor, out: Tensor) -> None:
    dtype = _sums_in(weight)
    for part in _few(len(ids), weight.shape[1]):
        total = out.new_zeros(ids[part].shape[0], weight.shape[1], dtype=dtype)
        for k in range(ids.shape[1]):
            at = ids[part, k].long()
            product = dz[part, k, None] * weight[at.clamp(min=0)].to(dtype)
            total += product.masked_fill_(at[:, None] < 0, 0)
        out[part] = total.to(out.dtype)


def column_d_weight(dz: Tensor, ids: Tensor, rows: Tensor, hidden: Tensor, out: Tensor, d_bias: Tensor | None) -> None:
    dtype = _sums_in(hidden)
    ordered, order = ids.sort(stable=True)
    order = order[ordered >= 0]
    named, lengths = ids[order].long().unique_consecutive(return_counts=True)
    if len(named) == 0:
        return
    dz, rows = dz[order].to(dtype), rows[order].long()

    def sums(x: Tensor) -> Tensor:  # in order, on any device
        return torch.segment_reduce(x.contiguous(), "sum", lengths=lengths, axis=0)

    for part in _few(hidden.shape[1], len(order)):
        columns = out[:, part]
        total = sums(dz[:, None] * hidden[:, part][rows].to(dtype))
        columns[named] = (columns[named].to(dtype) + total).to(out.dtype)
    if d_bias is not None:
        d_bias[named] += sums(dz[:, None])[:, 0]


def select_columns(
    logits: Tensor,
    rows: Rows,
    scores: Scores,
    g: Tensor,
    h: Tensor | None,
    tolerance: float,
    room: int,
    *,
    softcap: float | None = None,
) -> Columns:
    n, vocab = rows.ids.numel(), logits.shape[-1]
    ids = torch.full((n, room), -1, dtype=torch.int32, device=logits.device)
    dz = torch.zeros((n, room), dtype=rows.inv_temperature.dtype, device=logits.device)
    sizes = torch.zeros(n, dtype=torch.int32, device=logits.device)
    for part, x in pieces(logits):
        gradient = _gradient(x, *_of(part, rows, scores, g, h), softcap)
        is_target = torch.arange(vocab, device=logits.device) == rows.ids[part, None]
        others = gradient.abs().masked_fill(is_target, 0)
        _, exponent = torch.frexp(others.amax(-1, keepdim=True))
        scaled = torch.ldexp(others, -exponent).float()  # no subnormals, whose bins are wide
        order = (scaled.view(torch.int32) >> _BIN_BITS).argsort(dim=-1, stable=True)
        sums = others.gather(-1, order).double().cumsum(-1)
        total = sums[:, -1:] + torch.where(is_target, gradient.abs(), 0.0).sum(-1, keepdim=True)
        kept = torch.empty_like(is_target).scatter_(-1, order, ~(sums <= tolerance * total)) | is_target
        size = torch.where(total[:, 0].isfinite(), kept.sum(-1), room + 1)
        active = g[part] != 0 if h is None else (g[part] != 0) | (h[part] != 0)
        sizes[part] = torch.where(active, size, 0)
        kept &= (active & (size <= room))[:, None]
        row, column = kept.nonzero(as_tuple=True)
        place = kept.cumsum(-1)[row, column] - 1
        ids[part][row, place] = column.int()
        dz[part][row, place] = gradient[row, column]
    return Columns(ids, dz, sizes)
