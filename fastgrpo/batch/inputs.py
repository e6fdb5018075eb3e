"""The arguments that a call gives for its batch: declared once, checked once, put on rows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar

import torch
from torch import Tensor

from fastgrpo.advantages import SCALE_REWARDS, check_groups, group_advantages
from fastgrpo.batch.batch import Batch
from fastgrpo.batch.checks import (
    FLOATS,
    INTEGERS,
    check,
    check_dtype,
    check_tensor,
    values_can_be_checked,
    wrong,
)
from fastgrpo.batch.kept import make_kept
from fastgrpo.batch.layout import Layout, Packed, Padded

F = TypeVar("F", bound=Callable[..., Any])


class _Inputs(TypedDict, total=False):
    completion_mask: Tensor | None
    old_per_token_logps: Tensor | None
    ref_per_token_logps: Tensor | None
    rewards: Tensor | None
    num_generations: int | None
    scale_rewards: str
    importance_sampling_ratio: Tensor | None
    sampling_per_token_logps: Tensor | None
    num_items_in_batch: Tensor | float | None
    loss_scale: Tensor | float


class _OfLogits(TypedDict, total=False):
    temperature: float | Tensor


class _Last(TypedDict, total=False):
    cu_seqlens: Tensor | None
    token_weights: Tensor | None
    group_ids: Tensor | None


class PolicyInputs(_Inputs, _Last, total=False):
    """The keyword arguments of a loss from logps; `grpo_loss` says what each of them is."""


class KeptInputs(TypedDict, total=False):
    """The sets of tokens that a sampler kept; `grpo_loss` says what each of them is."""

    kept_ids: Tensor | None
    kept_offsets: Tensor | None


class Inputs(_Inputs, _OfLogits, _Last, KeptInputs, total=False):
    """Those of a loss that makes its logps from logits."""


class HeadOptions(TypedDict, total=False):
    """What makes logits of hidden states, beside the weight; `linear_grpo_loss` says what each of them is."""

    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    vocab_size: int | None
    chunk_size: int | None
    logits_dtype: torch.dtype | Literal["auto"]
    column_tolerance: float


class LinearInputs(HeadOptions, Inputs, total=False):
    """Those of a loss that makes its logps from hidden states."""


# of the others: None
DEFAULTS: dict[str, Any] = dict(
    scale_rewards="group",
    loss_scale=1.0,
    temperature=1.0,
    logit_scale=1.0,
    logits_dtype="auto",
    column_tolerance=0.0,
)


def takes(declared: type) -> Callable[[F], F]:
    """Shows the arguments that `declared` names, with their defaults, in the signature of a function which takes them
    as keywords that it does not name itself; a call of it is not wrapped."""

    def show(function: F) -> F:
        signature = inspect.signature(function)
        *own, rest = signature.parameters.values()
        at = next(i for i, p in enumerate(own) if p.name in ("objective", "return_stats", "return_entropy"))
        inputs = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=DEFAULTS.get(name), annotation=kind)
            for name, kind in ((name, x.__forward_arg__) for name, x in declared.__annotations__.items())
        ]
        shown = signature.replace(parameters=[*own[:at], *inputs, *own[at:]])
        function.__signature__ = shown  # type: ignore[attr-defined]  # what inspect looks for; no callable declares it
        function.__annotations__ = {p.name: p.annotation for p in inputs} | function.__annotations__
        del function.__annotations__[rest.name]
        return function

    return show


def check_names(inputs: PolicyInputs | HeadOptions, declared: type, function: str) -> None:
    """Raise Python's TypeError for an argument that a function does not have."""
    for name in inputs:
        if name not in declared.__annotations__:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


def head_options(inputs: LinearInputs) -> HeadOptions:
    """Those of them that make logits."""
    return {name: value for name, value in inputs.items() if name in HeadOptions.__annotations__}  # type: ignore[return-value]  # by their names


