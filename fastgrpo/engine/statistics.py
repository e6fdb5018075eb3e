"""What is read of a row's logits beside its scores: statistics, which have no gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fastgrpo.backends import Rows
from fastgrpo.backends.eager import cap, pieces
from fastgrpo.engine.kept import Table, arrange
from fastgrpo.engine.logits import Sweeps

Statistic = Literal["sum_pi_squared", "log_sum_sq_probs", "mean_logits", "is_top1"]
NAMES: tuple[Statistic, ...] = get_args(Statistic)
_SQUARES = ("sum_pi_squared", "log_sum_sq_probs")

Found = dict[str, Tensor]  # (N,) by name; fp32 (float64 from float64), is_top1 bool; 0 for rows that are not read


def nothing(wanted: Sequence[str], like: Tensor) -> Found:
    """Those of rows that are not read, (N,) as `like` is."""
    return {name: torch.zeros_like(like, dtype=torch.bool if name == "is_top1" else None) for name in wanted}


def put(found: Found, at: slice | Tensor, some: Found) -> None:
    """found[...][at] = some[...]"""
    for name, values in some.items():
        found[name][at] = values


def of_logits(logits: Tensor, sweeps: Sweeps, rows: Rows, logp: Tensor, wanted: Sequence[str]) -> Found:
    """The wanted ones of each row of logits (B, T, V); of rows outside rows.mask nothing is used.

    Args:
        logp (N,): that of rows.ids, from the same sweeps.
    """
    mask = rows.mask
    assert mask is not None
    sets = None if sweeps.kept is None else sweeps.kept.only(mask)
    if sets is None:
        return _read(logits, sweeps, rows, logp, wanted)
    found = _read(logits, sweeps._replace(kept=None), rows._replace(mask=mask & ~sets.given), logp, wanted)
    for table in arrange(sets).tables(rows, logits.shape[-1]):
        put(found, table.at, of_table(table.of(logits, table.at), sweeps, table, logp[table.at], wanted))
    return found


def of_table(z: Tensor, sweeps: Sweeps, table: Table, logp: Tensor, wanted: Sequence[str]) -> Found:
    """Those of a table's rows, over its columns alone, from their logits (n, w) and the logps of their targets."""
    z, there = sweeps.capped(z, table), table.ids >= 0
    # the mean alone would count the missing, whose logits are -inf
    beside = [name for name in wanted if name != "mean_logits"]
    found = _read(z.masked_fill(table.certain, 0.0)[None], Sweeps(sweeps.backend), table.rows, logp, beside)
    if "mean_logits" in wanted:
        mean = z.masked_fill(~there, 0.0).sum(-1) / there.sum(-1)
        found["mean_logits"] = mean * table.rows.inv_temperature
    return {name: found[name] for name in wanted}


def _read(logits: Tensor, sweeps: Sweeps, rows: Rows, logp: Tensor, wanted: Sequence[str]) -> Found:
    """Those of logits (B, T, V), over all of V."""
    ids, mask, inv_temperature = rows
    assert mask is not None
    found: Found = {}
    if set(wanted) - {"mean_logits"}:
        top = _top(logits, sweeps.softcap, inv_temperature.dtype)
        found["is_top1"] = mask & (top == ids)
    if not set(wanted).isdisjoint(_SQUARES):
        # Σp² = p_top(z)² / p_top(2z). Near p_top = 1 both logps are near 0 and keep their digits; in
        # lse(2z) - 2 lse(z), which is the same, they are lost to the size of the logits
        others = sweeps.stats(logits, Rows(top, mask & ~found["is_top1"], inv_temperature), False).logp
        log_top = torch.where(found["is_top1"], logp, others)
        twice = sweeps.stats(logits, Rows(top, mask, 2 * inv_temperature), False).logp
        found["log_sum_sq_probs"] = 2 * log_top - twice
        found["sum_pi_squared"] = torch.where(mask, found["log_sum_sq_probs"].exp(), 0.0)
    if "mean_logits" in wanted:
        mean = _means(logits, sweeps.softcap, inv_temperature.dtype)
        found["mean_logits"] = torch.where(mask, mean * inv_temperature, 0.0)
    return {name: found[name] for name in wanted}


def _top(logits: Tensor, softcap: float | None, dtype: torch.dtype) -> Tensor:
    """(N,) the column of the largest, the first of equal ones; a softcap makes equal ones of large ones."""
    if softcap is None:
        return logits.max(-1).indices.view(-1)
    top = torch.empty(logits.shape[:2].numel(), dtype=torch.int64, device=logits.device)
    for part, z in pieces(logits):
        top[part] = cap(z.to(dtype), softcap).max(-1).indices
    return top


def _means(logits: Tensor, softcap: float | None, dtype: torch.dtype) -> Tensor:
    """(N,) before the temperature; copies in `dtype` are of a few rows at a time."""
    means = torch.empty(logits.shape[:2].numel(), dtype=dtype, device=logits.device)
    for part, z in pieces(logits):
        means[part] = cap(z.to(dtype), softcap).mean(-1)
    return means
