"""The sets of tokens that a sampler kept after top-k, top-p or min-p, over which a row's distribution is taken."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.batch.checks import INTEGERS, check, check_dtype, check_tensor, values_can_be_checked, wrong


class KeptSets(NamedTuple):
    """The set of each row: `ids[start : start + size]`, in any order, an id more than once counting once."""

    ids: Tensor  # integers, flat
    start: Tensor  # (N,) int64
    size: Tensor  # (N,) int64; 0: there is no set, and the row is over the whole vocabulary

    @property
    def given(self) -> Tensor:
        """(N,) bool: the rows with a set."""
        return self.size > 0

    def only(self, rows: Tensor | None) -> KeptSets:
        """Those of some rows, (N,) bool; None: of all."""
        return self if rows is None else self._replace(size=torch.where(rows, self.size, 0))


class Kept(NamedTuple):
    """What `kept_sets` makes: the arguments of these names."""

    kept_ids: Tensor  # (M,)
    kept_offsets: Tensor  # (N+1,)


def kept_sets(sets: Any, counts: Any = None, *, device: torch.device | str | None = None) -> Kept:
    """The sets of tokens that a sampler kept, as the losses and logps take them: `kept_ids` and `kept_offsets`.

        kept = kept_sets([[5, 17, 2], None, [8]])
        linear_logps(hidden, weight, completion_ids, **kept._asdict())

    A row without a set (None or empty; in a mask all or nothing) is over the whole vocabulary.

    Args:
        sets: one of

            - a list with the ids of each row, or of each row of each sequence: lists of integers, tensors or None. If
              one entry is a sequence of rows, all are, and an empty one has no rows;
            - the ids of all rows, one after the other, (M,) integer, with `counts`;
            - (..., V) bool, True for what was kept, such as `torch.isfinite(scores)` of what `generate` returns.
        counts (N,) or (B, T) integer: how many of flat `sets` belong to each row.
        device: of the result; None: that of `sets`, or the CPU.

    Returns:
        Kept(kept_ids (M,), kept_offsets (N+1,) int64), rows in the order of `completion_ids.reshape(-1)`; it has both
        as attributes, and `_asdict()` as keywords.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    if counts is not None:
        ids = _integers("sets", sets, "ids (M,) with counts")
        sizes = _integers("counts", counts, "integers", dims=None).reshape(-1)
        fits = bool((sizes >= 0).all()) and int(sizes.sum()) == len(ids)
        check(fits, "counts", f"numbers >= 0 whose sum is {len(ids)}", counts)
    elif isinstance(sets, Tensor):
        check(sets.dim() >= 2, "sets", "shape (..., V), or (M,) with counts", sets)
        check_dtype("sets", sets, torch.bool)
        rows = sets.reshape(-1, sets.shape[-1])
        rows = rows & ~rows.all(-1, keepdim=True)
        ids, sizes = rows.nonzero()[:, 1], rows.sum(-1)
    else:
        expected = "the ids of each row, lists of integers, tensors (k,) or None; or a bool mask (..., V)"
        check(isinstance(sets, Sequence), "sets", expected, sets)
        lists = _rows_of(sets)
        tensors = [_integers("sets", [] if x is None else x, expected).to("cpu", torch.int64) for x in lists]
        ids = torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *tensors])
        sizes = torch.tensor([len(x) for x in tensors], dtype=torch.int64, device="cpu")
    device = ids.device if device is None else device
    offsets = torch.cat([sizes.new_zeros(1, dtype=torch.int64), sizes.long().cumsum(0)])
    return Kept(ids.to(device), offsets.to(device))


def _rows_of(sets: Sequence[Any]) -> Sequence[Any]:
    """The rows of all sequences, one after the other, or those that there are without sequences."""
    if not any(map(_is_nested, sets)):
        return sets
    for entry in sets:
        if not (_is_nested(entry) or (isinstance(entry, Sequence) and len(entry) == 0)):
            raise wrong("sets", "a sequence of rows in each place, as in others", entry)
    return [row for entry in sets for row in entry]


