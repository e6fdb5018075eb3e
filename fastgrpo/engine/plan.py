"""The plan of a call from hidden states: which rows learn, which are only scored, and where chunks are cut."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.batch.batch import Batch
from fastgrpo.batch.layout import Layout, Padded, in_order
from fastgrpo.objective.options import Objective


class Roles(NamedTuple):
    """What rows are for; (N,) bool each."""

    scored: Tensor | None  # they get a logp; None: all
    learn: Tensor | None  # of these the ones that may have a gradient; None: all of these

    @property
    def alike(self) -> bool:
        """Whether all rows learn."""
        return self.scored is None and self.learn is None


class Part(NamedTuple):
    """Some rows of the order of projection, and how they make sequences."""

    rows: slice
    layout: Layout


@dataclass(frozen=True)
class Plan:
    """The order in which rows are projected, those that learn before those that are only scored, and its chunks."""

    order: Tensor | None  # the rows that are scored; None: all, as they are
    learn: list[Part]  # chunks
    score: list[slice]  # chunks
    rest: Part | None = None  # all rows of `score`, where their terms are wanted, too
    fits: bool = True  # the gradient can be made with the logits, chunk by chunk

    @property
    def longest(self) -> int:
        """Rows of the longest chunk."""
        chunks = [*(part.rows for part in self.learn), *self.score]
        return max((rows.stop - rows.start for rows in chunks), default=0)

    @property
    def learners(self) -> int:
        """The number of rows that learn."""
        return self.learn[-1].rows.stop if self.learn else 0

    def at(self, rows: slice) -> slice | Tensor:
        """The rows of the batch that these rows of the order are."""
        return rows if self.order is None else self.order[rows]


class _Counts(NamedTuple):
    learn: int
    scored: int
    lengths: list[int]  # rows that learn in each sequence, where they were asked for


def roles(o: Objective, batch: Batch, statistics: bool) -> Roles:
    """Who is scored and who learns; without statistics, rows that cannot learn are not scored."""
    scored = batch.mask if batch.masked else None
    if not o.may_be_inert(batch.advantages_per_token):
        return Roles(scored, None)
    learn = batch.mask & (batch.row_advantages() != 0)
    return Roles(scored, learn) if statistics else Roles(learn, None)


def plan_rows(n: int, roles: Roles, chunk: int, *, learn: bool = True, counts: _Counts | None = None) -> Plan:
    """For rows that do not depend on each other: cut into equal parts, anywhere.

    Waits for the device once, to count rows, if they are not all alike and `counts` are not known.

    Args:
        learn: False: all are only scored.
    """
    if not learn:
        roles = Roles(roles.scored, None)
    n_learn, n_scored, _ = counts or _count(n, roles)
    n_learn = n_learn if learn else 0
    order = None if (n_learn or n_scored) == n else _order(roles)[:n_scored]
    parts = [Part(rows, Padded(rows.stop - rows.start, 1)) for rows in cut(0, n_learn, chunk)]
    rest = Part(slice(n_learn, n_scored), Padded(n_scored - n_learn, 1)) if learn and n_scored > n_learn else None
    return Plan(order, parts, cut(n_learn, n_scored, chunk), rest)


def plan_loss(o: Objective, batch: Batch, roles: Roles, chunk: int) -> Plan:
    """For a loss: its gradient is made with the logits where that can be; else (`fits` False) its rows are scored.

    Beyond token level sequences stay whole and must fit into chunks, and for a quantile over the batch, the batch.
    Waits for the device once at most.
    """
    n, layout = batch.ids.shape[0], batch.layout
    if o.is_token_local:
        return plan_rows(n, roles, chunk)
    if n > chunk and o.needs_whole_batch:
        return dataclasses.replace(plan_rows(n, roles, chunk, learn=False), fits=False)
    counts = _count(n, roles, layout if n > chunk else None)
    n_learn, n_scored, lengths = counts
    if max(lengths, default=0) > chunk:
        return dataclasses.replace(plan_rows(n, roles, chunk, learn=False, counts=counts), fits=False)
    order, seq = None if n_learn == n else _order(roles)[:n_scored], batch.seq().long()
    seq = seq if order is None else seq[order]
    whole = in_order(seq[:n_learn], layout.num_sequences)
    if n > chunk:
        parts = [Part(rows, whole.part(rows, sequences)) for rows, sequences in cut_sequences(lengths, chunk)]
    else:
        parts = [Part(slice(0, n_learn), whole)] if n_learn else []
    rest = Part(slice(n_learn, n_scored), in_order(seq[n_learn:n_scored], layout.num_sequences))
    return Plan(order, parts, cut(n_learn, n_scored, chunk), rest if n_scored > n_learn else None)


def cut(start: int, stop: int, chunk: int) -> list[slice]:
    """[start, stop) cut into equal parts of at most `chunk`."""
    count = -(-(stop - start) // chunk)
    edges = [start + (stop - start) * i // max(count, 1) for i in range(count + 1)]
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def cut_sequences(lengths: list[int], chunk: int) -> list[tuple[slice, slice]]:
    """(rows, sequences) of each chunk, which holds as many whole sequences as fit; none is longer than a chunk."""
    parts, row, first, begin = [], 0, 0, 0
    for i, length in enumerate(lengths):
        if row + length - begin > chunk:
            parts.append((slice(begin, row), slice(first, i)))
            first, begin = i, row
        row += length
    parts.append((slice(begin, row), slice(first, len(lengths))))
    return [part for part in parts if part[0].stop > part[0].start]


def _masks(roles: Roles) -> tuple[Tensor, Tensor]:
    """(learn, scored), (N,) bool each; one of them is given."""
    scored, learn = roles
    if learn is None:
        assert scored is not None
        return scored, scored
    return learn, torch.ones_like(learn) if scored is None else scored


def _count(n: int, roles: Roles, layout: Layout | None = None) -> _Counts:
    """How many rows there are; with a layout, how many learn in each sequence. Waits for the device once at most."""
    if roles.alike:
        return _Counts(n, n, [] if layout is None else layout.lengths())
    learn, scored = _masks(roles)
    counts = torch.stack([learn, scored]).sum(1)
    if layout is not None:
        counts = torch.cat([counts, layout.seq_sum(learn.to(torch.float64)).long()])
    n_learn, n_scored, *lengths = counts.tolist()
    return _Counts(n_learn, n_scored, lengths)


def _order(roles: Roles) -> Tensor:
    """(N,) rows in the order in which they are projected: those that learn, those only scored, the others."""
    learn, scored = _masks(roles)
    return torch.argsort(learn.view(torch.int8) + scored.view(torch.int8), descending=True, stable=True)
