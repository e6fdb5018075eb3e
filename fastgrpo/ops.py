"""The operators of the row sweeps, `torch.ops.fastgrpo.*`: schemas, fakes and autograd formulas, for every backend.

row_stats and token_loss are differentiable; their backward passes call row_grad and the operators in place, whose
names end in an underscore. Each operator takes the name of a backend, which `backends.select` has chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastgrpo import backends
from fastgrpo.backends import Rows, Scores, TokenLoss, TokenRows, TokenSpec


def empty_gradient(logits: Tensor) -> Tensor:
    """An uninitialised gradient, with the strides of the logits if they are a slice of rows.

    With equal strides every row of both has the same alignment, so the kernels' wide accesses fit both.
    """
    span = row_span(logits)
    if span is not None and span <= 1.25 * logits.numel():
        return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def row_span(logits: Tensor) -> int | None:
    """Elements from the first to the last of (B, T, V) logits; None if rows share memory, as expanded ones do."""
    span = logits.size(-1)
    for stride, size in sorted(zip(logits.stride()[:2], logits.shape[:2], strict=True)):
        if size > 1:
            if stride < span:
                return None
            span += stride * (size - 1)
    return span


def with_tensors(results: Scores | TokenLoss) -> tuple[Tensor, ...]:
    """The same for a schema, where entropies that were not wanted are empty."""
    return tuple(results._replace(entropy=results.logp.new_empty(0)) if results.entropy is None else results)


def encode_spec(spec: TokenSpec) -> list[float]:
    """A TokenSpec as a schema can hold it."""
    return [float(x) for x in (*spec._replace(numbers=len(spec.numbers)), *spec.numbers)]


def _decode_spec(numbers: list[float]) -> TokenSpec:
    kind, count, beta, *flags = numbers[: -int(numbers[1])]
    bias_correction, group_size, scale_by_std, skip_zero = map(int, flags)
    return TokenSpec(int(kind), tuple(numbers[-int(count) :]), beta, bool(bias_correction), group_size,
                     bool(scale_by_std), bool(skip_zero))  # fmt: skip


def _row_grad(logits, ids, lse, entropy, g, h, inv_temperature, out, backend) -> None:
    rows, scores = Rows(ids, None, inv_temperature), Scores(None, lse, entropy)
    backends.get(backend).row_grad(logits, rows, scores, g, h, out)


def _rows_like(ids: Tensor, inv_temperature: Tensor, count: int) -> list[Tensor]:
    return [torch.empty(ids.shape, dtype=inv_temperature.dtype, device=ids.device) for _ in range(count)]


@torch.library.custom_op("fastgrpo::row_stats", mutates_args=())
def row_stats(
    logits: Tensor, ids: Tensor, mask: Tensor, inv_temperature: Tensor, want_entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, lse, entropy) of each row, (N,) fp32; entropy is empty unless wanted. Masked rows are not read."""
    scores = backends.get(backend).row_stats(logits, Rows(ids, mask, inv_temperature), want_entropy=want_entropy)
    return with_tensors(scores)


@row_stats.register_fake
def _(logits, ids, mask, inv_temperature, want_entropy, backend):
    logp, lse, entropy = _rows_like(ids, inv_temperature, 3)
    return logp, lse, entropy if want_entropy else entropy.new_empty(0)


@torch.library.custom_op("fastgrpo::row_grad", mutates_args=())
def row_grad(
    logits: Tensor,
    ids: Tensor,
    lse: Tensor,
    entropy: Tensor,
    g: Tensor,
    h: Tensor | None,
    inv_temperature: Tensor,
    backend: str,
) -> Tensor:
    """The gradient of the logits from g = dL/dlogp and h = dL/dentropy of each row; rows with both 0 are not read."""
    out = empty_gradient(logits)
    _row_grad(logits, ids, lse, entropy, g, h, inv_temperature, out, backend)
    return out


@row_grad.register_fake
def _(logits, ids, lse, entropy, g, h, inv_temperature, backend):
    return empty_gradient(logits)


def refuse_double_backward(*_):
    raise RuntimeError(
        "fastgrpo: the loss is differentiable once; its gradient was asked to be differentiated again "
        "(double backward, create_graph=True). Use fastgrpo.reference for that."
    )


row_grad.register_autograd(refuse_double_backward)


@torch.library.custom_op("fastgrpo::row_grad_", mutates_args=("logits",))
def row_grad_(
    logits: Tensor,
    ids: Tensor,
    lse: Tensor,
    entropy: Tensor,
    g: Tensor,
    h: Tensor | None,
    inv_temperature: Tensor,
    backend: str,
) -> None:
    """row_grad, written over the logits."""
    _row_grad(logits, ids, lse, entropy, g, h, inv_temperature, logits, backend)