def check_rows(rows: Tensor, completion_ids: Tensor, name: str, width: str) -> None:
    """`rows` is (B, T, width) beside ids (B, T), or (N, width) beside (N,); same device, floating point."""
    check(isinstance(rows, Tensor), name, "a tensor", rows)
    check_dtype(name, rows, *FLOATS)
    if rows.dim() not in (2, 3):
        raise wrong(name, f"shape (B, T, {width}), or (N, {width}) with cu_seqlens", rows)
    if not isinstance(completion_ids, Tensor) or completion_ids.shape != rows.shape[:-1]:
        raise wrong("completion_ids", f"shape {tuple(rows.shape[:-1])} to match {name}", completion_ids)
    check_tensor("completion_ids", completion_ids, rows.shape[:-1], rows.device, *INTEGERS)
    if rows.size(-1) == 0:
        raise wrong(name, f"{width} > 0", rows)


def check_ids(ids: Tensor, mask: Tensor, vocab_size: int, mask_name: str = "completion_mask") -> None:
    """Check that the ids of the rows in `mask` are in [0, V); those of other rows may be anything, such as -100."""
    if not values_can_be_checked(ids):
        return
    read = torch.where(mask, ids, 0)
    if read.numel() == 0:
        return
    lowest, highest = read.aminmax()
    if lowest < 0 or highest >= vocab_size:
        where = int(((read < 0) | (read >= vocab_size)).nonzero()[0])
        raise ValueError(
            f"completion_ids: expected ids in [0, {vocab_size}) where {mask_name} is set, got {int(ids[where])} at "
            f"flat position {where}"
        )


def make_mask(mask: Tensor | None, shape: torch.Size, device: torch.device, name: str = "completion_mask") -> Tensor:
    """(N,) bool from a mask of bools or real numbers, or all True."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device).view(-1)
    check_tensor(name, mask, shape, device, torch.bool, *INTEGERS, *FLOATS)
    return (mask != 0).reshape(-1)


def make_inv_temperature(
    temperature: float | Tensor, layout: Layout, shape: torch.Size, mask: Tensor, dtype: torch.dtype
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
    if values_can_be_checked(rows):
        check(bool(((rows > 0) & rows.isfinite()).all()), "temperature", "finite values > 0", temperature)
    return rows.reciprocal()


def make_layout(shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> Layout:
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
    assert cu_seqlens is not None  # as was checked
    check_dtype("cu_seqlens", cu_seqlens, *INTEGERS)
    cu_seqlens = cu_seqlens.to(device, torch.int64)
    if values_can_be_checked(cu_seqlens):
        ordered = int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == shape[0] and bool((cu_seqlens.diff() >= 0).all())
        check(ordered, "cu_seqlens", f"values from 0 up to {shape[0]}, never falling", cu_seqlens.tolist())
    rows = torch.arange(shape[0], device=device)
    return Packed(cu_seqlens.numel() - 1, cu_seqlens, torch.searchsorted(cu_seqlens, rows, right=True) - 1)


def _to_rows(
    name: str, x: Tensor, layout: Layout, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, bool]:
    """(N,) from a value per token (`shape`) or per sequence ((S,) or (S, 1)), and whether it was per sequence."""
    sequences = layout.num_sequences
    per_sequence = isinstance(x, Tensor) and x.shape in ((sequences,), (sequences, 1))
    if not isinstance(x, Tensor) or x.device != device or not (per_sequence or x.shape == shape):
        raise wrong(name, f"shape {tuple(shape)} (per token) or ({sequences},) (per sequence) on {device}", x)
    check_dtype(name, x, *FLOATS)
    rows = x.to(dtype).reshape(-1)
    return (layout.to_rows(rows) if per_sequence else rows).contiguous(), per_sequence


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
    inputs: PolicyInputs,
    *,
    dtype: torch.dtype,
    vocab_size: int | None = None,
    groups_in_pass: bool = False,
) -> Batch:
    """The batch of a call whose ids fit its logits: checks the other arguments and puts them on rows.

    Args:
        inputs: what the caller gave of them.
        dtype: of the vectors.
        vocab_size: ids, those of kept sets too, are checked against it; None: there are no logits.
        groups_in_pass: leave rewards to a pass over the logits, where it can make advantages of them.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    given = {**DEFAULTS, **inputs}
    shape, device = completion_ids.shape, completion_ids.device
    layout = make_layout(shape, given.get("cu_seqlens"), device)
    ids = completion_ids.reshape(-1).long().contiguous()
    mask = make_mask(given.get("completion_mask"), shape, device)
    kept = None
    if vocab_size is not None:
        check_ids(ids, mask, vocab_size)
        kept = make_kept(given.get("kept_ids"), given.get("kept_offsets"), completion_ids, mask, vocab_size)

    def per_token(name: str) -> Tensor | None:
        if (x := given.get(name)) is None:
            return None
        check_tensor(name, x, shape, device, *FLOATS)
        return x.detach().to(dtype).reshape(-1).contiguous()

    ratio, ratio_per_sequence = given.get("importance_sampling_ratio"), False
    if ratio is not None:
        ratio, ratio_per_sequence = _to_rows("importance_sampling_ratio", ratio, layout, shape, device, dtype)
        ratio = ratio.detach()
    items = given.get("num_items_in_batch")
    if items is not None:
        items = _scalar("num_items_in_batch", items, device, dtype)
        check(isinstance(items, Tensor) or items >= 0, "num_items_in_batch", "a number >= 0", items)
    weights = given.get("token_weights")
    if weights is not None:
        weights = _to_rows("token_weights", weights, layout, shape, device, dtype)[0].detach()
    groups = given.get("group_ids")
    if groups is not None:
        check_tensor("group_ids", groups, (layout.num_sequences,), device, *INTEGERS)
    return Batch(
        layout=layout,
        shape=shape,
        ids=ids,
        mask=mask,
        masked=given.get("completion_mask") is not None,
        inv_temperature=make_inv_temperature(given["temperature"], layout, shape, mask, dtype),
        **_advantages(advantages, given, layout, shape, mask, dtype, groups_in_pass),
        old=per_token("old_per_token_logps"),
        ref=per_token("ref_per_token_logps"),
        sampling=per_token("sampling_per_token_logps"),
        importance_ratio=ratio,
        importance_ratio_per_sequence=ratio_per_sequence,
        num_items_in_batch=items,
        loss_scale=_scalar("loss_scale", given["loss_scale"], device, dtype),
        token_weights=weights,
        group_ids=None if groups is None else groups.long(),
        group_size=given.get("num_generations"),
        kept=kept,
        kept_given=given.get("kept_ids") is not None,
    )


