"""What is differentiable: the engine as autograd functions of eager calls; compiled graphs take the operators instead.

A function takes the tensors that have gradients and one call, whose tensors have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastgrpo.backends import Rows, Scores, TokenLoss
from fastgrpo.batch.batch import Batch
from fastgrpo.batch.kept import KeptSets
from fastgrpo.engine import hidden as chunks
from fastgrpo.engine import hidden_ops, ops, statistics
from fastgrpo.engine.head import Head
from fastgrpo.engine.logits import Apart, Fused, How, Sweeps, empty_gradient, fuse, fuses, upstream
from fastgrpo.engine.ops import refuse_double_backward
from fastgrpo.engine.plan import Plan, Roles, plan_loss, plan_rows, roles
from fastgrpo.objective.options import Objective
from fastgrpo.objective.terms import Terms, Weights, only_where, row_weights

# scores as autograd takes them, and the statistics, which have no gradient
_Scored = tuple[Tensor, Tensor, Tensor | None, statistics.Found]


class _Once(torch.autograd.Function):
    """Hands on a gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *made_of: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        refuse_double_backward()


def _once(gradient: Tensor | None, *made_of: Tensor | None) -> Tensor | None:
    """The gradient; its own differentiation in what it was made of, with create_graph=True, is an error."""
    return _Once.apply(gradient, *made_of) if gradient is not None and torch.is_grad_enabled() else gradient


def _to_save(scores: Scores) -> Scores:
    """With a logp of their own: the caller may change the other in place before the backward pass."""
    return scores._replace(logp=scores.logp.clone())


# ---- from logits


def stats(
    logits: Tensor, sweeps: Sweeps, rows: Rows, want_entropy: bool, wanted: Sequence[str] = ()
) -> tuple[Scores, statistics.Found]:
    """The scores of each row, whose logp and entropy are differentiable in the logits, and the wanted statistics."""
    apply = _Stats.apply
    if torch.compiler.is_compiling():
        if sweeps.kept is None and not wanted:
            return ops.stats(logits, sweeps, rows, want_entropy), {}
        apply = torch.compiler.disable(apply)  # one break of the graph
    *scores, found = apply(logits, _Scoring(sweeps, rows, want_entropy, wanted))
    return Scores(*scores), found


class _Scoring(NamedTuple):
    sweeps: Sweeps
    rows: Rows
    want_entropy: bool
    wanted: Sequence[str]


class _Stats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Scoring) -> _Scored:
        sweeps, rows, want_entropy, wanted = call
        scores = sweeps.stats(logits, rows, want_entropy)
        found = statistics.of_logits(logits, sweeps, rows, scores.logp, wanted) if wanted else {}
        ctx.save_for_backward(logits, *rows, *_to_save(scores))
        ctx.sweeps = sweeps
        ctx.mark_non_differentiable(scores.lse)
        ctx.set_materialize_grads(False)  # so that an entropy that nobody differentiates costs no gradient
        return *scores, found

    @staticmethod
    def backward(
        ctx: Any, d_logp: Tensor | None, _: None, d_entropy: Tensor | None, __: None
    ) -> tuple[Tensor | None, None]:
        if d_logp is None and d_entropy is None:
            return None, None
        logits, ids, mask, inv_temperature, *scores = ctx.saved_tensors
        gradient = empty_gradient(logits)
        with torch.no_grad():
            made_of = Scores(*scores)
            g, h = upstream(mask, made_of.lse, d_logp, d_entropy)
            ctx.sweeps.grad(logits, Rows(ids, mask, inv_temperature), made_of, g, h, gradient)
        return _once(gradient, logits, d_logp, d_entropy), None


class _Learning(NamedTuple):
    sweeps: Sweeps
    how: How
    want_entropy: bool


