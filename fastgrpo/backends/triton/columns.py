"""The functions of `contract.ColumnBackend`: which kernels, over which grid."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..contract import Columns, Rows, Scores
from . import launch

with contextlib.suppress(ImportError):  # without Triton the backend is unavailable, and says so
    from . import products, selection
    from .gradient import Backward

_LANES = 128  # threads of a program of the products
_COLUMNS = 8  # places of a row that it takes at once
_BLOCK = 256  # elements of each of them that it takes at once
_ROW_BLOCK = 1024  # elements of a sum of rows that it makes
_UNROLL = 4  # rows that are on their way at once
_CANDIDATES = 32  # columns that may be kept, as a multiple of the room: more are not written apart


def column_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    n, w = ids.shape
    out = hidden.new_empty(n, w, dtype=torch.float32)
    if out.numel() > 0:
        launch.run(products.logits_kernel, n * -(-w // _COLUMNS), _LANES, out.device, hidden, weight, bias, ids, out,
                   hidden.shape[1], hidden.stride(0), weight.stride(0), w, COLUMNS=_COLUMNS,
                   BLOCK=_BLOCK)  # fmt: skip
    return out


def column_d_hidden(dz: Tensor, ids: Tensor, weight: Tensor, out: Tensor) -> None:
    n, H = out.shape
    if out.numel() > 0:
        launch.run(products.d_hidden_kernel, n * -(-H // _ROW_BLOCK), _LANES, out.device, dz, ids, weight, out, H,
                   weight.stride(0), out.stride(0), ids.shape[1], BLOCK=_ROW_BLOCK, UNROLL=_UNROLL)  # fmt: skip


def column_d_weight(dz: Tensor, ids: Tensor, rows: Tensor, hidden: Tensor, out: Tensor, d_bias: Tensor | None) -> None:
    P, H = ids.numel(), hidden.shape[1]
    if P > 0:
        ids, order = ids.sort(stable=True)
        launch.run(products.d_weight_kernel, P * -(-H // _ROW_BLOCK), _LANES, out.device, dz[order], ids, rows[order],
                   hidden, out, d_bias, H, hidden.stride(0), out.stride(0), P, BLOCK=_ROW_BLOCK,
                   UNROLL=_UNROLL)  # fmt: skip


def select_columns(
    logits: Tensor,
    rows: Rows,
    scores: Scores,
    g: Tensor,
    h: Tensor | None,
    tolerance: float,
    room: int,
    *,
    softcap: float | None = None,
) -> Columns:
    n, V, device = rows.ids.numel(), logits.shape[2], logits.device
    ids = torch.empty((n, room), dtype=torch.int32, device=device)
    columns = Columns(ids, ids.new_empty(ids.shape, dtype=torch.float32), ids.new_empty(n))
    if n > 0:
        # vectors of 4 elements of a narrow dtype, too: what of 8 a thread would hold does not fit into its registers
        cut, capacity = launch.geometry(V, logits.dtype)._replace(K=4), min(V, _CANDIDATES * room)
        row_bytes = V * logits.element_size() + capacity * 8
        programs = launch.rows_in_flight(n, row_bytes, device)
        candidates = ids.new_empty(programs, capacity, dtype=torch.int64)
        backward = Backward(g, h, scores.logp, scores.lse, None if h is None else scores.entropy)
        of_rows = launch.aligned(rows._replace(mask=None)), launch.aligned(backward)
        launch.sweep(selection.choose_kernel, programs, cut, device, logits, of_rows,
                     selection.Chosen(*columns, candidates), float(tolerance), softcap, *launch.layout(logits), n,
                     room, CANDIDATES=_CANDIDATES)  # fmt: skip
    return columns
