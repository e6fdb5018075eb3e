"""The operators `torch.ops.fastgrpo_2.*`, for compiled graphs alone: schemas, fakes, autograd formulas.

An operator takes tensors, lists of them and numbers, where the engine takes objects. Each has beside it the function
that takes the objects apart; its body puts them together again and calls what an eager call calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgrpo.backends import Rows, Scores, TokenLoss, TokenRows, TokenSpec
from fastgrpo.engine import hidden as chunks
from fastgrpo.engine.head import Head
from fastgrpo.engine.logits import Fused, Sweeps, empty_gradient
from fastgrpo.engine.plan import Roles, plan_rows

# Goes up with every change of an operator or its gradient: torch keeps compiled graphs on disk, and finds them by the
# names of the operators in their forward pass.
NAMESPACE = "fastgrpo_2"

Vectors = Sequence[Tensor | None]
Three = tuple[Tensor, Tensor, Tensor]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def refuse_double_backward(*_: Any) -> NoReturn:
    raise RuntimeError(
        "fastgrpo: the loss is differentiable once; its gradient was asked to be differentiated again "
        "(double backward, create_graph=True). Use fastgrpo.reference for that."
    )


def _given(x: Tensor | None, like: Tensor) -> Tensor:
    """What an operator returns for a tensor, which may not be None: an empty one in its place."""
    return like.new_empty(0) if x is None else x


def _taken(x: Tensor) -> Tensor | None:
    return x if x.numel() > 0 else None


def _answer(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    """The gradients of an operator's first inputs; the others have none."""
    rest = ctx.needs_input_grad[len(gradients) :]  # a list for a list of tensors
    return *gradients, *([None] * len(x) if isinstance(x, list) else None for x in rest)


# ---- sweeps over logits


def stats(logits: Tensor, sweeps: Sweeps, rows: Rows, want_entropy: bool) -> Scores:
    logp, lse, entropy = row_stats(logits, rows.ids, rows.mask, rows.inv_temperature, want_entropy, sweeps.backend)
    return Scores(logp, lse, entropy if want_entropy else None)


@torch.library.custom_op(f"{NAMESPACE}::row_stats", mutates_args=())
def row_stats(
    logits: Tensor, ids: Tensor, mask: Tensor, inv_temperature: Tensor, want_entropy: bool, backend: str
) -> Three:
    """(logp, lse, entropy) of each row, (N,) fp32; entropy is empty unless wanted. Masked rows are not read."""
    logp, lse, entropy = Sweeps(backend).stats(logits, Rows(ids, mask, inv_temperature), want_entropy)
    return logp, lse, _given(entropy, logp)


def _fake_scores(inv_temperature: Tensor, want_entropy: bool) -> Three:
    logp, lse, entropy = (torch.empty_like(inv_temperature) for _ in range(3))
    return logp, lse, entropy if want_entropy else entropy.new_empty(0)


@row_stats.register_fake
def _(logits: Tensor, ids: Tensor, mask: Tensor, inv_temperature: Tensor, want_entropy: bool, backend: str) -> Three:
    return _fake_scores(inv_temperature, want_entropy)


@torch.library.custom_op(f"{NAMESPACE}::row_grad", mutates_args=())
def row_grad(
    logits: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    lse: Tensor,
    entropy: Tensor,
    g: Tensor,
    h: Tensor | None,
    backend: str,
) -> Tensor:
    """The gradient of the logits from g = dL/dlogp and h = dL/dentropy of each row; rows with both 0 are not read."""
    out = empty_gradient(logits)
    Sweeps(backend).grad(logits, Rows(ids, None, inv_temperature), Scores(lse, lse, _taken(entropy)), g, h, out)
    return out


@row_grad.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return empty_gradient(logits)


row_grad.register_autograd(refuse_double_backward)