def loss(logits: Tensor, sweeps: Sweeps, how: How, want_entropy: bool) -> tuple[Scores, Terms]:
    """Scores and terms; the gradient is made in the backward pass, in a new tensor."""
    if isinstance(how, Apart):
        scores, _ = stats(logits, sweeps, how.rows, want_entropy)
        return scores, how.terms(scores.logp, scores.entropy)
    if torch.compiler.is_compiling():
        result = ops.fused_loss(logits, sweeps, how, want_entropy)
    else:
        result = TokenLoss(*_FusedLoss.apply(logits, _Learning(sweeps, how, want_entropy)))
    return Scores(result.logp, result.lse, result.entropy), how.terms(result)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Learning) -> tuple[Tensor | None, ...]:
        assert isinstance(call.how, Fused)
        result = call.sweeps.token_loss(logits, call.how, call.want_entropy, out=None)
        ids, _, inv_temperature = call.how.rows
        scores = _to_save(Scores(result.logp, result.lse, result.entropy))
        ctx.save_for_backward(logits, ids, inv_temperature, *scores, result.g, call.how.token.h)
        ctx.sweeps = call.sweeps
        ctx.mark_non_differentiable(*(x for x in result[1:] if x is not None))
        ctx.set_materialize_grads(False)
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        if d_loss is None:
            return None, None
        logits, ids, inv_temperature, *scores, g, h = ctx.saved_tensors
        gradient = empty_gradient(logits)
        with torch.no_grad():
            rows = Rows(ids, None, inv_temperature)
            ctx.sweeps.grad(logits, rows, Scores(*scores), g * d_loss, None if h is None else h * d_loss, gradient)
        return _once(gradient, logits, d_loss), None


def loss_in_place(logits: Tensor, sweeps: Sweeps, how: How, want_entropy: bool) -> tuple[Scores, Terms]:
    """Scores and terms; the logits become their gradient, which one backward call hands out."""
    call = _Learning(sweeps, how, want_entropy)
    apply = _InPlace.apply
    if torch.compiler.is_compiling() and not (isinstance(how, Fused) and logits.dtype != torch.float16):
        apply = torch.compiler.disable(apply)  # one break of the graph
    total, logp, lse, entropy, ratio, kl, bonus, *logged = apply(logits, call)
    return Scores(logp, lse, entropy), Terms(total, ratio, kl, tuple(logged), bonus)


