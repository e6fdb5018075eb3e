"""The operators of the projection in chunks, `torch.ops.fastgrpo.linear_*`: schemas, fakes and autograd formulas.

linear_stats is differentiable: its backward pass, linear_grad, projects again (8NHV FLOPs in all). linear_loss makes
its gradients in the forward pass (6NHV). All take hidden (B, T, H), weight (V', H) and bias (V'), of which the first
`vocab` rows are used, and vectors (N,) with N = B·T; they project `chunk` rows at a time, with GEMMs in `dtype`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import fields

import torch
from torch import Tensor

from fastgrpo import backends, ops
from fastgrpo.backends import Rows, Scores
from fastgrpo.layout import Batch, Packed, Padded
from fastgrpo.loss import coefficients, token_inputs
from fastgrpo.objective import Objective
from fastgrpo.projection import Gradients, Projection, count_rows, cut, cut_sequences, order_rows

_NAMES = ("loss_type", "importance_sampling_level")
_NUMBERS = tuple(field.name for field in fields(Objective) if field.name not in _NAMES)


def encode_objective(objective: Objective) -> tuple[str, list[float]]:
    """An Objective as a schema can hold it: its names as a string, its numbers as floats, with inf for None."""
    numbers = [getattr(objective, name) for name in _NUMBERS]
    names = " ".join([getattr(objective, name) for name in _NAMES])
    return names, [float("inf") if number is None else float(number) for number in numbers]


@functools.cache
def _decode_objective(names: str, numbers: tuple[float, ...]) -> Objective:
    options = {name: None if math.isinf(number) else number for name, number in zip(_NUMBERS, numbers, strict=True)}
    options["use_bias_correction_kl"] = bool(options["use_bias_correction_kl"])
    return Objective(**dict(zip(_NAMES, names.split(), strict=True)), **options)


def _pick(rows: slice, order: Tensor | None) -> slice | Tensor:
    return rows if order is None else order[rows]


def no_autocast(x: Tensor):
    return torch.autocast(x.device.type, enabled=False)


@torch.library.custom_op("fastgrpo::linear_stats", mutates_args=())
def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    mask: Tensor | None,
    count: int,
    inv_temperature: Tensor,
    want_entropy: bool,
    vocab: int,
    softcap: float,
    chunk: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """ops.row_stats of the logits hidden @ weightᵀ + bias, with 2NHV FLOPs; rows outside `mask` enter no GEMM.

    `count` is the number of rows in the mask, or -1: then they are counted here, which waits for the device.
    """
    n, order = ids.numel(), None
    if mask is not None:
        count = count_rows(mask, mask)[0] if count < 0 else count
        if count < n:
            n, order = count, order_rows(mask, mask)
    results = [torch.zeros(ids.shape, dtype=inv_temperature.dtype, device=ids.device) for _ in range(3)]
    with no_autocast(hidden):
        projection = Projection(hidden, weight, bias, vocab, dtype, min(chunk, n))
        for part in cut(0, n, chunk):
            rows = _pick(part, order)
            stats = _row_stats(
                projection.logits(rows), ids[rows], inv_temperature[rows], want_entropy, softcap, backend
            )
            for result, values in zip(results, stats[: 2 + want_entropy], strict=False):
                result[rows] = values
    logp, lse, entropy = results
    return logp, lse, entropy if want_entropy else entropy.new_empty(0)


def _row_stats(
    logits: Tensor, ids: Tensor, inv_temperature: Tensor, want_entropy: bool, softcap: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    every = torch.ones_like(ids, dtype=torch.bool)
    rows = Rows(ids, every, inv_temperature)
    return backends.get(backend).row_stats(logits, rows, want_entropy=want_entropy, softcap=softcap or None)


@linear_stats.register_fake
def _(hidden, weight, bias, ids, mask, count, inv_temperature, want_entropy, *_):
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
    n, order = ids.numel(), None
    learn = g != 0 if h is None else (g != 0) | (h != 0)
    count, _ = count_rows(learn, learn)
    if count < n:
        n, order = count, order_rows(learn, learn)
    with no_autocast(hidden):
        projection = Projection(hidden, weight, bias, vocab, dtype, min(chunk, n))
        parts = cut(0, n, chunk)
        gradients = Gradients(projection, weight, bias, needs, len(parts), n)
        for part in parts:
            rows = _pick(part, order)
            per_row = (x if x is None else x[rows] for x in (lse, None if h is None else entropy, g, h))
            logits = projection.logits(rows)
            part_lse, part_entropy, part_g, part_h = per_row
            backends.get(backend).row_grad(logits, Rows(ids[rows], None, inv_temperature[rows]),
                                           Scores(None, part_lse, part_entropy), part_g, part_h, logits,
                                           softcap=softcap or None)  # fmt: skip
            gradients.add(rows)
        logits = projection = None  # frees the buffer before the weight's gradient is rounded
        return gradients.result()


def _fake_gradients(hidden, weight, bias, needs, hold=lambda dtype: dtype):
    inputs = (hidden, weight, weight[:, 0] if bias is None else bias)
    return tuple(
        torch.empty(x.shape if need else (0,) * x.dim(), dtype=hold(x.dtype), device=x.device)
        for x, need in zip(inputs, needs, strict=True)
    )


@linear_grad.register_fake
def _(hidden, weight, bias, ids, lse, entropy, g, h, inv_temperature, needs, *_):
    return _fake_gradients(hidden, weight, bias, needs)


linear_grad.register_autograd(ops.refuse_double_backward)


def _linear_stats_setup(ctx, inputs, output):
    hidden, weight, bias, ids, mask, _, inv_temperature, want_entropy, *ctx.options = inputs
    _, lse, entropy = output
    ctx.save_for_backward(hidden, weight, bias, ids, mask, inv_temperature, lse, entropy if want_entropy else None)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _linear_stats_backward(ctx, d_logp, _, d_entropy):
    hidden, weight, bias, ids, mask, inv_temperature, lse, entropy = ctx.saved_tensors
    if entropy is None or (d_logp is None and d_entropy is None):
        d_entropy = None
    if d_logp is None and d_entropy is None:
        return (None,) * 13
    # masked rows have no gradient, whatever the upstream gradient is
    g, h = (None if d is None else d if mask is None else torch.where(mask, d, 0.0) for d in (d_logp, d_entropy))
    g = torch.zeros_like(lse) if g is None else g.contiguous()
    h = None if h is None else h.contiguous()
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.fastgrpo.linear_grad(
        hidden, weight, bias, ids, lse, lse if entropy is None else entropy, g, h, inv_temperature, needs, *ctx.options
    )
    return *(x if need else None for x, need in zip(gradients, needs, strict=True)), *(None,) * 10


linear_stats.register_autograd(_linear_stats_backward, setup_context=_linear_stats_setup)


def hold_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients until the upstream factor comes; fp16 has too little range for unscaled ones."""
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.custom_op("fastgrpo::linear_loss", mutates_args=())
def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,  # (N,) int64; the vectors below are (N,), too
    scored: Tensor | None,  # bool; None: all
    learn: Tensor | None,  # bool, within `scored`; None: all that are scored
    inv_temperature: Tensor,
    advantages: Tensor,
    row_weight: Tensor,  # dL/d(the row's loss): mask, normaliser, loss scale
    h: Tensor | None,  # dL/dentropy
    old: Tensor | None,
    ref: Tensor | None,
    sampling: Tensor | None,
    importance_ratio: Tensor | None,
    seq: Tensor | None,  # int64, the sequence of each row; None at token level
    num_sequences: int,
    counts: list[int],
    importance_ratio_per_sequence: bool,
    objective: str,
    numbers: list[float],
    want_entropy: bool,
    needs: list[bool],
    vocab: int,
    softcap: float,
    chunk: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, statistics, and the gradients of hidden, weight and bias for dL = 1), in one pass over chunks.

    `statistics` (K, N) are those of `wanted_statistics`; a row that does not learn has ratio 1 and kl 0. Such rows are
    only projected for their statistics; rows that are not scored are not projected.
    `counts` is the result of `count_rows`, or empty: then it is computed here. If it has the length of every sequence,
    sequences stay whole, and none may be longer than a chunk. Otherwise rows must not depend on each other, or all of
    them must fit into one chunk.
    """
    o = _decode_objective(objective, tuple(numbers))
    n, every = ids.numel(), torch.ones_like(ids, dtype=torch.bool) if scored is None else scored
    if not counts and scored is None and learn is None:
        counts = [n, n]
    learn = every if learn is None else learn
    n_learn, n_scored, *lengths = counts or count_rows(learn, every)
    order = None if n_learn == n else order_rows(learn, every)
    vectors = [inv_temperature, advantages, row_weight, h, old, ref, sampling, importance_ratio]
    if order is not None:  # gathered once in the order of projection; the rows of a chunk are then a slice
        ids, every = ids[order], torch.ones_like(every)
        vectors = _gather(vectors, order)
    inv_temperature, advantages, row_weight, h, old, ref, sampling, importance_ratio = vectors

    batch = Batch(
        layout=Padded(n, 1),
        shape=ids.shape,
        dtype=inv_temperature.dtype,
        ids=ids,
        mask=every,
        scored=every,
        inv_temperature=inv_temperature,
        given_advantages=advantages,
        old=old,
        ref=ref,
        sampling=sampling,
        importance_ratio=importance_ratio,
        importance_ratio_per_sequence=importance_ratio_per_sequence,
        weight=row_weight,
        h=h,
    )
    if seq is None:
        parts = [(part, Padded(part.stop - part.start, 1)) for part in cut(0, n_learn, chunk)]
    else:
        seq = seq[_pick(slice(0, n_learn), order)]
        counted = seq.new_zeros(num_sequences).index_add_(0, seq, torch.ones_like(seq))
        cu_seqlens = torch.cat([counted.new_zeros(1), counted.cumsum(0)])
        whole = [(slice(0, n_learn), slice(0, num_sequences))] if n_learn else []
        parts = [
            (part, Packed(seqs.stop - seqs.start, cu_seqlens[seqs.start : seqs.stop + 1] - part.start,
                          seq[part] - seqs.start))
            for part, seqs in (cut_sequences(lengths, chunk) if lengths else whole)
        ]  # fmt: skip
    only_scored = cut(n_learn, n_scored, chunk)

    losses = []
    wanted = wanted_statistics(o, want_entropy)
    table = inv_temperature.new_zeros(len(wanted), n)
    with no_autocast(hidden):
        longest = max((part.stop - part.start for part in [part for part, _ in parts] + only_scored), default=0)
        projection = Projection(hidden, weight, bias, vocab, dtype, longest)
        gradients = Gradients(projection, weight, bias, needs, len(parts), n_learn, hold_dtype)
        for part, layout in parts:
            at = _pick(part, order)
            part_loss, stats = _loss_and_gradient(
                o, batch.take(part, layout), projection.logits(at), want_entropy, softcap, backend
            )
            losses.append(part_loss)
            torch.stack([stats[name] for name in wanted], out=table[:, part])
            gradients.add(at)
        for part in only_scored:
            logits = projection.logits(_pick(part, order))
            logp, _, entropy = _row_stats(logits, ids[part], inv_temperature[part], want_entropy, softcap, backend)
            stats = dict(logp=logp, entropy=entropy, ratio=torch.ones_like(logp), kl=torch.zeros_like(logp))
            torch.stack([stats[name] for name in wanted], out=table[:, part])
        projection = None  # frees the buffer before the weight's gradient is rounded
        loss = sum(losses[1:], start=losses[0]) if losses else inv_temperature.new_zeros(())
        if order is not None:
            table = torch.empty_like(table).index_copy_(1, order, table)
        return loss, table, *gradients.result()


def wanted_statistics(objective: Objective, want_entropy: bool) -> list[str]:
    """The rows of linear_loss's statistics. The ratio and kl of whole sequences are left to who needs them."""
    local = objective.is_token_local
    return ["logp", *["entropy"] * want_entropy, *["ratio"] * local, *["kl"] * (local and objective.beta != 0)]


