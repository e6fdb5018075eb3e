"""The ValueErrors of bad arguments: which one, what was expected, what came."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


def describe(x: object) -> str:
    return f"a tensor of shape {tuple(x.shape)}, {x.dtype}, {x.device}" if isinstance(x, Tensor) else repr(x)


def wrong(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {describe(got)}")


def check(ok: bool, name: str, expected: str, got: object) -> None:
    """A text that has to be made first is left to `wrong`: a call makes some thirty checks."""
    if not ok:
        raise wrong(name, expected, got)


def check_dtype(name: str, x: Tensor, *dtypes: torch.dtype) -> None:
    """`x` has memory of its own, and one of `dtypes`: torch.bool, those of INTEGERS, those of FLOATS."""
    if type(x) is not Tensor and hasattr(x, "__tensor_flatten__"):
        raise wrong(name, "a tensor with memory of its own, such as a DTensor's full_tensor()", x)
    if x.dtype not in dtypes:
        kinds = {
            "bool": torch.bool,
            "an integer dtype": INTEGERS[0],
            "a floating point dtype (float32, bfloat16, float16, float64)": FLOATS[0],
        }
        raise wrong(name, " or ".join(kind for kind, member in kinds.items() if member in dtypes), x)


def check_tensor(name: str, x: object, shape: Sequence[int], device: torch.device, *dtypes: torch.dtype) -> None:
    """`x` is a tensor of that shape on that device, with one of `dtypes` as in `check_dtype`."""
    if not isinstance(x, Tensor) or x.shape != shape:
        raise wrong(name, f"shape {tuple(shape)}", x)
    if x.device != device:
        raise wrong(name, f"device {device}", x)
    check_dtype(name, x, *dtypes)


def values_can_be_checked(x: Tensor) -> bool:
    """Whether values may be read: on a CPU; on a GPU, where that waits, with FASTGRPO_DEBUG=1; not while compiling."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get("FASTGRPO_DEBUG") == "1"