class _InPlace(torch.autograd.Function):
    """The gradient is made in the forward pass, over the logits; backward scales it and returns it, once."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, call: _Learning) -> tuple[Tensor | None, ...]:
        sweeps, how, want_entropy = call
        buffer = logits.detach()
        saved: tuple[Tensor | None, ...] = (buffer,)
        compiling = torch.compiler.is_compiling()
        # fp16 gradients wait for the upstream factor, because a GradScaler's keeps them from rounding to 0
        ctx.wait = buffer.dtype == torch.float16
        if ctx.wait:
            assert isinstance(how, Apart)
            scores = sweeps.stats(buffer, how.rows, want_entropy)
            terms, g, h = how.coefficients(scores)
            saved = (buffer, how.rows.ids, how.rows.inv_temperature, *_to_save(scores), g, h)
        elif compiling and isinstance(how, Fused):
            result = ops.fused_loss(buffer, sweeps, how, want_entropy, inplace=True)
            scores, terms = Scores(result.logp, result.lse, result.entropy), how.terms(result)
        else:
            scores, terms = how.overwrite(buffer, sweeps, want_entropy, buffer)
            # an operation that saved these logits for its own backward pass gets autograd's error about an in-place
            # change, and does not read a gradient as logits
            increment_version(buffer)  # which detach() shares with the logits
        ctx.save_for_backward(*saved)
        ctx.sweeps, ctx.handed_out = sweeps, False
        constants = (*scores, terms.ratio, terms.kl, terms.bonus, *terms.logged)
        ctx.mark_non_differentiable(*(x for x in constants if x is not None))
        ctx.set_materialize_grads(False)
        return terms.loss, *constants

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        if d_loss is None:
            return None, None
        if torch.is_grad_enabled():  # create_graph=True
            refuse_double_backward()
        if ctx.handed_out:
            raise RuntimeError(
                "fastgrpo: a second backward through a loss with inplace=True; its gradient, written over the logits, "
                "was handed out by the first. Use inplace=False to keep the graph."
            )
        ctx.handed_out = True
        buffer, *rest = ctx.saved_tensors
        if ctx.wait:
            ids, inv_temperature, *scores, g, h = rest
            rows = Rows(ids, None, inv_temperature)
            ctx.sweeps.grad(buffer, rows, Scores(*scores), g * d_loss, None if h is None else h * d_loss, buffer)
            increment_version(buffer)
        elif torch.compiler.is_compiling():
            ops.scale_(buffer, d_loss, ctx.sweeps.backend)
        else:
            ctx.sweeps.scale_(buffer, d_loss)
            increment_version(buffer)
        return buffer, None


# ---- from hidden states


def hidden_scores(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    roles: Roles,
    want_entropy: bool,
    plan: Plan | None = None,
    kept: KeptSets | None = None,
    wanted: Sequence[str] = (),
) -> tuple[Scores, statistics.Found]:
    """The scores of the rows that are scored, differentiable in hidden, weight and bias, and the wanted statistics.

    The gradients project again.

    Args:
        plan: None: it is made here.
        kept: sets of tokens, over which their rows are; there is no plan then.
    """
    apply, scored = _HiddenScores.apply, roles.scored
    if torch.compiler.is_compiling():
        if kept is None and not wanted:
            return hidden_ops.scores(hidden, head, rows, roles, want_entropy), {}
        apply = torch.compiler.disable(apply)  # one break of the graph
    if kept is not None:
        kept = kept.only(scored)
        roles = Roles(~kept.given if scored is None else scored & ~kept.given, None)
    plan = plan or plan_rows(rows.ids.shape[0], roles, head.chunk, learn=False)
    *scores, found = apply(
        hidden, head.weight, head.bias, _HiddenScoring(head, rows, scored, plan, want_entropy, kept, wanted)
    )
    return Scores(*scores), found


class _HiddenScoring(NamedTuple):
    head: Head
    rows: Rows
    scored: Tensor | None
    plan: Plan
    want_entropy: bool
    kept: KeptSets | None
    wanted: Sequence[str]


class _HiddenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _HiddenScoring) -> _Scored:
        head, rows, scored, plan, want_entropy, kept, wanted = call
        scores, found = chunks.score(hidden, head, rows, plan, want_entropy, kept, wanted)
        ctx.save_for_backward(hidden, weight, bias, rows.ids, rows.inv_temperature, scored, *_to_save(scores))
        ctx.head, ctx.kept = head.without_tensors(), kept
        ctx.mark_non_differentiable(scores.lse)
        ctx.set_materialize_grads(False)
        return *scores, found

    @staticmethod
    def backward(
        ctx: Any, d_logp: Tensor | None, _: None, d_entropy: Tensor | None, __: None
    ) -> tuple[Tensor | None, ...]:
        if d_logp is None and d_entropy is None:
            return None, None, None, None
        hidden, weight, bias, ids, inv_temperature, scored, *scores = ctx.saved_tensors
        with torch.no_grad():
            made_of = Scores(*scores)
            g, h = upstream(scored, made_of.lse, d_logp, d_entropy)
            rows, needs = Rows(ids, None, inv_temperature), ctx.needs_input_grad[:3]
            made = chunks.gradients(hidden, ctx.head.of(weight, bias), rows, made_of, g, h, needs, ctx.kept)
        return *(_once(x, hidden, weight, bias, d_logp, d_entropy) for x in made), None


def hidden_loss(
    hidden: Tensor, head: Head, objective: Objective, batch: Batch, return_stats: bool
) -> tuple[Tensor, Tensor | None, Terms, Tensor | None]:
    """(logps, entropies, terms, counts), the loss differentiable in hidden, weight and bias; `counts` as in `Learned`.

    The gradients are made in the forward pass where they can be; else in the backward pass, which projects again.
    """
    weights, who = row_weights(objective, batch), roles(objective, batch, return_stats)
    rows = Rows(batch.ids, batch.mask, head.scaled(batch.inv_temperature))
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, head.weight, head.bias)]
    want_entropy = objective.wants_entropy(return_stats)
    fused = fuses(objective, head.backend, hidden, head.logits_dtype, head.softcap)
    compiling = torch.compiler.is_compiling()
    learns = any(needs) and batch.kept is None
    plan = plan_loss(objective, batch, who, head.chunk) if learns and not compiling else None
    # whether gradients can be made with the logits; a graph does not know the lengths of sequences
    with_logits = objective.is_token_local or batch.ids.shape[0] <= head.chunk if plan is None else plan.fits
    if not (with_logits and learns):
        scores, _ = hidden_scores(hidden, head, rows, who, want_entropy, plan, batch.kept)
        apart = Apart(rows, objective, batch, weights, who.scored)
        terms = apart.terms(scores.logp, scores.entropy)
        nothing = torch.zeros(3, dtype=torch.int64, device=hidden.device) if head.column_tolerance > 0 else None
        return scores.logp, scores.entropy, terms, nothing

    scale = None
    if torch.float16 in (head.dtype, hidden.dtype, head.weight.dtype):
        scale = _power_of_two(objective, batch, weights, who.scored)
        weights = Weights._make(None if x is None else x * scale for x in weights)
    how = fuse(rows, objective, batch, weights) if fused else Apart(rows, objective, batch, weights, who.scored)
    if plan is None:
        loss, columns, bonus, counts = hidden_ops.hidden_loss(hidden, head, how, who, needs, want_entropy)
    else:
        call = _HiddenLearning(head, how, plan, tuple(needs), want_entropy)
        loss, (columns, bonus, counts) = _HiddenLoss.apply(hidden, head.weight, head.bias, call)
    if scale is not None:
        loss, bonus = loss / scale, None if bonus is None else bonus / scale
    logged = tuple(columns[name] for name in objective.record.logs)
    terms = Terms(loss, columns["ratio"], columns.get("kl"), logged, bonus)
    return columns["logp"], columns.get("entropy"), terms, counts


def _power_of_two(o: Objective, batch: Batch, weights: Weights, scored: Tensor | None) -> Tensor:
    """A factor, 0-dim, that keeps fp16 gradients in range until the upstream factor comes: those of a mean would round
    to 0.

    It is the power of two that brings the largest coefficient of a row, as far as it is known before the pass, to
    about 2^8. fp16 reaches from 2^-24 to 2^16, so that leaves room for small probabilities below and ratios above.
    """
    size = only_where(scored, batch.row_advantages()).abs() + o.beta + (not o.record.inert)
    if batch.importance_ratio is not None:
        size = size * only_where(scored, batch.importance_ratio, fill=1.0)
    size = size * weights.loss.abs()
    others = [x.abs() for x in weights[1:] if x is not None]
    top = torch.cat([size, *others, size.new_zeros(1)]).amax()
    return torch.where((top > 0) & top.isfinite(), torch.exp2(8 - torch.ceil(torch.log2(top))), 1.0)


class _HiddenLearning(NamedTuple):
    head: Head
    how: How
    plan: Plan
    needs: tuple[bool, ...]  # whether hidden, weight and bias need a gradient
    want_entropy: bool


class _HiddenLoss(torch.autograd.Function):
    """Nothing else holds the gradients, so backward scales them in place and returns them, once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _HiddenLearning
    ) -> tuple[Tensor, tuple[dict[str, Tensor], Tensor | None, Tensor | None]]:
        loss, columns, bonus, gradients, counts = chunks.learn(hidden, *call)
        ctx.gradients, ctx.sweeps = [*gradients], call.head.sweeps
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        return loss, (columns, bonus, counts)  # the second has no gradient

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if d_loss is None:
            return None, None, None, None
        if torch.is_grad_enabled():  # create_graph=True
            refuse_double_backward()
        if not ctx.gradients:
            raise RuntimeError(
                "fastgrpo: a second backward through linear_grpo_loss; its gradients, made in the forward pass, were "
                "handed out by the first. Call it again, or use linear_logps and policy_loss to keep the graph."
            )
        results = []
        for dtype in ctx.dtypes:
            gradient = ctx.gradients.pop(0)
            if gradient is not None and gradient.numel() > 0:
                ctx.sweeps.scale_(gradient.view(1, -1, gradient.shape[-1]), d_loss)
            results.append(None if gradient is None else gradient.to(dtype))
        return *results, None
