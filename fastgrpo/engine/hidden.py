"""From hidden states to scores, loss and gradients, a chunk of logits at a time. N = B·T rows, in any order of a plan.

All is 2NHV FLOPs a GEMM: one for scores, two more for gradients, three for a loss whose gradients are made with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo import backends
from fastgrpo.backends import Rows, Scores, cpu
from fastgrpo.batch.kept import KeptSets
from fastgrpo.engine import statistics
from fastgrpo.engine.columns import ColumnProducts, FewColumns, room
from fastgrpo.engine.head import Head
from fastgrpo.engine.kept import Arranged, Table, arrange
from fastgrpo.engine.logits import Fused, How, put_scores
from fastgrpo.engine.overlap import Lanes
from fastgrpo.engine.plan import Plan, Roles, plan_rows
from fastgrpo.engine.projection import Gradients, Projection

SHORT = 4096  # logits of a row: so few cost less in memory than the search for the target's beforehand
HeadGradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden, weight and bias


class Learned(NamedTuple):
    """A loss with its gradients; rows that were not scored have statistics of 0."""

    loss: Tensor  # 0-dim
    columns: dict[str, Tensor]  # (N,) by name: "logp", "entropy" if wanted, and those of the objective's terms
    bonus: Tensor | None
    gradients: HeadGradients  # of the loss; those of fp16 tensors in fp32
    counts: Tensor | None  # (3,) of few columns, `objective.metrics.ColumnCounts`; None without a tolerance


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Operations on x's device take the dtypes that they are given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def take_rows(rows: Rows, at: slice | Tensor) -> Rows:
    return Rows._make(None if x is None else x[at] for x in rows)


def columns(scores: Scores, *, with_lse: bool = False) -> list[Tensor]:
    """What there is of them: logp, lse if asked, entropy if it was wanted."""
    return [x for x in (scores.logp, scores.lse if with_lse else None, scores.entropy) if x is not None]


def score(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    plan: Plan,
    want_entropy: bool,
    sets: KeptSets | None = None,
    wanted: Sequence[str] = (),
) -> tuple[Scores, statistics.Found]:
    """The scores and the wanted statistics of a plan's rows and of those that have a set, which the plan leaves out;
    they are 0 elsewhere."""
    count = 2 + want_entropy
    results = [torch.zeros_like(rows.inv_temperature) for _ in range(count)]
    read = statistics.nothing(wanted, rows.inv_temperature)
    with no_autocast(hidden):
        kept = None if sets is None else arrange(sets)
        projection = Projection(hidden, head, _longest(plan, head, kept))
        for chunk in plan.score:
            at = plan.at(chunk)
            part = take_rows(rows, at)
            if wanted:
                logits = projection.logits(at)  # (1, n, V)
                scores = head.sweeps.stats(logits, part, want_entropy)
                statistics.put(read, at, statistics.of_logits(logits, head.sweeps, part, scores.logp, wanted))
            else:
                scores = _stats(projection, head, part, at, want_entropy)
            for result, values in zip(results, columns(scores, with_lse=True), strict=True):
                result[at] = values
        logp, lse, *entropy = results
        found = Scores(logp, lse, entropy[0] if entropy else None)
        if kept is not None:
            for table in kept.tables(rows, head.vocab, head.chunk):
                z = _logits(projection, head, table)
                scores = head.sweeps.of_table(z, table, want_entropy)
                put_scores(found, table.at, scores)
                if wanted:
                    of_table = statistics.of_table(z, head.sweeps, table, scores.logp, wanted)
                    statistics.put(read, table.at, of_table)
    return found, read


def _stats(projection: Projection, head: Head, rows: Rows, at: slice | Tensor, want_entropy: bool) -> Scores:
    """The scores of some rows; long rows of fp32 logits do not leave a CPU's caches for them, with the same bits."""
    if head.backend == "cpu" and head.logits_dtype == torch.float32 and head.vocab > SHORT:
        h, weight, bias = projection.gather(at), projection.weight, projection.bias
        return cpu.head_stats(h, weight, bias, rows, want_entropy=want_entropy, softcap=head.softcap)
    return head.sweeps.stats(projection.logits(at), rows, want_entropy)  # (1, n, V)


def _widest(head: Head) -> int:
    """Of the tables whose columns are gathered; rows of a wider one are projected, because that is quicker."""
    return room(head.vocab, head.logits_dtype, head.weight.device.type)


def _longest(plan: Plan, head: Head, kept: Arranged | None) -> int:
    """The most rows that are projected at a time."""
    return max(plan.longest, 0 if kept is None else min(head.chunk, kept.wider(_widest(head))))


def _logits(projection: Projection, head: Head, table: Table) -> Tensor:
    """(n, w) of a table's columns, whose rows are the projection's chunk then."""
    projection.take(table.at, buffer=table.width > _widest(head))
    if table.width > _widest(head):
        return table.of(projection.project(), torch.arange(len(table.at), device=table.at.device))
    hidden, weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (projection.h, projection.weight))
    return backends.columns(head.backend).column_logits(hidden, weight, projection.bias, table.ids)


def _additions(head: Head, kept: Arranged | None) -> int:
    """How often rows with a set add to dL/dweight: once for all whose columns are gathered, else for each table."""
    if kept is None or sum(kept.counts[1:]) == 0:
        return 0
    return 1 if kept.wider(_widest(head)) == 0 else 2