def _row_stats_setup(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    logits, ids, mask, inv_temperature, _, ctx.backend = inputs
    _, lse, entropy = output
    ctx.save_for_backward(logits, mask, ids, inv_temperature, lse, entropy)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # so that an entropy that nobody differentiates costs no gradient


def _row_stats_backward(ctx: Any, d_logp: Tensor | None, _: None, d_entropy: Tensor | None) -> tuple[Any, ...]:
    logits, mask, *rows = ctx.saved_tensors
    d_entropy = d_entropy if rows[-1].numel() > 0 else None
    if d_logp is None and d_entropy is None:
        return _answer(ctx)
    # masked rows have no gradient, whatever the upstream gradient is
    g = torch.zeros_like(rows[-2]) if d_logp is None else torch.where(mask, d_logp, 0.0)
    h = None if d_entropy is None else torch.where(mask, d_entropy, 0.0)
    return _answer(ctx, row_grad(logits, *rows, g, h, ctx.backend))


row_stats.register_autograd(_row_stats_backward, setup_context=_row_stats_setup)


@torch.library.custom_op(f"{NAMESPACE}::scale_", mutates_args=("x",))
def scale_(x: Tensor, factor: Tensor, backend: str) -> None:
    """x *= factor (0-dim), without reading the factor on the host; x is left untouched when it is 1."""
    Sweeps(backend).scale_(x, factor)


@scale_.register_fake
def _(x: Tensor, factor: Tensor, backend: str) -> None:
    return None


# ---- the one pass over logits


def fused_loss(logits: Tensor, sweeps: Sweeps, how: Fused, want_entropy: bool, inplace: bool = False) -> TokenLoss:
    rows, token, spec = how
    op = token_loss_ if inplace else token_loss
    loss, logp, lse, entropy, *rest = op(logits, [*rows], [*token], spec_numbers(spec), want_entropy, sweeps.backend)
    return TokenLoss(loss, logp, lse, entropy if want_entropy else None, *rest)


def spec_numbers(spec: TokenSpec) -> list[float]:
    kind, numbers, *rest = spec
    return [float(x) for x in (kind, *rest, *numbers)]


def _fused(rows: Sequence[Tensor] | Rows, token: Vectors, numbers: Sequence[float]) -> Fused:
    kind, beta, bias_correction, group_size, scale_by_std, skip_zero, *own = numbers
    flags = bool(bias_correction), int(group_size), bool(scale_by_std), bool(skip_zero)
    return Fused(Rows._make(rows), TokenRows._make(token), TokenSpec(int(kind), tuple(own), beta, *flags))


@torch.library.custom_op(f"{NAMESPACE}::token_loss", mutates_args=())
def token_loss(
    logits: Tensor, rows: Sequence[Tensor], token: Vectors, spec: Sequence[float], want_entropy: bool, backend: str
) -> Seven:
    """(loss, logp, lse, entropy, kl, ratio, g) of each row: row_stats and the fused objective in one pass.

    `rows` and `token` are those of Rows and TokenRows.
    """
    result = Sweeps(backend).token_loss(logits, _fused(rows, token, spec), want_entropy, out=None)
    return *result[:3], _given(result.entropy, result.logp), *result[4:]


@torch.library.custom_op(f"{NAMESPACE}::token_loss_", mutates_args=("logits",))
def token_loss_(
    logits: Tensor, rows: Sequence[Tensor], token: Vectors, spec: Sequence[float], want_entropy: bool, backend: str
) -> Seven:
    """token_loss that also writes the gradient over the logits, in the same pass."""
    result = Sweeps(backend).token_loss(logits, _fused(rows, token, spec), want_entropy, out=logits)
    return *result[:3], _given(result.entropy, result.logp), *result[4:]


def _token_loss_fake(
    logits: Tensor, rows: Sequence[Tensor], token: Vectors, spec: Sequence[float], want_entropy: bool, backend: str
) -> Seven:
    loss, kl, ratio, g = (torch.empty_like(rows[2]) for _ in range(4))
    return loss, *_fake_scores(rows[2], want_entropy), kl, ratio, g


token_loss.register_fake(_token_loss_fake)
token_loss_.register_fake(_token_loss_fake)


def _token_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: Seven) -> None:
    logits, (ids, _, inv_temperature), token, *_, ctx.backend = inputs
    _, logp, lse, entropy, kl, ratio, g = output
    ctx.save_for_backward(logits, ids, inv_temperature, lse, entropy, g, TokenRows(*token).h)
    ctx.mark_non_differentiable(logp, lse, entropy, kl, ratio, g)
    ctx.set_materialize_grads(False)


