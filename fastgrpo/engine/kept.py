"""Rows over the set of tokens that a sampler kept: tables of their few logits, and nothing of the others.

A row with k tokens stands in a table of w columns, w the power of two from 16 on that holds k. What it gives depends
on the row alone. Tables have a few rows at a time, so that none is large.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.backends import Rows
from fastgrpo.batch.kept import KeptSets

NARROWEST = 16
ELEMENTS = 1 << 22  # of a table, which has several of 4 bytes each beside it


class Table(NamedTuple):
    """Some rows of a call, and their columns."""

    at: Tensor  # (n,) int64: which rows they are
    ids: Tensor  # (n, w) int32, rising; -1 where there is none
    rows: Rows  # all to be read; the id of a target is its place here, or -1
    sure: Tensor  # (n,) bool: the target is all that was kept

    @property
    def certain(self) -> Tensor:
        """(n, w) bool: the targets of sure rows, whose logits the sweeps have as 0, so that logp, entropy and gradient
        are 0, too, and not a rounding of z - z."""
        return self.sure[:, None] & (self.ids >= 0)

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    def of(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The logits (n, w) of its columns, at least fp32, out of those (B, T, V) of all; -inf where there is none.

        Args:
            rows (n,): where its rows stand in `logits`.
        """
        row, tokens = rows[:, None], logits.shape[1]
        z = logits[row // tokens, row % tokens, self.ids.clamp(min=0).long()].to(self.rows.inv_temperature.dtype)
        return z.masked_fill_(self.ids < 0, -torch.inf)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(row of the table, place in it) of every column that is there, (P,) each."""
        row, place = (self.ids >= 0).nonzero(as_tuple=True)
        return row, place


class Arranged(NamedTuple):
    """The rows that have a set, by the width of their tables."""

    sets: KeptSets
    order: Tensor  # (N,) rows, those without a set first, then from narrow to wide
    counts: list[int]  # of rows; at place e those of width 2^e, at 0 those without a set

    def wider(self, width: int) -> int:
        """The number of rows with more columns than so many."""
        return sum(count for e, count in enumerate(self.counts) if 1 << e > width)

    def tables(self, rows: Rows, vocab: int, most: int = ELEMENTS) -> Iterator[Table]:
        """Each row in one table, of at most so many rows.

        Args:
            rows: (N,) all of the call; its mask is not read.
        """
        begin = self.counts[0]
        for e, count in enumerate(self.counts[1:], start=1):
            for at in self.order[begin : begin + count].split(max(1, min(most, ELEMENTS >> e))) if count else ():
                yield _table(self.sets, rows, at, 1 << e, vocab)
            begin += count


def arrange(sets: KeptSets) -> Arranged:
    """Waits for the device once."""
    # 2^exponent is the width: frexp gives x = m · 2^e with 1/2 <= m < 1
    exponent = torch.frexp((sets.size - 1).clamp(min=NARROWEST - 1).double()).exponent
    exponent = torch.where(sets.given, exponent, 0)
    return Arranged(sets, exponent.argsort(stable=True), torch.bincount(exponent, minlength=1).tolist())


def _table(sets: KeptSets, rows: Rows, at: Tensor, width: int, vocab: int) -> Table:
    place = torch.arange(width, device=at.device)
    start, count = sets.start[at, None], sets.size[at, None]
    there = place < count
    source = torch.where(there, start + place, start)
    ids = sets.ids[source.clamp(max=len(sets.ids) - 1)].long()
    target = rows.ids[at].clamp(max=vocab)  # which is no id, and not what stands for none
    # what is out of range may not be read, and makes its row NaN as a target does that was not kept
    wrong = there & ((ids < 0) | (ids >= vocab) | (source == len(sets.ids)))
    none = torch.iinfo(torch.int32).max
    ids = torch.where(there & ~wrong, ids, none).int().sort(-1).values
    ids[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], none)  # an id counts once
    is_target = ids == target[:, None]
    found = torch.where(is_target.any(-1) & ~wrong.any(-1), is_target.int().argmax(-1), -1)
    ids = ids.masked_fill_(ids == none, -1)
    sure = (found >= 0) & ((ids >= 0).sum(-1) == 1)
    return Table(at, ids, Rows(found, torch.ones_like(found, dtype=torch.bool), rows.inv_temperature[at]), sure)
