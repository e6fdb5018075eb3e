"""The operators `torch.ops.fastgrpo_6.*` on logits, for compiled graphs alone: schemas, fakes, autograd formulas.

An operator takes tensors, lists of them and numbers, where the engine takes objects. Each has beside it the function
that takes the objects apart; its body puts them together again and calls what an eager call calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastgrpo.backends import Rows, Scores, TokenLoss, TokenRows, TokenSpec
from fastgrpo.engine.logits import Fused, Sweeps, empty_gradient, upstream

# Goes up with every change of an operator or its gradient: torch keeps compiled graphs on disk, and finds them by the
# names of the operators in their forward pass.
NAMESPACE = "fastgrpo_6"

Vectors = Sequence[Tensor | None]
Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def refuse_double_backward(*_: Any) -> NoReturn:
    raise RuntimeError(
        "fastgrpo: the loss is differentiable once; its gradient was asked to be differentiated again "
        "(double backward, create_graph=True). Use fastgrpo.reference for that."
    )


def given(x: Tensor | None, like: Tensor) -> Tensor:
    """What an operator returns for a tensor, which may not be None: an empty one in its place."""
    return like.new_empty(0) if x is None else x


def taken(x: Tensor) -> Tensor | None:
    return x if x.numel() > 0 else None


def answer(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    """The gradients of an operator's first inputs; the others have none."""
    rest = ctx.needs_input_grad[len(gradients) :]  # a list for a list of tensors
    return *gradients, *([None] * len(x) if isinstance(x, list) else None for x in rest)


# ---- sweeps over logits


def stats(logits: Tensor, sweeps: Sweeps, rows: Rows, want_entropy: bool) -> Scores:
    logp, lse, entropy, _ = row_stats(logits, rows.ids, rows.mask, rows.inv_temperature, want_entropy, sweeps.backend)
    return Scores(logp, lse, entropy if want_entropy else None)


@torch.library.custom_op(f"{NAMESPACE}::row_stats", mutates_args=())
def row_stats(
    logits: Tensor, ids: Tensor, mask: Tensor, inv_temperature: Tensor, want_entropy: bool, backend: str
) -> Four:
    """(logp, lse, entropy, logp) of each row, (N,) fp32; entropy is empty unless wanted. Masked rows are not read.

    The second logp is the gradient's: the caller may change the first in place.
    """
    return returned(Sweeps(backend).stats(logits, Rows(ids, mask, inv_temperature), want_entropy))


def returned(scores: Scores) -> Four:
    return scores.logp, scores.lse, given(scores.entropy, scores.logp), scores.logp.clone()


def fake_scores(inv_temperature: Tensor, want_entropy: bool) -> Three:
    logp, lse, entropy = (torch.empty_like(inv_temperature) for _ in range(3))
    return logp, lse, entropy if want_entropy else entropy.new_empty(0)


@row_stats.register_fake
def _(logits: Tensor, ids: Tensor, mask: Tensor, inv_temperature: Tensor, want_entropy: bool, backend: str) -> Four:
    return *fake_scores(inv_temperature, want_entropy), torch.empty_like(inv_temperature)


@torch.library.custom_op(f"{NAMESPACE}::row_grad", mutates_args=())
def row_grad(
    logits: Tensor,
    ids: Tensor,
    inv_temperature: Tensor,
    logp: Tensor,
    lse: Tensor,
    entropy: Tensor,
    g: Tensor,
    h: Tensor | None,
    backend: str,
) -> Tensor:
    """The gradient of the logits from g = dL/dlogp and h = dL/dentropy of each row; rows with both 0 are not read."""
    out = empty_gradient(logits)
    Sweeps(backend).grad(logits, Rows(ids, None, inv_temperature), Scores(logp, lse, taken(entropy)), g, h, out)
    return out


@row_grad.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return empty_gradient(logits)


row_grad.register_autograd(refuse_double_backward)


def _row_stats_setup(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    logits, ids, mask, inv_temperature, _, ctx.backend = inputs
    _, lse, entropy, logp = output
    ctx.save_for_backward(logits, mask, ids, inv_temperature, logp, lse, entropy)
    ctx.mark_non_differentiable(lse, logp)
    ctx.set_materialize_grads(False)  # so that an entropy that nobody differentiates costs no gradient


def _row_stats_backward(
    ctx: Any, d_logp: Tensor | None, _: None, d_entropy: Tensor | None, __: None
) -> tuple[Any, ...]:
    logits, mask, *rows = ctx.saved_tensors
    d_entropy = d_entropy if rows[-1].numel() > 0 else None
    if d_logp is None and d_entropy is None:
        return answer(ctx)
    return answer(ctx, row_grad(logits, *rows, *upstream(mask, rows[-2], d_logp, d_entropy), ctx.backend))


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


def fused_of(rows: Sequence[Tensor] | Rows, token: Vectors, numbers: Sequence[float]) -> Fused:
    defaults = {name: default for name, default in TokenSpec._field_defaults.items() if name != "numbers"}
    values = {name: type(default)(x) for (name, default), x in zip(defaults.items(), numbers, strict=False)}
    spec = TokenSpec(numbers=tuple(numbers[len(defaults) :]), **values)
    return Fused(Rows._make(rows), TokenRows._make(token), spec)


@torch.library.custom_op(f"{NAMESPACE}::token_loss", mutates_args=())
def token_loss(
    logits: Tensor, rows: Sequence[Tensor], token: Vectors, spec: Sequence[float], want_entropy: bool, backend: str
) -> Seven:
    """(loss, logp, lse, entropy, kl, ratio, g) of each row: row_stats and the fused objective in one pass.

    `rows` and `token` are those of Rows and TokenRows.
    """
    result = Sweeps(backend).token_loss(logits, fused_of(rows, token, spec), want_entropy, out=None)
    return *result[:3], given(result.entropy, result.logp), *result[4:]


@torch.library.custom_op(f"{NAMESPACE}::token_loss_", mutates_args=("logits",))
def token_loss_(
    logits: Tensor, rows: Sequence[Tensor], token: Vectors, spec: Sequence[float], want_entropy: bool, backend: str
) -> Seven:
    """token_loss that also writes the gradient over the logits, in the same pass."""
    result = Sweeps(backend).token_loss(logits, fused_of(rows, token, spec), want_entropy, out=logits)
    return *result[:3], given(result.entropy, result.logp), *result[4:]


def _token_loss_fake(
    logits: Tensor, rows: Sequence[Tensor], token: Vectors, spec: Sequence[float], want_entropy: bool, backend: str
) -> Seven:
    loss, kl, ratio, g = (torch.empty_like(rows[2]) for _ in range(4))
    return loss, *fake_scores(rows[2], want_entropy), kl, ratio, g


token_loss.register_fake(_token_loss_fake)
token_loss_.register_fake(_token_loss_fake)


def _token_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: Seven) -> None:
    logits, (ids, _, inv_temperature), token, *_, ctx.backend = inputs
    _, logp, lse, entropy, kl, ratio, g = output
    ctx.save_for_backward(logits, ids, inv_temperature, logp, lse, entropy, g, TokenRows(*token).h)
    ctx.mark_non_differentiable(logp, lse, entropy, kl, ratio, g)
    ctx.set_materialize_grads(False)


def _token_loss_backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
    logits, *rows, g, h = ctx.saved_tensors
    if d_loss is None:
        return answer(ctx)
    return answer(ctx, row_grad(logits, *rows, g * d_loss, None if h is None else h * d_loss, ctx.backend))


token_loss.register_autograd(_token_loss_backward, setup_context=_token_loss_setup)