def _gather(vectors: list[Tensor | None], rows: Tensor) -> list[Tensor | None]:
    """The given rows of (N,) vectors of one dtype, None staying None; one gather for all of them."""
    gathered = iter(torch.stack([x for x in vectors if x is not None]).index_select(1, rows).unbind())
    return [None if x is None else next(gathered) for x in vectors]


def _loss_and_gradient(
    o: Objective, batch: Batch, logits: Tensor, want_entropy: bool, softcap: float, backend: str
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """(loss, statistics) of a chunk; writes dL/dlogits over its logits."""
    kernels, rows = backends.get(backend), Rows(batch.ids, batch.scored, batch.inv_temperature)
    options = dict(want_entropy=want_entropy, softcap=softcap or None)
    if backend != "torch" and o.is_token_local:
        token_rows, spec = token_inputs(o, batch)
        loss, logp, _, entropy, kl, ratio, _ = kernels.token_loss(logits, rows, token_rows, spec, logits, **options)
        return loss.sum(), dict(logp=logp, entropy=entropy, ratio=ratio, kl=kl)
    scores = kernels.row_stats(logits, rows, **options)
    logp, _, entropy = scores
    with _autograd_inside_an_operator():
        terms, g, h = coefficients(o, ops.with_tensors(scores), batch, want_entropy)
    kernels.row_grad(logits, rows, scores, g, h, logits, softcap=softcap or None)
    return terms.loss, dict(logp=logp, entropy=entropy, ratio=terms.ratio, kl=terms.kl)


@contextlib.contextmanager
def _autograd_inside_an_operator():
    """Turns autograd on again, which the dispatcher turns off in the body of an operator, for the objective's
    derivatives."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradCPU", "AutogradCUDA", "AutogradXPU", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


@linear_loss.register_fake
def _(hidden, weight, bias, ids, scored, learn, inv_temperature, *options):
    names, numbers, want_entropy, needs, *_ = options[-9:]
    o = _decode_objective(names, tuple(numbers))
    table = inv_temperature.new_empty(len(wanted_statistics(o, want_entropy)), len(inv_temperature))
    return inv_temperature.new_empty(()), table, *_fake_gradients(hidden, weight, bias, needs, hold_dtype)


def _linear_loss_setup(ctx, inputs, output):
    ctx.dtypes, ctx.needs, *_ = _gradient_kinds(inputs)
    _, *constants = output
    ctx.save_for_backward(*constants[1:])
    ctx.mark_non_differentiable(*constants)
    ctx.set_materialize_grads(False)


def _linear_loss_backward(ctx, d_loss, *_):
    if d_loss is None:
        return (None,) * 27
    kinds = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    return *((x * d_loss).to(dtype) if need else None for x, dtype, need in kinds), *(None,) * 24


def _gradient_kinds(inputs: tuple) -> tuple[list[torch.dtype], list[bool], str]:
    """(dtypes of the gradients of hidden, weight and bias, which of them are needed, backend)."""
    hidden, weight, bias, *_ = inputs
    needs, *_, backend = inputs[-6:]
    return [hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype], needs, backend


linear_loss.register_autograd(_linear_loss_backward, setup_context=_linear_loss_setup)


class LinearLoss(torch.autograd.Function):
    """linear_loss outside a compiled graph: nothing else holds the gradients, so backward scales them in place and
    returns them, once."""

    @staticmethod
    def forward(ctx, *inputs):
        loss, statistics, *ctx.gradients = linear_loss(*inputs)
        ctx.dtypes, ctx.needs, ctx.backend = _gradient_kinds(inputs)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return loss, statistics

    @staticmethod
    def backward(ctx, d_loss: Tensor | None, *_):
        if d_loss is None:
            return (None,) * 27
        if torch.is_grad_enabled():  # create_graph=True
            ops.refuse_double_backward()
        if not ctx.gradients:
            raise RuntimeError(
                "fastgrpo: a second backward through linear_grpo_loss; its gradients, made in the forward pass, were "
                "handed out by the first. Call it again, or use linear_logps and policy_loss to keep the graph."
            )
        results = []
        for dtype, need in zip(ctx.dtypes, ctx.needs, strict=True):
            gradient = ctx.gradients.pop(0)
            if need and gradient.numel() > 0:
                ops.scale_(gradient.view(1, -1, gradient.shape[-1]), d_loss, ctx.backend)
            results.append(gradient.to(dtype) if need else None)
        return *results, *(None,) * 24