def gradients(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    scores: Scores,
    g: Tensor,
    h: Tensor | None,
    needs: Sequence[bool],
    sets: KeptSets | None = None,
) -> HeadGradients:
    """The gradients of hidden, weight and bias from g = dL/dlogp and h = dL/dentropy, (N,) each.

    Rows with both 0 enter no GEMM. Waits for the device once, with a tolerance of columns or with sets more often.
    """
    learn = g != 0 if h is None else (g != 0) | (h != 0)
    sets = None if sets is None else sets.only(learn)
    plan = plan_rows(g.shape[0], Roles(learn if sets is None else learn & ~sets.given, None), head.chunk)
    logits: Tensor | None
    out: Tensor | None
    with no_autocast(hidden):
        kept = None if sets is None else arrange(sets)
        projection = Projection(hidden, head, _longest(plan, head, kept))
        collected = Gradients(projection, head, needs, plan, more=_additions(head, kept))
        few = FewColumns(head, collected) if head.column_tolerance > 0 else None
        for chunk, _ in plan.learn:
            at = plan.at(chunk)
            logits, out = projection.logits(at), projection.d_logits()  # (1, n, V), and then their gradient
            per_row = Scores._make(None if x is None else x[at] for x in scores)
            made_of = take_rows(rows, at), per_row, g[at], None if h is None else h[at]
            if few is None:
                head.sweeps.grad(logits, *made_of, out)
                collected.add(at, out[0], projection.h)
            else:
                few.add(at, logits, *made_of)
        logits = out = None
        if kept is not None:
            products = ColumnProducts(head, collected)
            for table in kept.tables(rows, head.vocab, head.chunk):
                z = _logits(projection, head, table)
                head.sweeps.d_table(z, table, scores, g, h)
                if table.width > _widest(head):
                    out = projection.d_logits().zero_()
                    row, place = table.pairs()
                    out[0, row, table.ids[row, place].long()] = z[row, place].to(out.dtype)
                    collected.add(table.at, out[0], projection.h)
                else:
                    products.add(table.at, projection.h, z, table.ids)
            products.finish()
            out = None
            del products
        del projection  # and with both the buffer, before the weight's gradient is rounded
        return collected.result()


def learn(hidden: Tensor, head: Head, how: How, plan: Plan, needs: Sequence[bool], want_entropy: bool) -> Learned:
    """A loss, and the gradients of hidden, weight and bias for dL = 1, in one pass over the chunks of a plan.

    Rows that do not learn are only projected for their statistics; rows that are not scored are not projected.
    """
    vectors, of_scores = how.rows.inv_temperature, 1 + want_entropy
    names = [*["logp", "entropy"][:of_scores], *how.columns()]
    table = vectors.new_zeros(len(names), vectors.shape[0])  # (K, N)
    if plan.order is not None:  # gathered once in the order of projection; the rows of a chunk are then a slice
        how = how.take(plan.order)
    losses, bonuses = [], []
    logits: Tensor | None
    out: Tensor | None
    # few columns wait for the device
    alone = not isinstance(how, Fused) or head.column_tolerance > 0
    with no_autocast(hidden), Lanes(hidden.device, alone=alone) as lanes:
        projection = Projection(hidden, head, plan.longest)
        collected = Gradients(projection, head, needs, plan, hold_dtype)
        few = FewColumns(head, collected) if head.column_tolerance > 0 else None
        for chunk, layout in plan.learn:
            projection.take(plan.at(chunk))
            for rows, part, lane in lanes.cut(chunk):  # all of it, unless parts are to overlap
                with lane:
                    at, some = plan.at(rows), how.part(rows, layout)
                    logits, out = projection.project(part), projection.d_logits(part)  # (1, n, V), then their gradient
                    if few is None:
                        scores, terms = some.overwrite(logits, head.sweeps, want_entropy, out)
                        collected.add_hidden(at, out[0], projection.h[part])
                    else:
                        scores, terms, g, h = some.score(logits, head.sweeps, want_entropy)
                        few.add(at, logits, some.rows, scores, g, h)
                    _put(table, at, [*columns(scores), *terms.columns()])
                    losses.append(terms.loss)
                    bonuses += [] if terms.bonus is None else [terms.bonus]
            lanes.join(*losses, *bonuses)
            if few is None:
                collected.add_weight(projection.d_logits()[0], projection.h)
        for chunk in plan.score:
            at = plan.at(chunk)
            scores = _stats(projection, head, take_rows(how.rows, chunk), at, want_entropy)
            _put(table[:of_scores], at, columns(scores))
        logits = out = None
        del projection  # and with both the buffer, before the weight's gradient is rounded
        made = collected.result()
    if plan.rest is not None:
        chunk, layout = plan.rest
        at = plan.at(chunk)
        terms = how.part(chunk, layout).look(*table[:of_scores, at])
        _put(table[of_scores:], at, terms.columns())
    loss = sum(losses[1:], start=losses[0]) if losses else vectors.new_zeros(())
    bonus = sum(bonuses[1:], start=bonuses[0]) if bonuses else None if how.h is None else vectors.new_zeros(())
    columns_of = dict(zip(names, table.unbind(), strict=True))
    return Learned(loss, columns_of, bonus, made, None if few is None else few.counts())


def _put(table: Tensor, at: slice | Tensor, columns: list[Tensor]) -> None:
    """table[:, at] = columns"""
    if isinstance(at, slice):
        torch.stack(columns, out=table[:, at])
    else:
        table.index_copy_(1, at, torch.stack(columns))


def hold_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients until the upstream factor comes; fp16 has too little range for unscaled ones."""
    return torch.float32 if dtype == torch.float16 else dtype
