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

    def certain(self, z: Tensor) -> Tensor:
        """Logits (n, w), those of sure rows 0: logp, entropy and gradient are then 0, and not a rounding of z - z."""
        return z.masked_fill_(self.sure[:, None] & (self.ids >= 0), 0.0)

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
    exponent = torch.frexp((sets.size - 1).clamp(min=NARROWEST - 1).double()).exponent
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
