"""Padded (B, T) and packed (N,) inputs, both as rows; a sequence is a segment of rows.

What the public functions call sees a `Batch` of flat (N,) vectors, and two operations of its layout: the sum over each
sequence, and a sequence's number put on each of its rows.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.advantages import SCALE_REWARDS, check_groups, group_advantages
from fastgrpo.checks import FLOATS, INTEGERS, check, check_dtype
from fastgrpo.objective import Objective


@dataclass(frozen=True)
class Padded:
    """(B, T): row r is token r % T of sequence r // T."""

    num_sequences: int
    length: int

    def seq_sum(self, x: Tensor) -> Tensor:  # (N, ...) -> (S, ...)
        return x.view(self.num_sequences, self.length, *x.shape[1:]).sum(1)

    def seq_mean(self, x: Tensor) -> Tensor:  # over all rows, masked ones too
        return self.seq_sum(x) / max(self.length, 1)

    def to_rows(self, s: Tensor) -> Tensor:  # (S,) -> (N,)
        return s[:, None].expand(-1, self.length).reshape(-1).contiguous()  # one sequence would give a view


@dataclass(frozen=True)
class Packed:
    """(N,) with cu_seqlens (S+1,): sequence i is rows cu_seqlens[i] to cu_seqlens[i+1]."""

    num_sequences: int
    cu_seqlens: Tensor
    seq: Tensor  # (N,) int64

    def seq_sum(self, x: Tensor) -> Tensor:  # (N, ...) -> (S, ...)
        return torch.segment_reduce(x, "sum", offsets=self.cu_seqlens, unsafe=True, initial=0)

    def seq_mean(self, x: Tensor) -> Tensor:
        return self.seq_sum(x) / (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).clamp(min=1)

    def to_rows(self, s: Tensor) -> Tensor:
        return s[self.seq]