def _is_nested(entry: Any) -> bool:
    """Whether an entry is a sequence of rows, and not a row."""
    return isinstance(entry, Sequence) and any(not isinstance(x, Integral) for x in entry)


def _integers(name: str, x: Any, expected: str, dims: int | None = 1) -> Tensor:
    """As a tensor, of that many dimensions."""
    try:
        made = x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise wrong(name, expected, x) from None
    made = made if made.numel() > 0 else made.long()  # torch takes an empty list for floats
    check(made.dtype in INTEGERS and dims in (None, made.dim()), name, expected, x)
    return made


def make_kept(
    kept_ids: Tensor | None,
    kept_offsets: Tensor | None,
    completion_ids: Tensor,
    mask: Tensor,
    vocab: int,
) -> KeptSets | None:
    """The sets of a call, checked; None: it has none, or no id in any.

    Args:
        completion_ids: of any shape (...), N rows.
        mask (N,) bool: the rows that are read.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    if kept_ids is None:
        check(kept_offsets is None, "kept_offsets", "None without kept_ids", kept_offsets)
        return None
    shape, device, n = completion_ids.shape, completion_ids.device, completion_ids.numel()
    if kept_offsets is None:
        fits = isinstance(kept_ids, Tensor) and kept_ids.shape[:-1] == shape and kept_ids.dim() == len(shape) + 1
        check(fits, "kept_ids", f"shape {(*shape, 'k')}, or (M,) with kept_offsets", kept_ids)
        check_tensor("kept_ids", kept_ids, kept_ids.shape, device, *INTEGERS)
        width = kept_ids.shape[-1]
        start = torch.arange(n, device=device) * width
        count = (kept_ids.reshape(n, width).long() >= 0).sum(-1)  # unsigned ones cannot be compared
    else:
        check(
            isinstance(kept_ids, Tensor) and kept_ids.dim() == 1, "kept_ids", "shape (M,) with kept_offsets", kept_ids
        )
        check_tensor("kept_ids", kept_ids, kept_ids.shape, device, *INTEGERS)
        check_tensor("kept_offsets", kept_offsets, (n + 1,), device, *INTEGERS)
        offsets = kept_offsets.long()
        if values_can_be_checked(offsets):
            ordered = int(offsets[0]) == 0 and int(offsets[-1]) == len(kept_ids) and bool((offsets.diff() >= 0).all())
            if not ordered:
                expected = f"values from 0 up to {len(kept_ids)}, the length of kept_ids, never falling"
                raise wrong("kept_offsets", expected, offsets.tolist() if n < 20 else kept_offsets)
        start, count = offsets[:-1], offsets.diff()
        # a row whose offsets are wrong, where they are not checked, has one id, which lies behind the last
        wrong_row = (start < 0) | (count < 0) | (offsets[1:] > len(kept_ids))
        start, count = torch.where(wrong_row, len(kept_ids), start), torch.where(wrong_row, 1, count)
    if kept_ids.numel() == 0:
        return None
    sets = KeptSets(kept_ids.reshape(-1), start, count).only(mask)
    if values_can_be_checked(sets.ids):
        _check_values(sets, completion_ids.reshape(-1), vocab, padded=kept_offsets is None)
    return sets


def _check_values(sets: KeptSets, targets: Tensor, vocab: int, padded: bool) -> None:
    """Every id is one of the vocabulary, and the sampled token one of its row's set."""
    ids, start, count = sets
    row = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    first = count.cumsum(0) - count
    read = ids[(start - first)[row] + torch.arange(len(row), device=row.device)].long()
    outside = (read < 0) | (read >= vocab)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        behind = ", -1 only behind them" if padded else ""
        expected = f"ids in [0, {vocab}){behind}"
        raise ValueError(f"kept_ids: expected {expected}, got {int(read[at])} at flat position {int(row[at])}")
    holds = torch.zeros_like(sets.given).index_put_((row[read == targets[row]],), torch.ones((), dtype=torch.bool))
    if bool((missing := sets.given & ~holds).any()):
        at = int(missing.nonzero()[0])
        raise ValueError(
            f"kept_ids: expected the sampled token {int(targets[at])} among the kept ones at flat position {at}, got "
            f"{int(count[at])} others"
        )
