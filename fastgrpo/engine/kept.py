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


def tables(sets: KeptSets, rows: Rows, vocab: int) -> Iterator[Table]:
    """The rows that have a set, each in one table. Waits for the device once.

    Args:
        rows: (N,) all of the call; its mask is not read.
    """
    # 2^exponent is the width: frexp gives x = m · 2^e with 1/2 <= m < 1
    exponent = torch.frexp((sets.count - 1).clamp(min=NARROWEST - 1).double()).exponent
    exponent = torch.where(sets.given, exponent, 0)
    order = exponent.argsort(stable=True)
    sizes = torch.bincount(exponent, minlength=1).tolist()
    begin = sizes[0]
    for e, size in enumerate(sizes[1:], start=1):
        for at in order[begin : begin + size].split(max(1, ELEMENTS >> e)) if size else ():
            yield _table(sets, rows, at, 1 << e, vocab)
        begin += size


def _table(sets: KeptSets, rows: Rows, at: Tensor, width: int, vocab: int) -> Table:
    place = torch.arange(width, device=at.device)
    start, count = sets.start[at, None], sets.count[at, None]
    there = place < count
    ids = sets.ids[torch.where(there, start + place, start)].long()
    target = rows.ids[at]
    # an id out of range may not be read, and makes its row NaN as a target does that was not kept
    wrong = there & ((ids < 0) | (ids >= vocab))
    none = torch.iinfo(torch.int32).max
    ids = torch.where(there & ~wrong, ids, none).int().sort(-1).values
    ids[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1], none)  # an id counts once
    is_target = ids == target[:, None]
    found = torch.where(is_target.any(-1) & ~wrong.any(-1), is_target.int().argmax(-1), -1)
    ids = ids.masked_fill_(ids == none, -1)
    return Table(at, ids, Rows(found, torch.ones_like(found, dtype=torch.bool), rows.inv_temperature[at]))
