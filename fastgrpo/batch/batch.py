"""`Batch`: what a call was given, as vectors of N rows; made by `fastgrpo.batch.inputs`, never changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgrpo.advantages import group_advantages
from fastgrpo.batch.checks import check
from fastgrpo.batch.kept import KeptSets
from fastgrpo.batch.layout import Layout


@dataclass(frozen=True)
class Batch:
    """The arguments of a call after validation, in one dtype, and how their rows make S sequences."""

    layout: Layout
    shape: torch.Size  # of completion_ids and of every per-token result
    ids: Tensor  # (N,) int64; anything where masked
    mask: Tensor  # (N,) bool: the loss tokens
    masked: bool  # whether a mask was given
    inv_temperature: Tensor  # (N,)
    advantages: Tensor | None = None  # (N,); None: `rewards` are given, for the pass to work them out
    advantages_per_token: bool = False
    rewards: Tensor | None = None  # (S,), in contiguous groups of `num_generations`
    num_generations: int = 0
    scale_rewards: str = "group"  # or "none"
    old: Tensor | None = None  # (N,)
    ref: Tensor | None = None  # (N,)
    sampling: Tensor | None = None  # (N,)
    importance_ratio: Tensor | None = None  # (N,)
    importance_ratio_per_sequence: bool = False
    sampled: Tensor | None = None  # (N,) bool: the loss tokens before a correction rejected some; None: `mask`
    num_items_in_batch: Tensor | float | None = None
    loss_scale: Tensor | float = 1.0
    token_weights: Tensor | None = None  # (N,)
    group_ids: Tensor | None = None  # (S,) integers: the prompt of each sequence
    group_size: int | None = None  # of contiguous groups, one for each prompt
    kept: KeptSets | None = None  # of loss tokens; None: all rows are over the whole vocabulary
    kept_given: bool = False  # whether sets were given, those of no row among them

    @property
    def dtype(self) -> torch.dtype:
        """Of every vector of floats."""
        return self.inv_temperature.dtype

    def row_advantages(self) -> Tensor:
        """(N,), worked out from the rewards where those are given."""
        if self.advantages is not None:
            return self.advantages
        assert self.rewards is not None  # one of the two is given
        per_sequence = group_advantages(self.rewards, self.num_generations, scale_rewards=self.scale_rewards)
        return self.layout.to_rows(per_sequence.to(self.dtype))

    def seq(self) -> Tensor:
        """(N,) int32: the sequence of each row."""
        s = torch.arange(self.layout.num_sequences, dtype=torch.int32, device=self.mask.device)
        return self.layout.to_rows(s)

    def prompts(self) -> Tensor | None:
        """(S,) int64, below S: the prompt of each sequence; None: it is not known."""
        count, device = self.layout.num_sequences, self.mask.device
        if self.group_ids is None:
            if (size := self.group_size) is None:
                return None
            check(isinstance(size, int) and size > 0, "num_generations", "an integer >= 1", size)
            return torch.arange(count, device=device) // size
        order = self.group_ids.argsort(stable=True)  # without torch.unique, for which a device has to be waited for
        ordered = self.group_ids[order]
        first = torch.cat([ordered.new_zeros(min(count, 1), dtype=torch.bool), ordered[1:] != ordered[:-1]])
        return torch.empty_like(order).scatter_(0, order, first.cumsum(0))

    def num_items(self, here: Tensor) -> Tensor | float:
        """`num_items_in_batch`, or how many are `here`, where that is not given; 1 in place of 0."""
        if self.num_items_in_batch is None:
            return here.clamp(min=1)
        if isinstance(self.num_items_in_batch, Tensor):
            return torch.where(self.num_items_in_batch > 0, self.num_items_in_batch, 1.0)
        return self.num_items_in_batch if self.num_items_in_batch > 0 else 1

    def take(self, rows: slice | Tensor, layout: Layout) -> Batch:
        """Some rows, all of them loss tokens, as a batch of their own that `layout` describes."""
        names = ("inv_temperature", "advantages", "old", "ref", "sampling", "importance_ratio")
        vectors: dict[str, Any] = dict(zip(names, take([getattr(self, name) for name in names], rows), strict=True))
        ids, mask = self.ids[rows], self.mask[rows]
        return dataclasses.replace(self, layout=layout, shape=ids.shape, ids=ids, mask=mask, **vectors)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over logits of a dtype, and of the vectors beside them."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def take(vectors: Sequence[Tensor | None], rows: slice | Tensor) -> list[Tensor | None]:
    """The given rows of (N,) vectors of one dtype, None staying None; by index, one gather for all of them."""
    if isinstance(rows, slice):
        return [None if x is None else x[rows] for x in vectors]
    gathered = iter(torch.stack([x for x in vectors if x is not None]).index_select(1, rows).unbind())
    return [None if x is None else next(gathered) for x in vectors]
