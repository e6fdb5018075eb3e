"""The CPU backend: libfastgrpo_cpu (csrc/cpu) on torch tensors, through ctypes.

The library is loaded at the first use. Calls release the GIL and use up to `torch.get_num_threads()` threads of their
own; results depend neither on that number nor on how rows are batched. The instruction set is the best that the CPU
has; the environment variable FASTGRPO_CPU_ISA (avx512, avx2, neon, portable) names another.
"""

from __future__ import annotations

import ctypes
import functools
import os

import torch
from torch import Tensor

from .contract import Call
from .native import DTYPES, Args, RowCalls, load

_ROWS = (None, ctypes.POINTER(Args), ctypes.c_int32, ctypes.c_int32)  # args, isa, threads


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    return load(
        "fastgrpo_cpu",
        "a C++ compiler",
        isa=(ctypes.c_int32, ctypes.c_char_p),
        isa_names=(ctypes.c_char_p,),
        row_stats=_ROWS,
        row_grad=_ROWS,
        token_loss=_ROWS,
        prefer_large_pages=(None, ctypes.c_void_p, ctypes.c_int64),
    )


def _library() -> ctypes.CDLL:
    library, why = _load()
    if library is None:
        raise RuntimeError(f"backend 'cpu' cannot run here: {why}")
    return library


@functools.cache
def _isa(name: str) -> int:
    isa = _library().fastgrpo_cpu_isa(name.encode())
    if isa < 0:
        problem = "is unknown" if isa == -1 else "cannot run on this CPU"
        raise ValueError(f"FASTGRPO_CPU_ISA: expected one of {', '.join(instruction_sets())}; {name!r} {problem}")
    return isa


def instruction_sets() -> list[str]:
    """What FASTGRPO_CPU_ISA may name on this machine, best first."""
    return _library().fastgrpo_cpu_isa_names().decode().split(",")


def unavailable() -> str | None:
    """None, or why this backend cannot run on this machine."""
    return _load()[1]


def refuses(call: Call) -> str | None:
    """None, or why this backend cannot take such a call."""
    if call.device_type != "cpu":
        return f"they are on {call.device_type}, not on the CPU"
    if call.dtype not in DTYPES:
        return f"{call.dtype} is not one of float32, bfloat16, float16"
    if call.one_pass:
        return "it reads a row twice"
    return None


def _call(function: str, args: Args, _: torch.device) -> None:
    isa = _isa(os.environ.get("FASTGRPO_CPU_ISA", ""))
    getattr(_library(), f"fastgrpo_cpu_{function}")(args, isa, torch.get_num_threads())


_calls = RowCalls(_call)
row_stats, row_grad, token_loss = _calls.row_stats, _calls.row_grad, _calls.token_loss


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor; x is not touched when the factor is 1."""
    if (number := factor.item()) != 1:
        x.mul_(number)


def prefer_large_pages(x: Tensor) -> None:
    """Let a new, contiguous tensor be mapped in large pages as it is first written, where the system offers them."""
    library, _ = _load()
    if library is not None:
        library.fastgrpo_cpu_prefer_large_pages(x.data_ptr(), x.numel() * x.element_size())
