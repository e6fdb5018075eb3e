"""The ValueErrors of bad arguments: which one, what was expected, what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def describe(x: object) -> str:
    return f"a tensor of shape {tuple(x.shape)}, {x.dtype}, {x.device}" if isinstance(x, Tensor) else repr(x)


def check(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {describe(got)}")


def check_dtype(name: str, x: Tensor, *dtypes: torch.dtype) -> None:
    """`x` has one of `dtypes`: torch.bool, those of INTEGERS, those of FLOATS."""
    kinds = {
        "bool": torch.bool,
        "an integer dtype": INTEGERS[0],
        "a floating point dtype (float32, bfloat16, float16, float64)": FLOATS[0],
    }
    expected = " or ".join(kind for kind, member in kinds.items() if member in dtypes)
    check(x.dtype in dtypes, name, expected, x)
