"""The CPU backend: libfastgrpo_cpu (csrc/cpu) on torch tensors, through ctypes.

The library is loaded at the first use. Calls release the GIL and use up to `torch.get_num_threads()` threads of their
own; results depend neither on that number nor on how rows are batched. The instruction set is the best that the CPU
has; the environment variable FASTGRPO_CPU_ISA (amx, avx512bf16, avx512, avx2, neonbf16, neon, portable) names another.
"""

from __future__ import annotations

import ctypes
import functools
import os

import torch
from torch import Tensor

from .contract import Call, Rows, Scores
from .native import DTYPES, Args, RowCalls, load, make_args


class _Matmul(ctypes.Structure):
    """FastgrpoMatmul in csrc/cpu/api.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("M", "N", "K")),
        *((name, ctypes.c_int64 * 2) for name in ("a_stride", "b_stride")),
        ("out_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("dtype", "out_dtype", "add")),
        *((name, ctypes.c_void_p) for name in ("a", "b", "bias", "out")),
    ]


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
        matmul=(None, ctypes.POINTER(_Matmul), ctypes.c_int32, ctypes.c_int32),
        head_stats=(None, ctypes.POINTER(_Matmul), *_ROWS[1:]),
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


def matmul(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False, bias: Tensor | None = None) -> None:
    """out = a @ b (+ bias), or out += a @ b with `add`, summed in fp32.

    An element has the same bits whatever the other rows and columns and the number of threads are.

    Args:
        a (M, K), b (K, N): fp32, bf16 or fp16, both of one dtype; any strides, but quickest with a unit stride.
        out (M, N): fp32, or of the dtype of a and b; unit stride in N. It overlaps neither.
        bias (N,) fp32, contiguous.
    """
    isa = _isa(os.environ.get("FASTGRPO_CPU_ISA", ""))
    _library().fastgrpo_cpu_matmul(_product(a, b, bias, out, add), isa, torch.get_num_threads())


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None = None, add: bool = False) -> _Matmul:
    like = a if out is None else out
    return _Matmul(
        *(a.shape[0], b.shape[1], a.shape[1]),
        *(a.stride(), b.stride(), like.stride(0)),
        *(DTYPES[a.dtype], DTYPES[like.dtype], add),
        *(a.data_ptr(), b.data_ptr(), None if bias is None else bias.data_ptr(), like.data_ptr()),
    )


def head_stats(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    *,
    want_entropy: bool,
    softcap: float | None = None,
) -> Scores:
    """`row_stats` of the fp32 logits hidden @ weightᵀ (+ bias), which are not written to memory.

    The same bits as from logits made by `matmul`.

    Args:
        hidden (N, H), weight (V, H), bias (V,) fp32: as in `matmul`.
    """
    logp, lse = (torch.empty(hidden.shape[0], dtype=torch.float32) for _ in range(2))
    scores = Scores(logp, lse, torch.empty_like(logp) if want_entropy else None)
    logits = logp.new_empty(()).expand(1, hidden.shape[0], weight.shape[0])  # of their shape
    args = make_args(logits, None, softcap, rows, scores)
    isa = _isa(os.environ.get("FASTGRPO_CPU_ISA", ""))
    _library().fastgrpo_cpu_head_stats(_product(hidden, weight.t(), bias), args, isa, torch.get_num_threads())
    return scores


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor; x is not touched when the factor is 1."""
    if (number := factor.item()) != 1:
        x.mul_(number)


def prefer_large_pages(x: Tensor) -> None:
    """Let a new, contiguous tensor be mapped in large pages as it is first written, where the system offers them."""
    library, _ = _load()
    if library is not None:
        library.fastgrpo_cpu_prefer_large_pages(x.data_ptr(), x.numel() * x.element_size())