@row_grad_.register_fake
def _(logits, ids, lse, entropy, g, h, inv_temperature, backend):
    return None


@torch.library.custom_op("fastgrpo::scale_", mutates_args=("x",))
def scale_(x: Tensor, factor: Tensor, backend: str) -> None:
    """x *= factor (0-dim), without reading the factor on the host; x is left untouched when it is 1."""
    backends.get(backend).scale_(x, factor)


@scale_.register_fake
def _(x, factor, backend):
    return None


@torch.library.custom_op("fastgrpo::token_loss", mutates_args=())
def token_loss(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    inv_temperature: Tensor,
    want_entropy: bool,
    weight: Tensor,
    advantages: Tensor | None,
    rewards: Tensor | None,
    seq: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    policy_scale: Tensor | None,
    h: Tensor | None,
    spec: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logp, lse, entropy, kl, ratio, g) of each row: row_stats and the fused objective in one pass."""
    rows, token = (
        Rows(ids, mask, inv_temperature),
        TokenRows(weight, advantages, rewards, seq, old, ref, policy_scale, h),
    )
    kernels, spec = backends.get(backend), _decode_spec(spec)
    return with_tensors(kernels.token_loss(logits, rows, token, spec, None, want_entropy=want_entropy))


@torch.library.custom_op("fastgrpo::token_loss_", mutates_args=("logits",))
def token_loss_(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    inv_temperature: Tensor,
    want_entropy: bool,
    weight: Tensor,
    advantages: Tensor | None,
    rewards: Tensor | None,
    seq: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    policy_scale: Tensor | None,
    h: Tensor | None,
    spec: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """token_loss that also writes the gradient over the logits, in the same pass."""
    rows, token = (
        Rows(ids, mask, inv_temperature),
        TokenRows(weight, advantages, rewards, seq, old, ref, policy_scale, h),
    )
    kernels, spec = backends.get(backend), _decode_spec(spec)
    return with_tensors(kernels.token_loss(logits, rows, token, spec, logits, want_entropy=want_entropy))


def _token_loss_fake(logits, ids, mask, inv_temperature, want_entropy, *_):
    loss, logp, lse, entropy, kl, ratio, g = _rows_like(ids, inv_temperature, 7)
    return loss, logp, lse, entropy if want_entropy else entropy.new_empty(0), kl, ratio, g


token_loss.register_fake(_token_loss_fake)
token_loss_.register_fake(_token_loss_fake)


def _row_stats_setup(ctx, inputs, output):
    logits, ids, mask, inv_temperature, want_entropy, ctx.backend = inputs
    _, lse, entropy = output
    ctx.save_for_backward(logits, ids, mask, inv_temperature, lse, entropy)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # so that an entropy that nobody differentiates costs no gradient


def _row_stats_backward(ctx, d_logp, _, d_entropy):
    logits, ids, mask, inv_temperature, lse, entropy = ctx.saved_tensors
    if entropy.numel() == 0:
        d_entropy = None
    if d_logp is None and d_entropy is None:
        return None, None, None, None, None, None
    # masked rows have no gradient, whatever the upstream gradient is
    g = torch.zeros_like(lse) if d_logp is None else torch.where(mask, d_logp, 0.0)
    h = None if d_entropy is None else torch.where(mask, d_entropy, 0.0)
    grad = torch.ops.fastgrpo.row_grad(logits, ids, lse, entropy, g, h, inv_temperature, ctx.backend)
    return grad, None, None, None, None, None


row_stats.register_autograd(_row_stats_backward, setup_context=_row_stats_setup)


def _token_loss_setup(ctx, inputs, output):
    logits, ids, _, inv_temperature, *_, h, _, ctx.backend = inputs
    _, logp, lse, entropy, kl, ratio, g = output
    ctx.save_for_backward(logits, ids, inv_temperature, lse, entropy, g, h)
    ctx.mark_non_differentiable(logp, lse, entropy, kl, ratio, g)
    ctx.set_materialize_grads(False)


def _token_loss_backward(ctx, d_loss, *_):
    logits, ids, inv_temperature, lse, entropy, g, h = ctx.saved_tensors
    if d_loss is None:
        return (None,) * 15
    h = None if h is None else h * d_loss
    grad = torch.ops.fastgrpo.row_grad(logits, ids, lse, entropy, g * d_loss, h, inv_temperature, ctx.backend)
    return grad, *(None,) * 14


token_loss.register_autograd(_token_loss_backward, setup_context=_token_loss_setup)
