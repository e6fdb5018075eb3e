"""Which cases and implementations a run measures, by the options of the command."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastgrpo.bench.operation import Case, Implementation
from fastgrpo.bench.registry import OPERATIONS, REGISTRY
from fastgrpo.commands.errors import UsageError


class Head(NamedTuple):
    """Of a model."""

    H: int
    V: int
    softcap: float | None


MODELS = {
    "qwen2.5-0.5b": Head(896, 151_936, None),
    "qwen2.5-7b": Head(3584, 152_064, None),
    "llama3-8b": Head(4096, 128_256, None),
    "gemma2-9b": Head(3584, 256_000, 30.0),
}
SMALLEST = MODELS["qwen2.5-0.5b"]  # without --model
SHAPE = dict(B=8, T=64, V=SMALLEST.V, H=SMALLEST.H)  # where --shape and --model say nothing
DTYPES = ("bf16", "fp32")  # without --dtype


def parse_shape(text: str) -> dict[str, int]:
    """ "B=8,T=64,V=151936,H=896", any of them, as numbers.

    Raises:
        ValueError: anything else.
    """
    sizes = {}
    for part in filter(None, text.split(",")):
        found = re.fullmatch(r"\s*([BTVH])=([1-9][0-9_]*)\s*", part)
        if not found:
            raise ValueError(f"shape: expected {shape_text()} or some of them, got {text!r}")
        sizes[found[1]] = int(found[2])
    return sizes


def shape_text() -> str:
    return ",".join(f"{name}={size}" for name, size in SHAPE.items())


def implementations(options: argparse.Namespace) -> list[Implementation]:
    """The implementations that --impl and --backend choose, and all floors."""
    names, known = set(options.impl or ()), {each.name for each in REGISTRY}
    if unknown := names - known:
        raise UsageError(f"--impl: expected some of {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    return [
        each
        for each in REGISTRY
        if each.is_floor
        or (not names or each.name in names)
        and (not options.backend or each.name != "fastgrpo" or each.backend in (*options.backend, "auto"))
    ]


def cases(options: argparse.Namespace) -> list[Case]:
    """The cases to measure: a named list or all combinations of the sizes given; --op and --dtype choose of them."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: cuda is not available here")
    if options.plot and options.no_plot:
        raise UsageError("expected one of --plot and --no-plot")
    if sum(map(bool, (options.quick, options.full, options.growth, options.model or options.shape))) > 1:
        raise UsageError("expected one of --quick, --full, --growth, and --model with --shape")
    if options.model or options.shape:
        named = [
            Case(op.name, dtype=dtype, softcap=softcap if op.softcap == "taken" else None, model=model, **sizes)
            for model, softcap, sizes in _sizes(options)
            for op in OPERATIONS.values()
            if not (softcap and op.softcap == "refused")
            for dtype in (op.dtypes or options.dtype or DTYPES)
        ]
    else:
        which = "growth" if options.growth else "full" if options.full else "quick"
        named = [case for op in OPERATIONS.values() for case in getattr(op, which)]
    chosen = []
    for case in named:
        if options.op and case.op not in options.op:
            continue
        if options.dtype and case.dtype not in options.dtype and case.operation.dtypes is None:
            continue
        for inactive in options.inactive or [case.inactive]:
            if not 0 <= inactive < 1:
                raise UsageError(f"--inactive: expected a share from 0 to below 1, got {inactive}")
            inactive = inactive if case.operation.has_inactive else 0.0
            each = dataclasses.replace(case, device=device, inactive=inactive)
            chosen += [each] * (each not in chosen)
    if options.dtype and not options.op and all(case.operation.dtypes for case in chosen):
        chosen = []  # only those that have no choice of a dtype
    if not chosen:
        raise UsageError("no case fits --op and --dtype together; --shape or --model makes its own")
    return chosen


def _sizes(options: argparse.Namespace) -> Iterator[tuple[str | None, float | None, dict[str, int]]]:
    """(model, softcap, sizes) of every model and shape given."""
    for shape in options.shape or [""]:
        try:
            given = parse_shape(shape)
        except ValueError as error:
            raise UsageError(f"--shape: {error}") from error
        for model in options.model or [None]:
            head = MODELS[model] if model else SMALLEST
            yield model, head.softcap, SHAPE | dict(H=head.H, V=head.V) | given