def _token_loss_backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
    logits, *rows, g, h = ctx.saved_tensors
    if d_loss is None:
        return _answer(ctx)
    return _answer(ctx, row_grad(logits, *rows, g * d_loss, None if h is None else h * d_loss, ctx.backend))


token_loss.register_autograd(_token_loss_backward, setup_context=_token_loss_setup)


# ---- the projection in chunks


def _apart(head: Head) -> tuple[list[int], float | None, torch.dtype, str]:
    return [head.vocab, head.chunk], head.softcap, head.dtype, head.backend


def _head(
    weight: Tensor, bias: Tensor | None, sizes: Sequence[int], softcap: float | None, dtype: torch.dtype, backend: str
) -> Head:
    vocab, chunk = sizes
    return Head(weight, bias, vocab, 1.0, softcap, dtype, chunk, backend)  # the scale is in the temperature already


def scores(hidden: Tensor, head: Head, rows: Rows, roles: Roles, want_entropy: bool) -> Scores:
    vectors = [rows.ids, roles.scored, rows.inv_temperature]
    logp, lse, entropy = linear_stats(hidden, head.weight, head.bias, vectors, want_entropy, *_apart(head))
    return Scores(logp, lse, entropy if want_entropy else None)


@torch.library.custom_op(f"{NAMESPACE}::linear_stats", mutates_args=())
def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Vectors,
    want_entropy: bool,
    sizes: Sequence[int],
    softcap: float | None,
    dtype: torch.dtype,
    backend: str,
) -> Three:
    """row_stats of the logits of a head, with 2NHV FLOPs; rows that are not scored enter no GEMM.

    `rows` are ids, scored (or None) and inv_temperature, `sizes` V and the rows of a chunk.
    """
    ids, scored, inv_temperature = rows
    assert ids is not None and inv_temperature is not None
    head = _head(weight, bias, sizes, softcap, dtype, backend)
    plan = plan_rows(ids.numel(), Roles(scored, None), head.chunk, learn=False)
    found = chunks.score(hidden, head, _every(ids, inv_temperature), plan, want_entropy)
    return found.logp.clone(), found.lse.clone(), _given(found.entropy, inv_temperature).clone()


def _every(ids: Tensor, inv_temperature: Tensor) -> Rows:
    """All of them to be read."""
    return Rows(ids, torch.ones_like(ids, dtype=torch.bool), inv_temperature)


@linear_stats.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Vectors, want_entropy: bool, *_: Any) -> Three:
    assert rows[2] is not None
    return _fake_scores(rows[2], want_entropy)


@torch.library.custom_op(f"{NAMESPACE}::linear_grad", mutates_args=())
def linear_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Vectors,
    needs: Sequence[bool],
    sizes: Sequence[int],
    softcap: float | None,
    dtype: torch.dtype,
    backend: str,
) -> Three:
    """The gradients of hidden, weight and bias (empty unless `needs` says so) from g = dL/dlogp and h = dL/dentropy.

    `rows` are ids, inv_temperature, lse, entropy (or empty), g and h (or None). Rows with both 0 enter no GEMM. It
    takes 2NHV FLOPs, and 2NHV more for each of the first two gradients.
    """
    ids, inv_temperature, lse, entropy, g, h = rows
    assert ids is not None and inv_temperature is not None
    assert lse is not None and entropy is not None and g is not None
    head = _head(weight, bias, sizes, softcap, dtype, backend)
    found = Scores(lse, lse, _taken(entropy))
    made = chunks.gradients(hidden, head, Rows(ids, None, inv_temperature), found, g, h, needs)
    d_hidden, d_weight, d_bias = (_given(x, inv_temperature) for x in made)
    return d_hidden, d_weight, d_bias


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> Three:
    inputs = zip((hidden, weight, weight[:, 0] if bias is None else bias), needs, strict=True)
    d_hidden, d_weight, d_bias = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else torch.empty(0, device=x.device)
        for x, need in inputs
    )
    return d_hidden, d_weight, d_bias


@linear_grad.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Vectors, needs: Sequence[bool], *_: Any) -> Three:
    return _fake_gradients(hidden, weight, bias, needs)


