"""The operators on hidden states, for compiled graphs alone; `ops` says how."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastgrpo.backends import Rows, Scores
from fastgrpo.batch.batch import Batch
from fastgrpo.batch.layout import Packed
from fastgrpo.engine import hidden as chunks
from fastgrpo.engine.head import Head
from fastgrpo.engine.logits import Apart, Fused, How, upstream
from fastgrpo.engine.ops import (
    NAMESPACE,
    Four,
    Seven,
    Three,
    Vectors,
    answer,
    fake_scores,
    fused_of,
    given,
    refuse_double_backward,
    returned,
    spec_numbers,
    taken,
)
from fastgrpo.engine.plan import Roles, plan_loss, plan_rows
from fastgrpo.objective.options import CHOICES, Objective
from fastgrpo.objective.sampler import text_of
from fastgrpo.objective.terms import Terms, Weights, term_columns


def _numbers(head: Head) -> tuple[list[int], list[float], torch.dtype, str]:
    sizes = [head.vocab, head.chunk, head.logits_dtype.itemsize]
    softcap = math.inf if head.softcap is None else head.softcap
    return sizes, [softcap, head.column_tolerance], head.dtype, head.backend


def _head(
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    amounts: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> Head:
    (vocab, chunk, of_logit), (cap, column_tolerance) = sizes, amounts
    logits_dtype = dtype if of_logit == dtype.itemsize else torch.float32
    scale = 1.0  # it is in the temperature already
    softcap = None if math.isinf(cap) else cap
    return Head(weight, bias, vocab, scale, softcap, dtype, logits_dtype, chunk, backend, column_tolerance)


def scores(hidden: Tensor, head: Head, rows: Rows, roles: Roles, want_entropy: bool) -> Scores:
    vectors = [rows.ids, roles.scored, rows.inv_temperature]
    logp, lse, entropy, _ = linear_stats(hidden, head.weight, head.bias, vectors, want_entropy, *_numbers(head))
    return Scores(logp, lse, entropy if want_entropy else None)


@torch.library.custom_op(f"{NAMESPACE}::linear_stats", mutates_args=())
def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Vectors,
    want_entropy: bool,
    sizes: Sequence[int],
    amounts: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> Four:
    """row_stats of the logits of a head, with 2NHV FLOPs; rows that are not scored enter no GEMM.

    `rows` are ids, scored (or None) and inv_temperature, `sizes` V, the rows of a chunk and the bytes of a logit,
    `amounts` the softcap (or infinity) and the tolerance of columns; `dtype` is that of the GEMMs' operands.
    """
    ids, scored, inv_temperature = rows
    assert ids is not None and inv_temperature is not None
    head = _head(weight, bias, sizes, amounts, dtype, backend)
    plan = plan_rows(ids.numel(), Roles(scored, None), head.chunk, learn=False)
    found, _ = chunks.score(hidden, head, _every(ids, inv_temperature), plan, want_entropy)
    return returned(found)


def _every(ids: Tensor, inv_temperature: Tensor) -> Rows:
    """All of them to be read."""
    return Rows(ids, torch.ones_like(ids, dtype=torch.bool), inv_temperature)


@linear_stats.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Vectors, want_entropy: bool, *_: Any) -> Four:
    assert rows[2] is not None
    return *fake_scores(rows[2], want_entropy), torch.empty_like(rows[2])


@torch.library.custom_op(f"{NAMESPACE}::linear_grad", mutates_args=())
def linear_grad(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Vectors,
    needs: Sequence[bool],
    sizes: Sequence[int],
    amounts: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> Three:
    """The gradients of hidden, weight and bias (empty unless `needs` says so) from g = dL/dlogp and h = dL/dentropy.

    `rows` are ids, inv_temperature, logp, lse, entropy (or empty), g and h (or None). Rows with both 0 enter no GEMM.
    It takes 2NHV FLOPs, and 2NHV more for each of the first two gradients.
    """
    ids, inv_temperature, logp, lse, entropy, g, h = rows
    assert ids is not None and inv_temperature is not None
    assert logp is not None and lse is not None and entropy is not None and g is not None
    head = _head(weight, bias, sizes, amounts, dtype, backend)
    found = Scores(logp, lse, taken(entropy))
    made = chunks.gradients(hidden, head, Rows(ids, None, inv_temperature), found, g, h, needs)
    d_hidden, d_weight, d_bias = (given(x, inv_temperature) for x in made)
    return d_hidden, d_weight, d_bias


def _fake_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], like: Tensor) -> Three:
    inputs = zip((hidden, weight, weight[:, 0] if bias is None else bias), needs, strict=True)
    d_hidden, d_weight, d_bias = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else like.new_empty(0) for x, need in inputs
    )
    return d_hidden, d_weight, d_bias


@linear_grad.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Vectors, needs: Sequence[bool], *_: Any) -> Three:
    assert rows[1] is not None
    return _fake_gradients(hidden, weight, bias, needs, rows[1])


linear_grad.register_autograd(refuse_double_backward)


def _linear_stats_setup(ctx: Any, inputs: tuple[Any, ...], output: Four) -> None:
    hidden, weight, bias, (ids, scored, inv_temperature), _, *ctx.head = inputs
    _, lse, entropy, logp = output
    ctx.save_for_backward(hidden, weight, bias, scored, ids, inv_temperature, logp, lse, entropy)
    ctx.mark_non_differentiable(lse, logp)
    ctx.set_materialize_grads(False)


def _linear_stats_backward(
    ctx: Any, d_logp: Tensor | None, _: None, d_entropy: Tensor | None, __: None
) -> tuple[Any, ...]:
    hidden, weight, bias, scored, *rows = ctx.saved_tensors
    d_entropy = d_entropy if rows[-1].numel() > 0 else None
    if d_logp is None and d_entropy is None:
        return answer(ctx)
    needs = list(ctx.needs_input_grad[:3])
    vectors = [*rows, *upstream(scored, rows[-2], d_logp, d_entropy)]
    made = linear_grad(hidden, weight, bias, vectors, needs, *ctx.head)
    return answer(ctx, *(x if need else None for x, need in zip(made, needs, strict=True)))


linear_stats.register_autograd(_linear_stats_backward, setup_context=_linear_stats_setup)


class _Elsewhere(Apart):
    """An objective in the body of an operator, where the dispatcher has turned autograd off for the thread."""

    __slots__ = ()

    def coefficients(self, scores: Scores) -> tuple[Terms, Tensor, Tensor | None]:
        device = scores.logp.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

        def differentiate() -> tuple[Terms, Tensor, Tensor | None]:
            with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                return Apart.coefficients(self, scores)

        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(differentiate).result()


# an objective as an operator takes it: its names as one text, and its numbers
_TEXTS = ("loss_type", "sampling_correction")
_NAMES = tuple(field.name for field in dataclasses.fields(Objective) if field.name in (*_TEXTS, *CHOICES))
_NUMBERS = tuple(field for field in dataclasses.fields(Objective) if field.name not in _NAMES)
_NONE = "-"


def _names_of(o: Objective) -> str:
    if o.registered_name is None:
        raise ValueError(
            f"loss_type: expected a name in a compiled graph, got the function {o.loss_name}; "
            "register_loss gives it one"
        )
    texts = {"loss_type": o.registered_name, "sampling_correction": text_of(o.corrections)}
    names = [texts[name] if name in texts else getattr(o, name) for name in _NAMES]
    return " ".join([_NONE if name is None else name for name in names])


def _objective_of(names: str, numbers: Sequence[float]) -> Objective:
    values: dict[str, Any] = {k: v for k, v in zip(_NAMES, names.split(), strict=True) if v != _NONE}
    for field, number in zip(_NUMBERS, numbers, strict=True):
        if not math.isinf(number):  # which stands for None
            values[field.name] = bool(number) if isinstance(field.default, bool) else number
    return Objective(**values)


def _how(
    ids: Tensor,
    scored: Tensor | None,
    inv_temperature: Tensor,
    vectors: Vectors,
    numbers: Sequence[float],
    objective: str,
) -> How:
    mask = torch.ones_like(ids, dtype=torch.bool) if scored is None else scored
    rows = Rows(ids, mask, inv_temperature)
    if not objective:
        return fused_of(rows, vectors, numbers)
    sequences, ratio_per_sequence, *options = numbers
    weight, h, kl_weight, advantages, old, ref, sampling, importance_ratio, seq = vectors
    assert weight is not None and seq is not None
    batch = Batch(
        layout=Packed(int(sequences), seq, seq),  # of which only the sequence of each row is asked
        shape=ids.shape,
        ids=ids,
        mask=mask,
        masked=scored is not None,
        inv_temperature=inv_temperature,
        advantages=advantages,
        old=old,
        ref=ref,
        sampling=sampling,
        importance_ratio=importance_ratio,
        importance_ratio_per_sequence=bool(ratio_per_sequence),
    )
    return _Elsewhere(rows, _objective_of(objective, options), batch, Weights(weight, h, kl_weight), scored)


def taken_apart(how: How) -> tuple[list[Tensor | None], list[float], str]:
    """(vectors, numbers, objective) as `linear_loss` has them."""
    if isinstance(how, Fused):
        return [*how.token], spec_numbers(how.spec), ""
    o, batch = how.objective, how.batch
    options = [getattr(o, field.name) for field in _NUMBERS]
    numbers = [math.inf if value is None else float(value) for value in options]
    layout = [float(batch.layout.num_sequences), float(batch.importance_ratio_per_sequence)]
    vectors = [*how.weights, batch.row_advantages(), batch.old, batch.ref, batch.sampling, batch.importance_ratio]
    return [*vectors, batch.seq().long()], layout + numbers, _names_of(o)


def hidden_loss(
    hidden: Tensor, head: Head, how: How, roles: Roles, needs: list[bool], want_entropy: bool
) -> tuple[Tensor, dict[str, Tensor], Tensor | None, Tensor | None]:
    """(loss, columns, bonus, counts) as `hidden.Learned` has them."""
    rows, flags = [how.rows.ids, *roles, how.rows.inv_temperature], [*needs, want_entropy]
    tensors = (hidden, head.weight, head.bias, rows)
    loss, bonus, counts, table, *_ = linear_loss(*tensors, *taken_apart(how), flags, *_numbers(head))
    columns = [*["logp", "entropy"][: 1 + want_entropy], *how.columns()]
    made = dict(zip(columns, table.unbind(), strict=True))
    return loss, made, None if how.h is None else bonus, counts if head.column_tolerance > 0 else None


@torch.library.custom_op(f"{NAMESPACE}::linear_loss", mutates_args=())
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Vectors,
    vectors: Vectors,
    numbers: Sequence[float],
    objective: str,
    flags: Sequence[bool],
    sizes: Sequence[int],
    amounts: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> Seven:
    """(loss, its entropy bonus, counts of columns, statistics (K, N), and the three gradients for dL = 1).

    All of it comes from one pass over the chunks. The gradients are those of hidden, weight and bias.
    `rows` are ids, scored and learn (or None), and inv_temperature. `flags` say which gradients are wanted, and
    whether entropies are. An `objective` without a name is one that kernels hold; one beyond token level has to fit
    into a chunk.
    """
    ids, scored, learn, inv_temperature = rows
    assert ids is not None and inv_temperature is not None
    *needs, want_entropy = flags
    head, how = (
        _head(weight, bias, sizes, amounts, dtype, backend),
        _how(ids, scored, inv_temperature, vectors, numbers, objective),
    )
    if isinstance(how, Apart):
        plan = plan_loss(how.objective, how.batch, Roles(scored, learn), head.chunk)
    else:
        plan = plan_rows(ids.numel(), Roles(scored, learn), head.chunk)
    learned = chunks.learn(hidden, head, how, plan, needs, want_entropy)
    table = torch.stack([*learned.columns.values()])
    d_hidden, d_weight, d_bias = (given(x, inv_temperature) for x in learned.gradients)
    bonus = torch.zeros_like(learned.loss) if learned.bonus is None else learned.bonus
    counts = torch.empty(0, dtype=torch.int64, device=table.device) if learned.counts is None else learned.counts
    return learned.loss, bonus, counts, table, d_hidden, d_weight, d_bias


@linear_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Vectors, *rest: Any) -> Seven:
    _, numbers, objective, (*needs, want_entropy), _, (_, column_tolerance), *_ = rest
    inv_temperature = rows[3]
    assert inv_temperature is not None
    terms = len(term_columns(_objective_of(objective, numbers[2:]))) if objective else 1 + (numbers[1] != 0)  # beta
    table = inv_temperature.new_empty(1 + want_entropy + terms, len(inv_temperature))
    made = _fake_gradients(hidden, weight, bias, needs, inv_temperature)
    d_hidden, d_weight, d_bias = (x.to(chunks.hold_dtype(x.dtype)) for x in made)
    loss, bonus = inv_temperature.new_empty(()), inv_temperature.new_empty(())
    counts = inv_temperature.new_empty(3 if column_tolerance > 0 else 0, dtype=torch.int64)
    return loss, bonus, counts, table, d_hidden, d_weight, d_bias


def _linear_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: Seven) -> None:
    hidden, weight, bias, *_ = inputs
    _, bonus, counts, table, *gradients = output
    ctx.dtypes = [hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype]
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(bonus, counts, table, *gradients)
    ctx.set_materialize_grads(False)


def _linear_loss_backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
    if d_loss is None:
        return answer(ctx)
    kinds = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    return answer(ctx, *((x * d_loss).to(dtype) if need else None for x, dtype, need in kinds))


linear_loss.register_autograd(_linear_loss_backward, setup_context=_linear_loss_setup)
