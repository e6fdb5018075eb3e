"""The operators `torch.ops.fastgrpo.*`, for compiled graphs alone: schemas, fakes, autograd formulas.

An operator takes tensors and numbers, where the engine takes objects. Each has beside it the function that takes the
objects apart; its body puts them together again and calls what an eager call calls.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgrpo.backends import Rows, Scores, TokenLoss, TokenRows, TokenSpec
from fastgrpo.engine import hidden as chunks
from fastgrpo.engine.head import Head
from fastgrpo.engine.logits import Fused, Sweeps, empty_gradient
from fastgrpo.engine.plan import Roles, plan_rows


def refuse_double_backward(*_):
    raise RuntimeError(
        "fastgrpo: the loss is differentiable once; its gradient was asked to be differentiated again "
        "(double backward, create_graph=True). Use fastgrpo.reference for that."
    )


def _given(x: Tensor | None, like: Tensor) -> Tensor:
    """What an operator returns for a tensor, which may not be None: an empty one in its place."""
    return like.new_empty(0) if x is None else x


def _taken(x: Tensor) -> Tensor | None:
    return x if x.numel() > 0 else None


def _answer(ctx, *gradients):
    """The gradients of an operator's first inputs; the others have none."""
    return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


# ---- sweeps over logits


def stats(logits: Tensor, sweeps: Sweeps, rows: Rows, want_entropy: bool) -> Scores:
    logp, lse, entropy = row_stats(logits, *rows, want_entropy, sweeps.backend)
    return Scores(logp, lse, entropy if want_entropy else None)