linear_grad.register_autograd(refuse_double_backward)


def _linear_stats_setup(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    hidden, weight, bias, (ids, scored, inv_temperature), _, *ctx.head = inputs
    _, lse, entropy = output
    ctx.save_for_backward(hidden, weight, bias, scored, ids, inv_temperature, lse, entropy)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _linear_stats_backward(ctx: Any, d_logp: Tensor | None, _: None, d_entropy: Tensor | None) -> tuple[Any, ...]:
    hidden, weight, bias, scored, *rows = ctx.saved_tensors
    d_entropy = d_entropy if rows[-1].numel() > 0 else None
    if d_logp is None and d_entropy is None:
        return _answer(ctx)
    # rows that were not scored have no gradient, whatever the upstream gradient is
    g, h = (None if d is None else d if scored is None else torch.where(scored, d, 0.0) for d in (d_logp, d_entropy))
    g = torch.zeros_like(rows[-2]) if g is None else g.contiguous()
    needs = list(ctx.needs_input_grad[:3])
    made = linear_grad(hidden, weight, bias, [*rows, g, None if h is None else h.contiguous()], needs, *ctx.head)
    return _answer(ctx, *(x if need else None for x, need in zip(made, needs, strict=True)))


linear_stats.register_autograd(_linear_stats_backward, setup_context=_linear_stats_setup)


def fused_hidden_loss(
    hidden: Tensor, head: Head, how: Fused, roles: Roles, needs: list[bool], want_entropy: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    (ids, _, inv_temperature), token, spec = how
    rows, numbers = [ids, *roles, inv_temperature], spec_numbers(spec)
    loss, table, *_ = linear_loss(
        hidden, head.weight, head.bias, rows, [*token], numbers, needs, want_entropy, *_apart(head)
    )
    columns = [*["logp", "entropy"][: 1 + want_entropy], *how.columns()]
    return loss, dict(zip(columns, table.unbind(), strict=True))


@torch.library.custom_op(f"{NAMESPACE}::linear_loss", mutates_args=())
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Vectors,
    token: Vectors,
    spec: Sequence[float],
    needs: Sequence[bool],
    want_entropy: bool,
    sizes: Sequence[int],
    softcap: float | None,
    dtype: torch.dtype,
    backend: str,
) -> Five:
    """(loss, statistics (K, N), and the gradients of hidden, weight and bias for dL = 1), in one pass over chunks.

    `rows` are ids, scored and learn (or None), and inv_temperature.
    """
    ids, scored, learn, inv_temperature = rows
    assert ids is not None and inv_temperature is not None
    head, how = _head(weight, bias, sizes, softcap, dtype, backend), _fused(_every(ids, inv_temperature), token, spec)
    plan = plan_rows(ids.numel(), Roles(scored, learn), head.chunk)
    learned = chunks.learn(hidden, head, how, plan, needs, want_entropy)
    table = torch.stack([*learned.columns.values()])
    d_hidden, d_weight, d_bias = (_given(x, inv_temperature) for x in learned.gradients)
    return learned.loss, table, d_hidden, d_weight, d_bias


@linear_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Vectors, *rest: Any) -> Five:
    _, (_, beta, *_), needs, want_entropy, *_ = rest
    inv_temperature = rows[3]
    assert inv_temperature is not None
    table = inv_temperature.new_empty(2 + want_entropy + (beta != 0), len(inv_temperature))
    made = _fake_gradients(hidden, weight, bias, needs)
    d_hidden, d_weight, d_bias = (x.to(chunks.hold_dtype(x.dtype)) for x in made)
    return inv_temperature.new_empty(()), table, d_hidden, d_weight, d_bias


def _linear_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: Five) -> None:
    hidden, weight, bias, *_ = inputs
    _, table, *gradients = output
    ctx.dtypes = [hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype]
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(table, *gradients)
    ctx.set_materialize_grads(False)


def _linear_loss_backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
    if d_loss is None:
        return _answer(ctx)
    kinds = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    return _answer(ctx, *((x * d_loss).to(dtype) if need else None for x, dtype, need in kinds))


linear_loss.register_autograd(_linear_loss_backward, setup_context=_linear_loss_setup)