@dataclass
class Batch:
    """The arguments of a call after validation: vectors of N rows, in one dtype, and how rows make S sequences."""

    layout: Padded | Packed
    shape: torch.Size  # of completion_ids and of every per-token result
    dtype: torch.dtype
    ids: Tensor  # (N,) int64; anything where masked
    mask: Tensor  # (N,) bool: the loss tokens
    scored: Tensor  # (N,) bool: the rows that are read; fewer than in `mask` if rows that cannot learn are left out
    inv_temperature: Tensor  # (N,) fp32
    given_advantages: Tensor | None = None  # (N,)
    advantages_per_token: bool = False
    rewards: Tensor | None = None  # (S,); given in place of advantages, with the next two
    num_generations: int | None = None
    scale_rewards: str = "group"
    old: Tensor | None = None  # (N,)
    ref: Tensor | None = None  # (N,)
    sampling: Tensor | None = None  # (N,)
    importance_ratio: Tensor | None = None  # (N,)
    importance_ratio_per_sequence: bool = False
    num_items_in_batch: Tensor | float | None = None
    loss_scale: Tensor | float = 1.0
    masked: bool = True  # whether a mask was given; without one every row is scored
    skip_inert: bool = False  # the caller wants no statistics, so rows that cannot learn need not be scored
    # a part of a batch is averaged over the whole batch: it holds what `row_weight` and `entropy_weight` gave there
    weight: Tensor | None = None  # (N,)
    h: Tensor | None = None  # (N,)

    @property
    def advantages(self) -> Tensor:  # (N,)
        if self.given_advantages is None:
            per_sequence = group_advantages(self.rewards, self.num_generations, scale_rewards=self.scale_rewards)
            self.given_advantages = self.layout.to_rows(per_sequence.to(self.dtype))
        return self.given_advantages

    @property
    def seq(self) -> Tensor:  # (N,) int32: the sequence of each row
        s = torch.arange(self.layout.num_sequences, dtype=torch.int32, device=self.mask.device)
        return self.layout.to_rows(s)

    def scored_only(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """`x`, with `fill` in the rows that are not scored, whose values may be NaN."""
        return torch.where(self.scored, x, fill)

    def num_items(self, mask: Tensor) -> Tensor | float:
        """The denominator of dapo, cispo and vespo; 1 in place of 0."""
        if self.num_items_in_batch is None:
            return mask.sum().clamp(min=1)
        if isinstance(self.num_items_in_batch, Tensor):
            return torch.where(self.num_items_in_batch > 0, self.num_items_in_batch, 1.0)
        return self.num_items_in_batch if self.num_items_in_batch > 0 else 1

    def leave_out_inert(self, objective: Objective) -> None:
        """Leave rows unscored that add nothing to loss and gradient, if the caller wants no statistics."""
        if self.skip_inert and self.may_be_inert(objective):
            self.scored = self.mask & (self.advantages != 0)

    def may_be_inert(self, objective: Objective) -> bool:
        """Whether a row of advantage 0 is known to add nothing to loss and gradient."""
        local = objective.is_token_local or not self.advantages_per_token
        return objective.zero_advantage_is_inert and local

    def take(self, rows: slice | Tensor, layout: Padded | Packed) -> Batch:
        """Some rows, as a batch of their own that `layout` describes; `weight` and `h` must be given."""
        vectors = ("ids", "mask", "scored", "inv_temperature", "given_advantages", "old", "ref", "sampling")
        vectors = {name: getattr(self, name) for name in (*vectors, "importance_ratio", "weight", "h")}
        taken = {name: None if x is None else x[rows] for name, x in vectors.items()}
        return dataclasses.replace(self, layout=layout, shape=taken["ids"].shape, rewards=None, **taken)


def check_rows(rows: Tensor, completion_ids: Tensor, name: str, width: str) -> None:
    """`rows` is (B, T, width) beside ids (B, T), or (N, width) beside (N,); same device, floating point."""
    check(isinstance(rows, Tensor), name, "a tensor", rows)
    check_dtype(name, rows, *FLOATS)
    check(rows.dim() in (2, 3), name, f"shape (B, T, {width}), or (N, {width}) with cu_seqlens", rows)
    check(
        isinstance(completion_ids, Tensor) and completion_ids.shape == rows.shape[:-1],
        "completion_ids",
        f"shape {tuple(rows.shape[:-1])} to match {name}",
        completion_ids,
    )
    check_dtype("completion_ids", completion_ids, *INTEGERS)
    check(completion_ids.device == rows.device, "completion_ids", f"device {rows.device}", completion_ids)
    check(rows.size(-1) > 0, name, f"{width} > 0", rows)


def _values_can_be_checked(x: Tensor) -> bool:
    """Whether values may be read: on a CPU; on a GPU, where that waits, with FASTGRPO_DEBUG=1; not while compiling."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get("FASTGRPO_DEBUG") == "1"


def check_ids(ids: Tensor, mask: Tensor, vocab_size: int, mask_name: str = "completion_mask") -> None:
    """Check that the ids of the rows in `mask` are in [0, V); those of other rows may be anything, such as -100."""
    if not _values_can_be_checked(ids):
        return
    outside = ((ids < 0) | (ids >= vocab_size)) & mask
    if bool(outside.any()):
        where = int(outside.nonzero()[0])
        raise ValueError(
            f"completion_ids: expected ids in [0, {vocab_size}) where {mask_name} is set, got {int(ids[where])} at "
            f"flat position {where}"
        )


def make_mask(mask: Tensor | None, shape: torch.Size, device: torch.device, name: str = "completion_mask") -> Tensor:
    """(N,) bool from a mask of bools or real numbers, or all True."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device).view(-1)
    check(isinstance(mask, Tensor) and mask.shape == shape, name, f"shape {tuple(shape)}", mask)
    check_dtype(name, mask, torch.bool, *INTEGERS, *FLOATS)
    check(mask.device == device, name, f"device {device}", mask)
    return (mask != 0).reshape(-1)


def make_inv_temperature(
    temperature: float | Tensor, layout: Padded | Packed, shape: torch.Size, mask: Tensor, dtype: torch.dtype
) -> Tensor:
    """(N,) 1/temperature from a number, a value per sequence or a value per token; rows outside `mask` get 1."""
    device = mask.device
    expected = "a number > 0, or a tensor per sequence or per token"
    if not isinstance(temperature, Tensor):
        number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
        check(number and 0 < temperature < float("inf"), "temperature", expected, temperature)
        return torch.full((shape.numel(),), 1.0 / temperature, dtype=dtype, device=device)
    temperature = temperature.detach()
    if temperature.dim() == 0:
        check_dtype("temperature", temperature, *FLOATS, *INTEGERS)
        rows = temperature.to(device, dtype).expand(shape.numel())
    else:
        rows, _ = _to_rows("temperature", temperature, layout, shape, device, dtype)
    rows = torch.where(mask, rows, 1.0)
    if _values_can_be_checked(rows):
        check(bool(((rows > 0) & rows.isfinite()).all()), "temperature", "finite values > 0", temperature)
    return rows.reciprocal()


def make_layout(shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> Padded | Packed:
    """The layout of ids (B, T), or of packed ids (N,) with cu_seqlens."""
    if len(shape) == 2:
        check(cu_seqlens is None, "cu_seqlens", "None with padded (B, T) inputs", cu_seqlens)
        return Padded(shape[0], shape[1])
    check(
        isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 and cu_seqlens.numel() > 0,
        "cu_seqlens",
        "shape (S+1,) with packed (N,) inputs",
        cu_seqlens,
    )
    check_dtype("cu_seqlens", cu_seqlens, *INTEGERS)
    cu_seqlens = cu_seqlens.to(device, torch.int64)
    if _values_can_be_checked(cu_seqlens):
        ordered = int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == shape[0] and bool((cu_seqlens.diff() >= 0).all())
        check(ordered, "cu_seqlens", f"values from 0 up to {shape[0]}, never falling", cu_seqlens.tolist())
    rows = torch.arange(shape[0], device=device)
    return Packed(cu_seqlens.numel() - 1, cu_seqlens, torch.searchsorted(cu_seqlens, rows, right=True) - 1)


def _to_rows(
    name: str, x: Tensor, layout: Padded | Packed, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, bool]:
    """(N,) from a value per token (`shape`) or per sequence ((S,) or (S, 1)), and whether it was per sequence."""
    sequences = layout.num_sequences
    expected = f"shape {tuple(shape)} (per token) or ({sequences},) (per sequence) on {device}"
    check(isinstance(x, Tensor) and x.device == device, name, expected, x)
    check_dtype(name, x, *FLOATS)
    if x.shape in ((sequences,), (sequences, 1)):
        return layout.to_rows(x.to(dtype).reshape(-1)).contiguous(), True
    check(x.shape == shape, name, expected, x)
    return x.to(dtype).reshape(-1).contiguous(), False


def _scalar(name: str, value: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor | float:
    if isinstance(value, Tensor):
        check(value.dim() == 0, name, "a number or a 0-dim tensor", value)
        check_dtype(name, value, *FLOATS, *INTEGERS)
        return value.detach().to(device, dtype)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    check(number, name, "a number or a 0-dim tensor", value)
    return value


def make_batch(
    completion_ids: Tensor,
    advantages: Tensor | None,
    *,
    objective: Objective,
    dtype: torch.dtype,
    vocab_size: int | None = None,
    completion_mask: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    rewards: Tensor | None = None,
    num_generations: int | None = None,
    scale_rewards: str = "group",
    importance_sampling_ratio: Tensor | None = None,
    sampling_per_token_logps: Tensor | None = None,
    num_items_in_batch: Tensor | float | None = None,
    loss_scale: Tensor | float = 1.0,
    temperature: float | Tensor = 1.0,
    cu_seqlens: Tensor | None = None,
) -> Batch:
    """The batch of a call whose ids fit its logits: validates the other arguments and puts them on rows.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    if not isinstance(objective, Objective):
        raise ValueError(f"objective: expected an Objective, got {objective!r}")
    shape, device = completion_ids.shape, completion_ids.device
    layout = make_layout(shape, cu_seqlens, device)
    ids = completion_ids.reshape(-1).long().contiguous()
    mask = make_mask(completion_mask, shape, device)
    if vocab_size is not None:
        check_ids(ids, mask, vocab_size)

    def per_token(name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        check(isinstance(x, Tensor) and x.shape == shape, name, f"shape {tuple(shape)}", x)
        check(x.device == device, name, f"device {device}", x)
        check_dtype(name, x, *FLOATS)
        return x.detach().to(dtype).reshape(-1).contiguous()

    check((advantages is None) != (rewards is None), "advantages, rewards", "exactly one of the two", advantages)
    check(scale_rewards in SCALE_REWARDS, "scale_rewards", f"one of {', '.join(SCALE_REWARDS)}", scale_rewards)
    advantages_per_token = False
    if advantages is not None:
        # the objective takes no gradient through the advantages
        check(isinstance(advantages, Tensor), "advantages", "a tensor", advantages)
        advantages, per_seq = _to_rows("advantages", advantages.detach(), layout, shape, device, dtype)
        advantages_per_token = not per_seq
        if advantages_per_token:
            advantages = torch.where(mask, advantages, 0.0)
    else:
        per_sequence = isinstance(rewards, Tensor) and rewards.shape == (layout.num_sequences,)
        check(per_sequence, "rewards", f"shape ({layout.num_sequences},)", rewards)
        check(rewards.device == device, "rewards", f"device {device}", rewards)
        check_dtype("rewards", rewards, *FLOATS, *INTEGERS, torch.bool)
        check_groups(rewards, num_generations)
        rewards = rewards.detach().contiguous()

    ref = per_token("ref_per_token_logps", ref_per_token_logps)
    if objective.beta != 0:
        check(ref is not None, "ref_per_token_logps", "a tensor because beta is not 0", None)
    ratio, ratio_per_sequence = None, False
    if importance_sampling_ratio is not None:
        ratio, ratio_per_sequence = _to_rows(
            "importance_sampling_ratio", importance_sampling_ratio, layout, shape, device, dtype
        )
        ratio = ratio.detach()
    loss_scale = _scalar("loss_scale", loss_scale, device, dtype)
    if num_items_in_batch is not None:
        num_items_in_batch = _scalar("num_items_in_batch", num_items_in_batch, device, dtype)
        negative = not isinstance(num_items_in_batch, Tensor) and num_items_in_batch < 0
        check(not negative, "num_items_in_batch", "a number >= 0", num_items_in_batch)

    return Batch(
        layout=layout,
        shape=shape,
        dtype=dtype,
        ids=ids,
        mask=mask,
        scored=mask,
        masked=completion_mask is not None,
        inv_temperature=make_inv_temperature(temperature, layout, shape, mask, dtype),
        given_advantages=advantages,
        advantages_per_token=advantages_per_token,
        rewards=rewards,
        num_generations=num_generations,
        scale_rewards=scale_rewards,
        old=per_token("old_per_token_logps", old_per_token_logps),
        ref=ref,
        sampling=per_token("sampling_per_token_logps", sampling_per_token_logps),
        importance_ratio=ratio,
        importance_ratio_per_sequence=ratio_per_sequence,
        num_items_in_batch=num_items_in_batch,
        loss_scale=loss_scale,
    )