@torch.library.custom_op("fastgrpo::row_stats", mutates_args=())
def row_stats(
    logits: Tensor, ids: Tensor, mask: Tensor, inv_temperature: Tensor, want_entropy: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, lse, entropy) of each row, (N,) fp32; entropy is empty unless wanted. Masked rows are not read."""
    logp, lse, entropy = Sweeps(backend).stats(logits, Rows(ids, mask, inv_temperature), want_entropy)
    return logp, lse, _given(entropy, logp)


@row_stats.register_fake
def _(logits, ids, mask, inv_temperature, want_entropy, backend):
    logp, lse, entropy = (torch.empty_like(inv_temperature) for _ in range(3))
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
    Sweeps(backend).grad(logits, Rows(ids, None, inv_temperature), Scores(lse, lse, _taken(entropy)), g, h, out)
    return out


@row_grad.register_fake
def _(logits, *_):
    return empty_gradient(logits)


row_grad.register_autograd(refuse_double_backward)


def _row_stats_setup(ctx, inputs, output):
    logits, ids, mask, inv_temperature, _, ctx.backend = inputs
    _, lse, entropy = output
    ctx.save_for_backward(logits, ids, mask, inv_temperature, lse, entropy)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # so that an entropy that nobody differentiates costs no gradient


def _row_stats_backward(ctx, d_logp, _, d_entropy):
    logits, ids, mask, inv_temperature, lse, entropy = ctx.saved_tensors
    d_entropy = d_entropy if entropy.numel() > 0 else None
    if d_logp is None and d_entropy is None:
        return _answer(ctx)
    # masked rows have no gradient, whatever the upstream gradient is
    g = torch.zeros_like(lse) if d_logp is None else torch.where(mask, d_logp, 0.0)
    h = None if d_entropy is None else torch.where(mask, d_entropy, 0.0)
    return _answer(ctx, row_grad(logits, ids, lse, entropy, g, h, inv_temperature, ctx.backend))


row_stats.register_autograd(_row_stats_backward, setup_context=_row_stats_setup)


@torch.library.custom_op("fastgrpo::scale_", mutates_args=("x",))
def scale_(x: Tensor, factor: Tensor, backend: str) -> None:
    """x *= factor (0-dim), without reading the factor on the host; x is left untouched when it is 1."""
    Sweeps(backend).scale_(x, factor)


@scale_.register_fake
def _(x, factor, backend):
    return None


# ---- the one pass over logits


def fused_loss(logits: Tensor, sweeps: Sweeps, how: Fused, want_entropy: bool, inplace: bool = False) -> TokenLoss:
    op = token_loss_ if inplace else token_loss
    loss, logp, lse, entropy, *rest = op(
        logits, *how.rows, want_entropy, *how.token, spec_numbers(how.spec), sweeps.backend
    )
    return TokenLoss(loss, logp, lse, entropy if want_entropy else None, *rest)


def spec_numbers(spec: TokenSpec) -> list[float]:
    kind, numbers, *rest = spec
    return [float(x) for x in (kind, *rest, *numbers)]


def _spec_of(numbers: list[float]) -> TokenSpec:
    kind, beta, bias_correction, group_size, scale_by_std, skip_zero, *own = numbers
    flags = bool(bias_correction), int(group_size), bool(scale_by_std), bool(skip_zero)
    return TokenSpec(int(kind), tuple(own), beta, *flags)


def _token_loss(logits, ids, mask, inv_temperature, want_entropy, token, spec, backend, out):
    how = Fused(Rows(ids, mask, inv_temperature), TokenRows(*token), _spec_of(spec))
    result = Sweeps(backend).token_loss(logits, how, want_entropy, out)
    return *result[:3], _given(result.entropy, result.logp), *result[4:]


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
    token = (weight, advantages, rewards, seq, old, ref, policy_scale, h)
    return _token_loss(logits, ids, mask, inv_temperature, want_entropy, token, spec, backend, None)


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
    token = (weight, advantages, rewards, seq, old, ref, policy_scale, h)
    return _token_loss(logits, ids, mask, inv_temperature, want_entropy, token, spec, backend, logits)


def _token_loss_fake(logits, ids, mask, inv_temperature, want_entropy, *_):
    loss, logp, lse, entropy, kl, ratio, g = (torch.empty_like(inv_temperature) for _ in range(7))
    return loss, logp, lse, entropy if want_entropy else entropy.new_empty(0), kl, ratio, g


token_loss.register_fake(_token_loss_fake)
token_loss_.register_fake(_token_loss_fake)


def _token_loss_setup(ctx, inputs, output):
    logits, ids, _, inv_temperature, *_, h, _, ctx.backend = inputs
    _, logp, lse, entropy, kl, ratio, g = output
    ctx.save_for_backward(logits, ids, inv_temperature, lse, entropy, g, h)
    ctx.mark_non_differentiable(logp, lse, entropy, kl, ratio, g)
    ctx.set_materialize_grads(False)


def _token_loss_backward(ctx, d_loss, *_):
    logits, ids, inv_temperature, lse, entropy, g, h = ctx.saved_tensors
    if d_loss is None:
        return _answer(ctx)
    h = None if h is None else h * d_loss
    return _answer(ctx, row_grad(logits, ids, lse, entropy, g * d_loss, h, inv_temperature, ctx.backend))


token_loss.register_autograd(_token_loss_backward, setup_context=_token_loss_setup)


# ---- the projection in chunks


def _head_numbers(head: Head) -> tuple[int, float, int, torch.dtype, str]:
    cap = math.inf if head.softcap is None else head.softcap
    return head.vocab, cap, head.chunk, head.dtype, head.backend


def _head_of(weight: Tensor, bias: Tensor | None, vocab: int, softcap: float, chunk: int, dtype, backend: str) -> Head:
    cap = None if math.isinf(softcap) else softcap
    return Head(weight, bias, vocab, 1.0, cap, dtype, chunk, backend)  # the scale is in the temperature already


def scores(hidden: Tensor, head: Head, rows: Rows, roles: Roles, want_entropy: bool) -> Scores:
    ids, _, inv_temperature = rows
    logp, lse, entropy = linear_stats(
        hidden, head.weight, head.bias, ids, roles.scored, inv_temperature, want_entropy, *_head_numbers(head)
    )
    return Scores(logp, lse, entropy if want_entropy else None)


@torch.library.custom_op("fastgrpo::linear_stats", mutates_args=())
def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    inv_temperature: Tensor,
    want_entropy: bool,
    vocab: int,
    softcap: float,
    chunk: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """row_stats of the logits of a head, with 2NHV FLOPs; rows outside `mask` enter no GEMM."""
    head = _head_of(weight, bias, vocab, softcap, chunk, dtype, backend)
    plan = plan_rows(ids.numel(), Roles(mask, None), chunk, learn=False)
    found = chunks.score(hidden, head, _rows(ids, inv_temperature), plan, want_entropy)
    return *(x.clone() for x in found[:2]), _given(found.entropy, inv_temperature).clone()


def _rows(ids: Tensor, inv_temperature: Tensor) -> Rows:
    """All of them to be read."""
    return Rows(ids, torch.ones_like(ids, dtype=torch.bool), inv_temperature)


@linear_stats.register_fake
def _(hidden, weight, bias, ids, mask, inv_temperature, want_entropy, *_):
    logp, lse, entropy = (torch.empty_like(inv_temperature) for _ in range(3))
    return logp, lse, entropy if want_entropy else entropy.new_empty(0)


@torch.library.custom_op("fastgrpo::linear_grad", mutates_args=())
def linear_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    lse: Tensor,
    entropy: Tensor,
    g: Tensor,
    h: Tensor | None,
    inv_temperature: Tensor,
    needs: list[bool],
    vocab: int,
    softcap: float,
    chunk: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias (empty unless `needs` says so) from g = dL/dlogp and h = dL/dentropy.

    Rows with both 0 enter no GEMM. It takes 2NHV FLOPs, and 2NHV more for each of the first two gradients.
    """
    head = _head_of(weight, bias, vocab, softcap, chunk, dtype, backend)
    rows, found = _rows(ids, inv_temperature), Scores(lse, lse, _taken(entropy))
    made = chunks.gradients(hidden, head, rows, found, g, h, needs)
    return tuple(_given(x, inv_temperature) for x in made)


