"""Gradients from the few columns of each row that carry them, and from all columns of the rows where those are many.

Of a row's dL/dlogits the columns K are kept, the others dropped: together at most `column_tolerance` of its sum of
|dL/dlogit|. The products of K take 4H FLOPs a column and gather rows of the weight, where the GEMMs take 4VH a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo import backends
from fastgrpo.backends import Rows, Scores
from fastgrpo.batch.batch import take
from fastgrpo.engine.head import Head
from fastgrpo.engine.projection import Gradients
from fastgrpo.objective.metrics import ColumnCounts

# A row of K columns costs K/b, a dense one V/F: gathered bytes over the bandwidth b, FLOPs over the speed F of a GEMM.
# They are equal at K = V·b/F: V/37 at 20 GB/s and 0.7 TFLOP/s (two cores), V/233 at 3 TB/s and 700 TFLOP/s (H100).
CPU_SHARE, GPU_SHARE = 37, 233
LEAST_ROOM = 256
MEMORY_SHARE = 8  # ids and values of a chunk's columns take at most 1/8 of the bytes of its logits
STEP = 64  # rooms are multiples of it, and rows are moved so many at a time
WHOLE = 32  # rows, of which a GEMM takes a multiple without a rest


def room(vocab: int, logits_dtype: torch.dtype, device_type: str) -> int:
    """The most columns of a row that are kept apart; a row with more goes through the GEMMs.

    A function of the head alone, so that what becomes of a row does not depend on its company.
    """
    worth = max(LEAST_ROOM, vocab // (CPU_SHARE if device_type == "cpu" else GPU_SHARE))
    fits = vocab * logits_dtype.itemsize // MEMORY_SHARE // 8  # an id and a value are 8 bytes
    return max(STEP, min(worth, fits) // STEP * STEP)


class ColumnProducts:
    """Adds the gradients of rows whose dL/dlogits are 0 but for a few columns to `collected`."""

    def __init__(self, head: Head, collected: Gradients):
        self.collected, self.kernels = collected, backends.columns(head.backend)
        self.weight = _with_unit_stride(collected.projection.weight)
        self.hidden: list[Tensor] = []
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # dz, ids, rows of `hidden`

    def add(self, at: slice | Tensor, hidden: Tensor, dz: Tensor, ids: Tensor) -> None:
        """Those of the rows `at`, with their hidden states (n, H), from dz and ids (n, w)."""
        of_hidden, of_weight, _ = self.collected.needs
        if of_hidden:
            self.collected.put_d_hidden(
                at, len(dz), lambda out: self.kernels.column_d_hidden(dz, ids, self.weight, out)
            )
        if of_weight or self.collected.d_bias is not None:
            kept = (ids.view(-1) >= 0).nonzero()[:, 0]
            row = kept // ids.shape[1] + sum(len(x) for x in self.hidden)
            self.pairs.append((dz.view(-1)[kept], ids.view(-1)[kept], row.int()))
            self.hidden.append(hidden)

    def finish(self) -> None:
        """Add those of weight and bias, which `add` left: one sum for each token, rounded once."""
        if not self.pairs:
            return
        dz, ids, rows = (torch.cat(x) for x in zip(*self.pairs, strict=True))
        hidden = _with_unit_stride(self.hidden[0] if len(self.hidden) == 1 else torch.cat(self.hidden))
        self.pairs, self.hidden, d_bias = [], [], self.collected.d_bias
        if self.collected.needs[1]:
            self.kernels.column_d_weight(dz, ids, rows, hidden, self.collected.started_sum(), d_bias)
        elif d_bias is not None:  # the gradient of a weight for hidden states of 1
            self.kernels.column_d_weight(dz, ids, rows, hidden.new_ones(len(hidden), 1), d_bias[:, None], None)


class _Chunk(NamedTuple):
    """What makes the gradient of some rows of logits, as `row_grad` takes it."""

    rows: Rows
    scores: Scores
    g: Tensor  # (n,)
    h: Tensor | None

    def take(self, at: Tensor) -> _Chunk:
        rows, scores, *coefficients = self
        factors, logp, lse, entropy, g, h = take([rows.inv_temperature, *scores, *coefficients], at)
        assert factors is not None and logp is not None and lse is not None and g is not None
        return _Chunk(Rows(rows.ids[at], None, factors), Scores(logp, lse, entropy), g, h)


class FewColumns:
    """Adds the gradients of chunks to `collected`, and counts the columns.

    Waits for the device with every chunk, to learn which rows have few columns.
    """

    def __init__(self, head: Head, collected: Gradients):
        self.head, self.collected = head, collected
        self.kernels, self.products = backends.columns(head.backend), ColumnProducts(head, collected)
        self.room = room(head.vocab, head.logits_dtype, head.weight.device.type)
        self.counted = ColumnCounts(0, 0, 0)

    def counts(self) -> Tensor:
        """(3,) int64, `ColumnCounts` of all chunks."""
        return torch.tensor(self.counted, device=self.head.weight.device)

    def add(self, at: slice | Tensor, logits: Tensor, rows: Rows, scores: Scores, g: Tensor, h: Tensor | None) -> None:
        """Add the gradients of the rows `at`, whose logits (1, n, V) the projection holds; they are overwritten."""
        head, collected, chunk = self.head, self.collected, _Chunk(rows, scores, g, h)
        columns = self.kernels.select_columns(
            logits, *chunk, head.column_tolerance, self.room, softcap=head.sweeps.softcap
        )
        sizes = columns.sizes.cpu()
        dense = sizes > self.room
        few = sizes.masked_fill(dense, 0)
        n, n_dense = len(sizes), int(dense.sum())
        self.counted = self.counted.plus(int(few.sum()), int((few > 0).sum()), n_dense)
        if n_dense > n // 2:  # rows of zeroes cost a GEMM less than a rest
            idle = (sizes == 0).nonzero()[:, 0][: -n_dense % WHOLE]
            dense[idle], n_dense = True, n_dense + len(idle)
        if n_dense < n:
            width = max(1, int(few.max()))
            dz, ids = (x[:, :width].contiguous() for x in (columns.dz, columns.ids))
            self.products.add(at, collected.projection.h, dz, ids)
            self.products.finish()
        if n_dense == 0:
            return
        projection = collected.projection
        hidden, out = projection.h, projection.d_logits(slice(0, n_dense))
        if n_dense < n:
            order = _bring_forward(logits[0], dense)
            chunk, hidden = chunk.take(order), hidden[order]
            at = order + at.start if isinstance(at, slice) else at[order]
        head.sweeps.grad(logits[:, :n_dense], *chunk, out)
        collected.add(at, out[0], hidden)


def _with_unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bring_forward(logits: Tensor, dense: Tensor) -> Tensor:
    """Move rows (n, V) where `dense` (on the host) to the front, over others; gives the row that each of them was.

    Those that are there already stay. Only a few rows at a time are in a copy.
    """
    order = torch.arange(int(dense.sum()), device=dense.device)
    gaps = (~dense[: len(order)]).nonzero()[:, 0]
    order[gaps] = dense[len(order) :].nonzero()[:, 0] + len(order)
    moved = order[gaps].to(logits.device)
    for to, of in zip(gaps.to(logits.device).split(STEP), moved.split(STEP), strict=True):
        logits[to] = logits[of]
    return order.to(logits.device)