def _advantages(
    advantages: Tensor | None,
    given: dict[str, Any],
    layout: Layout,
    shape: torch.Size,
    mask: Tensor,
    dtype: torch.dtype,
    groups_in_pass: bool,
) -> dict[str, Any]:
    """The fields of a batch that are advantages, or rewards for a pass to make them of."""
    rewards: Any = given.get("rewards")
    scale_rewards, device = given["scale_rewards"], mask.device
    check((advantages is None) != (rewards is None), "advantages, rewards", "exactly one of the two", advantages)
    if scale_rewards not in SCALE_REWARDS:
        raise wrong("scale_rewards", f"one of {', '.join(SCALE_REWARDS)}", scale_rewards)
    if advantages is not None:
        # the objective takes no gradient through the advantages
        check(isinstance(advantages, Tensor), "advantages", "a tensor", advantages)
        rows, per_sequence = _to_rows("advantages", advantages.detach(), layout, shape, device, dtype)
        if not per_sequence:
            rows = torch.where(mask, rows, 0.0)
        return dict(advantages=rows, advantages_per_token=not per_sequence)
    check_tensor("rewards", rewards, (layout.num_sequences,), device, *FLOATS, *INTEGERS, torch.bool)
    check_groups(rewards, given.get("num_generations"))
    rewards = rewards.detach().contiguous()
    # a pass cannot take a std over the batch, nor float64 rewards
    if groups_in_pass and scale_rewards != "batch" and rewards.dtype != torch.float64:
        fields = dict(num_generations=given["num_generations"], scale_rewards=scale_rewards)
        return dict(rewards=rewards.float(), **fields)
    made = group_advantages(rewards, given.get("num_generations"), scale_rewards=scale_rewards)
    return dict(advantages=layout.to_rows(made.to(dtype)))