def _fake_gradients(hidden, weight, bias, needs, hold=lambda dtype: dtype):
    inputs = (hidden, weight, weight[:, 0] if bias is None else bias)
    return tuple(
        torch.empty(x.shape, dtype=hold(x.dtype), device=x.device) if need else torch.empty(0, device=x.device)
        for x, need in zip(inputs, needs, strict=True)
    )


@linear_grad.register_fake
def _(hidden, weight, bias, ids, lse, entropy, g, h, inv_temperature, needs, *_):
    return _fake_gradients(hidden, weight, bias, needs)


linear_grad.register_autograd(refuse_double_backward)


def _linear_stats_setup(ctx, inputs, output):
    hidden, weight, bias, ids, mask, inv_temperature, _, *ctx.head = inputs
    _, lse, entropy = output
    ctx.save_for_backward(hidden, weight, bias, ids, mask, inv_temperature, lse, entropy)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _linear_stats_backward(ctx, d_logp, _, d_entropy):
    hidden, weight, bias, ids, mask, inv_temperature, lse, entropy = ctx.saved_tensors
    d_entropy = d_entropy if entropy.numel() > 0 else None
    if d_logp is None and d_entropy is None:
        return _answer(ctx)
    # masked rows have no gradient, whatever the upstream gradient is
    g, h = (None if d is None else d if mask is None else torch.where(mask, d, 0.0) for d in (d_logp, d_entropy))
    g = torch.zeros_like(lse) if g is None else g.contiguous()
    h = None if h is None else h.contiguous()
    needs = list(ctx.needs_input_grad[:3])
    made = linear_grad(hidden, weight, bias, ids, lse, entropy, g, h, inv_temperature, needs, *ctx.head)
    return _answer(ctx, *(x if need else None for x, need in zip(made, needs, strict=True)))


linear_stats.register_autograd(_linear_stats_backward, setup_context=_linear_stats_setup)


def fused_hidden_loss(
    hidden: Tensor, head: Head, how: Fused, roles: Roles, needs: list[bool], want_entropy: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    token, columns = how.token, [*["logp", "entropy"][: 1 + want_entropy], *how.columns()]
    loss, table, *_ = linear_loss(
        hidden,
        head.weight,
        head.bias,
        how.rows.ids,
        *roles,
        how.rows.inv_temperature,
        token.weight,
        token.advantages,
        token.old,
        token.ref,
        token.policy_scale,
        token.h,
        spec_numbers(how.spec),
        want_entropy,
        needs,
        *_head_numbers(head),
    )
    return loss, dict(zip(columns, table.unbind(), strict=True))


@torch.library.custom_op("fastgrpo::linear_loss", mutates_args=())
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    scored: Tensor | None,
    learn: Tensor | None,
    inv_temperature: Tensor,
    row_weight: Tensor,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    policy_scale: Tensor | None,
    h: Tensor | None,
    spec: list[float],
    want_entropy: bool,
    needs: list[bool],
    vocab: int,
    softcap: float,
    chunk: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, statistics (K, N), and the gradients of hidden, weight and bias for dL = 1), in one pass over chunks."""
    head = _head_of(weight, bias, vocab, softcap, chunk, dtype, backend)
    token = TokenRows(row_weight, advantages, None, None, old, ref, policy_scale, h)
    how = Fused(_rows(ids, inv_temperature), token, _spec_of(spec))
    plan = plan_rows(ids.numel(), Roles(scored, learn), chunk)
    learned = chunks.learn(hidden, head, how, plan, needs, want_entropy)
    table = torch.stack([*learned.columns.values()])
    return learned.loss, table, *(_given(x, inv_temperature) for x in learned.gradients)


@linear_loss.register_fake
def _(hidden, weight, bias, ids, scored, learn, inv_temperature, *rest):
    spec, want_entropy, needs, *_ = rest[-8:]
    rows = 2 + want_entropy + (_spec_of(spec).beta != 0)
    table = inv_temperature.new_empty(rows, len(inv_temperature))
    return inv_temperature.new_empty(()), table, *_fake_gradients(hidden, weight, bias, needs, chunks.hold_dtype)


def _linear_loss_setup(ctx, inputs, output):
    hidden, weight, bias, *_ = inputs
    _, table, *gradients = output
    ctx.dtypes = [hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype]
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(table, *gradients)
    ctx.set_materialize_grads(False)


def _linear_loss_backward(ctx, d_loss, *_):
    if d_loss is None:
        return _answer(ctx)
    kinds = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    return _answer(ctx, *((x * d_loss).to(dtype) if need else None for x, dtype, need in kinds))


linear_loss.register_autograd(_linear_loss_backward, setup_context=_linear_loss_setup)
